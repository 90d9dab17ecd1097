"""A training script as one rank of torchrun, with the faults that kills.py orders:

    CAMPAIGN_FAULTS="0:1:kill@batch:5" torchrun --nproc_per_node 2 -m tests.campaign.rank seg --data ...

kills rank 1 in its 5th batch, before torchrun's first restart."""
import importlib
import os
import sys

from tests.campaign import faults
from utils.errors import cli


def main():
    task = sys.argv.pop(1)
    place = [os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]]
    orders = [order.split(":", 2) for order in os.environ.get("CAMPAIGN_FAULTS", "").split()]
    fault = next((fault for *there, fault in orders if there == place), "")
    faults.install(fault, every_step=os.environ.get("CAMPAIGN_EVERY_STEP") == "1")
    print(f"campaign rank {place[1]} starts", flush=True)
    module = importlib.import_module("tests.toy" if task == "toy" else f"train_{task}")
    cli(module.main)


if __name__ == "__main__":
    main()
