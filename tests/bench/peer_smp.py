"""The peer: segmentation-models-pytorch's UNet on regnetx_002, trained the same way on the same split.

    python -m tests.bench.peer_smp --data water --groups water/groups.csv --scale 10000 --seed 0

Same tiles, crops, flips, batches, loss (Lovasz hinge, elu), AdamW 1e-3, cosine, epochs; smp's net as its users set it
up: the seven bands, nothing before the encoder. --ema, --bce and --gain give it our recipe as well. Prints the
validation IoU of the last epoch, plain and with flip-TTA; train_seg.py's results.json has the same numbers of our net.
"""
import argparse
import functools
import tempfile
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

from data import folds, seg
from data.loader import eval_loader, train_loader
from utils import losses
from utils.metrics.segmentation import BinaryIoU
from utils.ops import tta
from utils.train import engine, optim
from utils.train.state import State


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--groups")
    parser.add_argument("--scale", type=float, default=65535)
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--bs", type=int, default=16)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--bce", type=float, default=0.0, help="weight of an added BCE")
    parser.add_argument("--gain", type=float, default=0.0, help="random brightness, octaves")
    args = parser.parse_args()

    bands = list(range(1, 8))
    samples = seg.read(args.data, bands=bands)
    paired, areas = dict(zip(samples.names, samples.pairs)), samples.areas
    groups = folds.read_groups(args.groups, list(paired)) if args.groups else None
    fold_of = folds.assign(list(paired), [0.2] * 5, strata=folds.area_strata(areas), groups=groups)
    train, val = ([n for n, k in fold_of.items() if (k == args.fold) is held_out] for held_out in (False, True))
    inputs = seg.Input(bands, args.scale, args.imgsz, mean_planes=False)
    options = dict(bands=bands, cache="ram")
    view = dict(hflip=0.5, rot90=True, crop_padding=2.0, border=["reflect", "wrap"])
    data = seg.SegData([paired[n] for n in train], view=view, colour=dict(gain=args.gain), imgsz=args.imgsz, seed=args.seed, **options)
    loader = train_loader(data, args.bs, seed=args.seed)
    val_loader = eval_loader(seg.SegData([paired[n] for n in val], **options), args.bs)

    engine.seed_everything(args.seed)
    device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
    model = smp.Unet("tu-regnetx_002", encoder_weights=None, in_channels=7, classes=1)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = optim.make_optimizer("adamw", optim.param_groups(model, 0.01), lr=1e-3)
    schedule = optim.make_schedule("cosine", steps_per_epoch=len(loader), epochs=args.epochs)
    ema = optim.make_ema(model, len(loader) * args.epochs) if args.ema else None
    state = State(model, optimizer, schedule, device=device, ema=ema)

    def compute_loss(model, batch):
        logits = model(inputs(batch["image"]))
        return losses.lovasz_hinge(logits, batch["mask"], elu=True) + args.bce * losses.bce(logits, batch["mask"]), {}

    def evaluate(model, flips=False):
        metric = BinaryIoU()
        for batch in val_loader:
            batch = engine.to_device(batch, device)
            x = inputs(batch["image"])
            passes = tta.tta_views(("hflip", "vflip") if flips else (), x.shape[2:])
            metric.update(tta.merge(tta.maps(lambda x: model(x).float().sigmoid(), x, passes)), batch["mask"])
        return metric.compute()

    with tempfile.TemporaryDirectory() as folder:
        engine.fit(state, loader, compute_loss, evaluate, folder=Path(folder), header={"task": "seg", "arch": {}},
                   epochs=args.epochs, seed=args.seed, save_period=0)
    scores = engine.evaluate_on(state, functools.partial(evaluate, flips=True))
    print(f"smp, seed {args.seed}, ema {args.ema}, bce {args.bce}, gain {args.gain}: "
          f"last epoch iou {state.scores[-1]:.4f}, with flip-TTA {scores['iou']:.4f}")


if __name__ == "__main__":
    main()
