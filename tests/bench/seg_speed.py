"""Segmentation: our training step and prediction against the same net run as the wildfire system ran it.

    python -m tests.bench.seg_speed [--size 256] [--bs 8] [--rounds 5] [--compile]

"as in 2024": fp32, NCHW, maps enlarged and concatenated, unfused AdamW, Lovasz loss in a loop over images, memory as
glibc gives it; prediction in fp32 with batch norms. Ours: the defaults (channels-last, fused AdamW, one batched sort,
EMA; autocast where the hardware has bf16, or as --amp says), and prediction as predict.py does it. Both in turn,
`rounds` times. The fastest round counts: noise only adds.
"""
import argparse
import copy
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from data import images, seg
from data.loader import train_loader
from data.samples.wildfire import wildfire
from nets.blocks import relu
from nets.unet import UNet
from tests.bench.timing import clock, in_turn, prepared, show, training_step, with_plain_memory
from utils import losses
from utils.ops import decide
from utils.train import dist, optim
from utils.train.state import precision, to_device


def lovasz_loop(logits, masks):
    """The loss as the competition code computed it: image by image, elu."""
    total = 0
    for z, y in zip(logits, masks):
        z, y = z.reshape(-1), y.reshape(-1).float()
        errors, order = torch.sort(1 - z * (2 * y - 1), descending=True)
        y = y[order]
        jaccard = 1 - (y.sum() - y.cumsum(0)) / (y.sum() + (1 - y).cumsum(0))
        jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
        total = total + torch.dot(F.elu(errors) + 1, jaccard)
    return total / len(logits)


def as_in_2024(net):
    """The net with decoder blocks that enlarge the map, concatenate the skip and convolve; in place."""
    def forward(block, x, *skips):
        x = torch.cat([F.interpolate(x, scale_factor=2), *skips], 1)
        return block.conv2(relu(block.conv1.bn(block.conv1.conv(x))))

    for block in net.decoder:
        block.forward = types.MethodType(forward, block)
    return net


def trainer(ours, batch, device, amp):
    """-> a function that does one step and returns the seconds of (forward and loss, backward, optimizer)."""
    torch.manual_seed(0)
    layout = torch.channels_last if ours else torch.contiguous_format
    model = (UNet() if ours else as_in_2024(UNet())).to(device, memory_format=layout)
    if ours:
        optimizer = optim.make_optimizer("adamw", optim.param_groups(model, 0.01), lr=1e-3)
        ema = optim.make_ema(model, 1000)
    else:
        optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False, fused=False), None
    image = seg.add_mean_planes(batch["image"]).contiguous(memory_format=layout)
    dtype = precision(amp, device) if ours else None

    def loss():
        logits = model(image)
        return losses.lovasz_hinge(logits, batch["mask"], elu=True) if ours else lovasz_loop(logits, batch["mask"])
    return training_step(loss, model, optimizer, device, dtype=dtype, ema=ema)


def predictors(raw, device, compiled, bs, amp):
    """-> {name: function that predicts the batch and returns seconds per image}."""
    def timed(function):
        def run():
            began = clock(device)
            with torch.inference_mode():
                function()
            return (clock(device) - began) / len(raw)
        return run

    torch.manual_seed(0)
    net, inputs = UNet().eval(), seg.Input(list(range(1, 8)), 65535.0, raw.shape[2], mean_planes=True)
    before = as_in_2024(copy.deepcopy(net)).to(device)
    made = {"as in 2024": with_plain_memory(timed(
        lambda: before(seg.add_mean_planes(raw[:, :7].to(device).float() / 65535)).sigmoid().cpu()))}
    for name, compile in {"ours": False, "ours, --compile": True}.items():
        if compile <= compiled:
            ours = prepared(copy.deepcopy(net), device, compile, amp)
            made[name] = timed(lambda net=ours: [
                decide.segment(net, inputs(raw[i:i + bs].to(device)), side=inputs.side).cpu()
                for i in range(0, len(raw), bs)])
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--predict-bs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true",
                        help="also prediction with --compile (minutes to build on CPUs)")
    parser.add_argument("--amp", default="auto", help="ours: auto, or off for fp32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = dist.setup(args.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, precision "
          f"{precision(args.amp, device)}, {args.size} x {args.size} x 14, batch {args.bs}")

    with tempfile.TemporaryDirectory() as folder:
        wildfire(folder, train=2 * args.bs, test=0, size=args.size)
        root = Path(folder) / "Wildfire"
        paired = seg.read(root).pairs
        for cache in (None, "ram"):
            data = seg.SegData(paired, bands=list(range(1, 8)), imgsz=args.size, repeat=8, cache=cache,
                               view={"hflip": 0.5, "rot90": True, "crop_padding": 2})
            began = time.perf_counter()
            for batch in train_loader(data, args.bs):
                pass
            rate = len(data) / (time.perf_counter() - began)
            print(f"loader, one process, {'cache in RAM' if cache else 'from files'}: {rate:.0f} img/s")
        batch = to_device(batch, device)
        batch["image"] = batch["image"].float() / 65535
        raw = torch.stack([images.read(image, list(range(1, 8))) for image, _ in paired])

    steps = {"as in 2024": with_plain_memory(trainer(False, batch, device, args.amp)),
             "ours": trainer(True, batch, device, args.amp)}
    taken = show("training", in_turn(steps, args.rounds), args.bs, "as in 2024")
    print(f"training ratio: {taken['as in 2024'] / taken['ours']:.2f}")

    runs = in_turn(predictors(raw, device, args.compile, args.predict_bs, args.amp), args.rounds)
    rate = {name: 1 / min(taken) for name, taken in runs.items()}
    for name, value in rate.items():
        print(f"prediction {name}: {value:.1f} img/s, ratio {value / rate['as in 2024']:.2f}")


if __name__ == "__main__":
    main()
