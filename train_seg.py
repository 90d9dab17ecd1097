"""Segmentation of multispectral tiles: the system that took 2nd place in AI SPARK 2024 (wildfire), and beyond it.

    python train_seg.py --epochs 150 --bs 64                          # ./Wildfire/{train_img,train_mask}
    python train_seg.py --folds 0                                     # on everything, for the submission
    python train_seg.py --data water --scale 10000 --imgsz 128 --groups water/groups.csv
    torchrun --nproc_per_node 4 train_seg.py                          # the same on four GPUs
"""
import functools
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from data import folds, images, seg
from data.loader import eval_loader, train_loader
from nets import backbones, pretrained
from nets.unet import UNet, probabilities
from utils import dist, engine, losses, metrics, optim, pictures, report, runs, tta
from utils.args import band_list, loss_term, real, start, train_parser, whole
from utils.errors import UserError, answers_for, cli

BINARY = {  # (logits (B, 1, H, W), mask (B, H, W), ignore) -> mean over the batch
    "lovasz_elu": lambda z, y, ignore: losses.lovasz_hinge(z, y, elu=True, ignore=ignore),
    "lovasz": lambda z, y, ignore: losses.lovasz_hinge(z, y, ignore=ignore),
    "bce": lambda z, y, ignore: losses.bce(z, y, ignore=ignore),
}
SEVERAL = {  # the same for logits (B, classes, H, W) and masks of class indices
    "lovasz": lambda z, y, ignore: losses.lovasz_softmax(z, y, ignore=ignore),
    "ce": lambda z, y, ignore: losses.cross_entropy(z, y, ignore=ignore),
}


def parse_args():
    parser = train_parser(__doc__.splitlines()[0], "seg", data="Wildfire", epochs=150, bs=64, imgsz=256, lr=1e-3,
                          schedule="restarts")
    add = parser.add_argument_group("segmentation").add_argument
    add("--bands", type=band_list, default="1-7", help="such as 1-7 or 7,5,3, or all")
    add("--scale", type=real(1e-9, 1e12), help="pixel values are divided by it (65535 for uint16, 255 for uint8)")
    add("--mean-planes", action=BooleanOptionalAction, default=True,
        help="for every band a constant plane with its mean")
    add("--classes", type=whole(1, 255), default=1, help="1: binary masks; else masks hold 0 to N-1")
    add("--ignore", type=whole(0, 255), help="mask value without influence")
    add("--groups", metavar="CSV", help="tiles of one group (same place) stay on one side of the split")
    add("--repeat", type=whole(1, 10**6), default=10, help="passes over the data that make an epoch")
    add("--gain", type=real(0, 10), default=0.0, help="random brightness, octaves either way")
    add("--loss", nargs="+", type=loss_term(BINARY | SEVERAL), metavar="NAME[=WEIGHT]",
        help=f"sum of {', '.join(BINARY)}, such as: --loss lovasz_elu bce=0.5; for several classes of "
        f"{', '.join(SEVERAL)}; without: lovasz_elu, or lovasz and ce")
    add("--encoder", choices=backbones.NAMES, metavar="NAME", default="regnetx_002",
        help="regnetx_002 ... regnetx_032, efficientnetv2_s, m, l, b0 ... b3, repvgg_a0 ...")
    add("--conv0", type=whole(1, 4096), nargs="*", default=[32, 32], help="widths of the 1x1 convolutions before it")
    add("--decoder", type=whole(1, 4096), nargs="+", default=[128, 64, 48, 32], help="widths, coarse to fine")
    return start(parser)


def main():
    args, device, folder, resume = parse_args()
    check_flags(args)
    engine.seed_everything(args.seed, args.deterministic)

    # ---- data ----
    root = Path(args.data)
    names, paired = zip(*seg.pairs(root / "train_img", root / "train_mask").items())
    bands = args.bands or list(range(1, images.size(paired[0][0])[0] + 1))
    facts = seg.scan(paired, bands=bands, classes=args.classes, ignore=args.ignore)
    groups = folds.read_groups(args.groups, names) if args.groups else None
    train, val = folds.of_run(folder, names, folds.parse(args.folds), args.fold, groups=groups,
                              strata=folds.area_strata([fact["area"] for fact in facts]))
    scale = args.scale or images.default_scale(images.read(paired[train[0]][0]).dtype)
    options = dict(bands=bands, scale=scale, classes=args.classes, ignore=args.ignore, cache=args.cache)
    train_data = seg.SegData([paired[i] for i in train], imgsz=args.imgsz, repeat=args.repeat, seed=args.seed,
                             gain=args.gain, **options)
    loader = train_loader(train_data, args.bs, workers=args.workers, seed=args.seed, device=device)

    # ---- net ----
    arch = dict(encoder=args.encoder, in_chans=len(bands) * (1 + args.mean_planes), classes=args.classes,
                conv0=args.conv0, decoder=args.decoder)
    model = UNet(**arch, grad_checkpoint=args.grad_checkpoint)
    if args.weights and not resume:
        with answers_for("--weights"):
            dist.print0(pretrained.describe(pretrained.load(model, args.weights)))
    model = model.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.sync_batch_norm(model, device)

    # ---- loss ----
    def inputs(batch):
        return seg.add_mean_planes(batch["image"]) if args.mean_planes else batch["image"]

    known = BINARY if args.classes == 1 else SEVERAL
    terms = args.loss or ([("lovasz_elu", 1.0)] if args.classes == 1 else [("lovasz", 1.0), ("ce", 1.0)])

    def compute_loss(model, batch):
        logits = model(inputs(batch))
        parts = {name: known[name](logits, batch["mask"], args.ignore) for name, _ in terms}
        return sum(weight * parts[name] for name, weight in terms), parts if len(parts) > 1 else {}

    # ---- validation ----
    if val:
        val_data = seg.SegData([paired[i] for i in val], **options)
        val_loader = eval_loader(val_data, max(1, args.bs // dist.world_size()), shapes=[facts[i]["size"] for i in val],
                                 workers=args.workers, device=device)

    def evaluate(model, flips=False):
        metric = metrics.BinaryIoU(ignore=args.ignore) if args.classes == 1 else \
            metrics.MeanIoU(args.classes, ignore=args.ignore)
        for i, batch in enumerate(val_loader):
            batch = engine.to_device(batch, device)
            x = inputs(batch)
            probs = tta.mean_map(lambda x: probabilities(model(x)), x, tta.flips(*x.shape[2:])[:4 if flips else 1])
            metric.update(probs if args.classes == 1 else probs.argmax(1), batch["mask"])
            if i == 0 and dist.rank() == 0:
                pictures.segmentation_sheet(folder / "val.png", batch["image"], batch["mask"], probs,
                                            ignore=args.ignore)
        metric.reduce()
        return metric.compute()

    # ---- training ----
    if dist.rank() == 0:
        params = sum(p.numel() for p in model.parameters())
        print(f"{len(train)} tiles to train, {len(val)} to validate; {params:,} parameters; {device}")
        batch = [train_data[0, i] for i in range(min(args.bs, 8))]
        pictures.segmentation_sheet(folder / "train_batch.png", torch.stack([b["image"] for b in batch]),
                                  torch.stack([b["mask"] for b in batch]), ignore=args.ignore)
    steps = -(-len(loader) // args.accumulate)
    optimizer = optim.make_optimizer(args.optimizer, optim.param_groups(model, args.weight_decay), lr=args.lr,
                                     momentum=args.momentum)
    schedule = optim.make_schedule(args.schedule, steps_per_epoch=steps, epochs=args.epochs, period=args.period,
                                   warmup_epochs=args.warmup_epochs, floor=args.lr_floor)
    ema = optim.make_ema(model, steps * args.epochs) if args.ema else None
    header = {"task": "seg", "arch": {"name": "UNet", "kwargs": arch}, "classes": args.classes, "bands": bands,
              "scale": scale, "mean_planes": args.mean_planes, "imgsz": args.imgsz, "args": vars(args)}
    boards = report.make_boards(folder, tensorboard=args.tensorboard and dist.rank() == 0,
                                wandb=args.wandb and dist.rank() == 0, config=vars(args))
    state = engine.fit(model, loader, optimizer, schedule, compute_loss, evaluate if val else None, folder=folder,
                       header=header, epochs=args.epochs, device=device, resume=resume, accumulate=args.accumulate,
                       clip=args.clip, amp=args.amp, ema=ema, compile=args.compile, seed=args.seed,
                       patience=args.patience, save_period=args.save_period, boards=boards)
    boards.close()
    if val:
        final(state, evaluate, folder, device, args.amp)


def check_flags(args):
    """Flags that are right by themselves and wrong together."""
    known = BINARY if args.classes == 1 else SEVERAL
    for name, _ in args.loss or ():
        if name not in known:
            raise UserError(f"--loss {name}: not for --classes {args.classes}; choose from {', '.join(known)}")
    if args.classes == 1 and args.ignore in (0, 1):
        raise UserError(f"--ignore {args.ignore}: is one of the two values of a binary mask; see --classes")
    if args.imgsz == 16 and args.bs == dist.world_size():  # the coarsest map is a sixteenth of the input
        raise UserError(f"--imgsz 16 --bs {args.bs}: batch norm would see a single pixel; raise one of them")


def final(state, evaluate, folder, device, amp):
    """The run's last weights judged with flips, as they will predict. Into results.json."""
    scores = engine.judge(state, functools.partial(evaluate, flips=True), device, amp)
    if dist.rank() == 0:
        runs.write_json(folder / "results.json", {"last": state.history[-1], "last with flips": scores})
        print("last epoch with flip-TTA: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))


if __name__ == "__main__":
    cli(main)
