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

from data import folds, images, mix, seg
from data.loader import eval_loader, train_loader
from nets import backbones, pretrained
from nets.unet import UNet, probabilities
from utils import losses, metrics
from utils.ops import tiles, tta
from utils.pictures import charts, review, sheets
from utils.train import dist, engine
from utils.train.args import band_list, loss_term, float_range, setup_run, train_parser, training, int_range
from utils.errors import UserError, answers_for, cli
from utils.files import write_json

BINARY = {  # (logits (B, 1, H, W), mask (B, H, W), ignore, label smoothing) -> mean over the batch
    "lovasz_elu": lambda z, y, ignore, s: losses.lovasz_hinge(z, y, elu=True, ignore=ignore),
    "lovasz": lambda z, y, ignore, s: losses.lovasz_hinge(z, y, ignore=ignore),
    "bce": lambda z, y, ignore, s: losses.bce(z, y, smoothing=s, ignore=ignore),
    "dice": lambda z, y, ignore, s: losses.dice(z, y, ignore=ignore),
    "focal": lambda z, y, ignore, s: losses.focal(z, y, smoothing=s, ignore=ignore),
    "topk": lambda z, y, ignore, s: losses.top_k(z, y, ignore=ignore),
}
MULTICLASS = {  # the same for logits (B, classes, H, W) and masks of class indices
    "lovasz": lambda z, y, ignore, s: losses.lovasz_softmax(z, y, ignore=ignore),
    "ce": lambda z, y, ignore, s: losses.cross_entropy(z, y, smoothing=s, ignore=ignore),
    "dice": lambda z, y, ignore, s: losses.dice_softmax(z, y, ignore=ignore),
    "focal": lambda z, y, ignore, s: losses.focal_softmax(z, y, ignore=ignore),
    "topk": lambda z, y, ignore, s: losses.top_k_softmax(z, y, ignore=ignore),
}
SMOOTHED = {"bce", "focal"}, {"ce"}  # those that take --label-smoothing, of BINARY, of MULTICLASS


def parse_args():
    parser = train_parser(__doc__.splitlines()[0], "seg", data="Wildfire", epochs=150, bs=64, imgsz=256, lr=1e-3,
                          schedule="restarts")
    add = parser.add_argument_group("segmentation").add_argument
    add("--bands", type=band_list, default="1-7", help="such as 1-7 or 7,5,3, or all")
    add("--scale", type=float_range(1e-9, 1e12), help="pixel values are divided by it (65535 for uint16, 255 for uint8)")
    add("--mean-planes", action=BooleanOptionalAction, default=True,
        help="for every band a constant plane with its mean")
    add("--classes", type=int_range(1, 255), default=1, help="1: binary masks; else masks hold 0 to N-1")
    add("--ignore", type=int_range(0, 255), help="mask value without influence")
    add("--resize", action="store_true", help="whole tiles at --imgsz in place of crops; masks are resized back")
    add("--tile", type=int_range(16, 65536), help="larger images are windows of this side, read alone; crops are cut from "
        "those")
    add("--overlap", type=float_range(0, 0.9), default=0.25, help="of neighbouring windows; in the validation none")
    add("--repeat", type=int_range(1, 10**6), default=10, help="passes over the data that make an epoch")
    add("--gain", type=float_range(0, 10), default=0.0, help="random brightness, octaves either way")
    add("--presence", type=float_range(0), default=0.0, metavar="WEIGHT", help="weight of the loss of a second head "
        "that tells which classes an image has, and clears the masks of others; where pixels are ignored it learns of "
        "those that are seen; 0: no head")
    add("--p-object", type=float_range(0, 1), default=0.0, help="probability that a crop is laid over an object")
    add("--mixup", type=float_range(0, 1), default=0.0, metavar="P", help="share of the batches whose images are blended")
    add("--cutmix", type=float_range(0, 1), default=0.0, metavar="P", help="share of the batches with boxes of other images")
    add("--gridmask", type=float_range(0, 1), default=0.0, metavar="P", help="share of the images that lose a grid of squares")
    add("--cutout", type=float_range(0, 1), default=0.0, metavar="P", help="share of the images that lose one square")
    add("--label-smoothing", type=float_range(0, 0.99), default=0.0, help="of bce, ce, binary focal: towards the middle")
    add("--loss", nargs="+", type=loss_term(BINARY | MULTICLASS), metavar="NAME[=WEIGHT]",
        help=f"sum of {', '.join(BINARY)}, such as: --loss lovasz_elu bce=0.5, --loss dice focal; for several classes "
        f"of {', '.join(MULTICLASS)}; without: lovasz_elu and bce, or lovasz and ce")
    add("--encoder", choices=backbones.NAMES, metavar="NAME", default="regnetx_002",
        help="regnetx_002 ... 032, efficientnetv2_s, m, l, b0 ... b3, repvgg_a0 ..., hrnet_w18 ...")
    add("--conv0", type=int_range(1, 4096), nargs="*", default=[32, 32], help="widths of 1x1 convolutions before it")
    add("--decoder", type=int_range(1, 4096), nargs="*", default=[128, 64, 48, 32], help="widths, coarse to fine; none: "
        "all maps concatenated, with an HRNet that is HRNetV2")
    return setup_run(parser, needs={"tile": ("overlap",)})


def main():
    args, device, folder, resume = parse_args()
    check_flags(args, resumed=bool(resume))
    engine.seed_everything(args.seed, args.deterministic)

    # ---- data ----
    root = Path(args.data)
    names, paired = zip(*seg.pairs(root / "train_img", root / "train_mask").items())
    facts = seg.scan(paired, bands=args.bands, classes=args.classes, ignore=args.ignore)
    bands = args.bands or list(range(1, facts[0]["bands"] + 1))
    if not any(fact["area"] for fact in facts):
        dist.print0(f"warning: {root / 'train_mask'}: no pixel is of a class above 0; see --classes and --ignore")
    train, val = folds.load_or_make_split(folder, names, folds.parse_folds(args.folds), args.fold, groups=args.groups,
                              files=[image for image, _ in paired], drop=args.drop_noisy,
                              strata=folds.area_strata([fact["area"] for fact in facts]))
    if args.debug:
        train, val, args.repeat = folds.spread(train, 8 * args.bs), folds.spread(val, args.bs), 1
    paired_train, sizes, weights = [paired[i] for i in train], [facts[i]["size"] for i in train], [1.0] * len(train)
    for more, weight in args.extra_data:
        found = list(seg.pairs(Path(more) / "train_img", Path(more) / "train_mask").values())
        found = [found[i] for i in folds.without_copies([image for image, _ in found], [paired[i][0] for i in val], more)]
        found = folds.spread(found, 8 * args.bs) if args.debug else found
        sizes += [fact["size"] for fact in seg.scan(found, bands=bands, classes=args.classes, ignore=args.ignore)]
        paired_train, weights = paired_train + found, weights + [weight] * len(found)
    scale = args.scale or images.default_scale([image for image, _ in (*paired_train, *paired)])
    options = dict(bands=bands, scale=scale, classes=args.classes, ignore=args.ignore, cache=args.cache)
    seen, windows = zip(*((i, window) for i, size in enumerate(sizes)
                          for window in tiles.cover(size, args.tile, args.overlap) or [None]))
    paired_train, weights = [paired_train[i] for i in seen], [weights[i] for i in seen]
    train_data = seg.SegData(paired_train, windows, imgsz=args.imgsz, repeat=args.repeat, seed=args.seed,
                             gain=args.gain, p_object=args.p_object, resize=args.resize, **options)
    loader = train_loader(train_data, args.bs, workers=args.workers, seed=args.seed, device=device,
                          same=args.debug, weights=weights * args.repeat if set(weights) - {1.0} else None)

    # ---- net ----
    arch = dict(encoder=args.encoder, in_chans=len(bands) * (1 + args.mean_planes), classes=args.classes,
                conv0=args.conv0, decoder=args.decoder, presence=args.presence > 0)
    with answers_for("--decoder"):
        model = UNet(**arch, grad_checkpoint=args.grad_checkpoint)
    if args.imgsz <= model.stride and args.bs == dist.world_size():
        raise UserError(f"--imgsz {args.imgsz} --bs {args.bs}: batch norm would see a single pixel; raise one of them")
    if args.weights and not resume:
        with answers_for("--weights"):
            dist.print0(pretrained.describe(pretrained.load(model, args.weights)))
    model = model.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.sync_batch_norm(model, device)

    # ---- loss ----
    def inputs(batch):
        return seg.add_mean_planes(batch["image"]) if args.mean_planes else batch["image"]

    known = BINARY if args.classes == 1 else MULTICLASS
    terms = args.loss or [(name, 1.0) for name in (("lovasz_elu", "bce") if args.classes == 1 else ("lovasz", "ce"))]

    def mixed(batch):
        return mix.for_masks(batch["image"], batch["mask"], p_mixup=args.mixup, p_cutmix=args.cutmix,
                             p_gridmask=args.gridmask, p_cutout=args.cutout)

    def compute_loss(model, batch):
        image, targets = mixed(batch)
        logits = model(inputs(batch | {"image": image}))
        logits, present = logits if args.presence else (logits, None)
        parts = {f"{name}_loss": sum(share * known[name](logits, mask, args.ignore, args.label_smoothing)
                                     for mask, share in targets) for name, _ in terms}
        loss = sum(weight * parts[f"{name}_loss"] for name, weight in terms)
        if args.presence:
            parts["presence_loss"] = sum(share * losses.bce(present, seg.presence(mask, args.classes, args.ignore),
                                                            ignore=seg.UNKNOWN) for mask, share in targets)
            loss = loss + args.presence * parts["presence_loss"]
        return loss, parts if len(parts) > 1 else {}

    # ---- validation ----
    if val:
        judged, windows = zip(*((i, window) for i in val
                                for window in tiles.partition(facts[i]["size"], args.tile) or [None]))
        val_data = seg.SegData([paired[i] for i in judged], windows, **options)
        shapes = [window[2:] if window else facts[i]["size"] for i, window in zip(judged, windows)]
        # tiles far larger than the crops would not fit, though without gradients four times their pixels do
        fit = 4 * args.bs * args.imgsz ** 2 // max(height * width for height, width in shapes)
        val_loader = eval_loader(val_data, max(1, min(args.bs, fit) // dist.world_size()), shapes=shapes,
                                 workers=args.workers, device=device)

    def predict(model, batch, flips):
        def views(x):
            passes = tta.tta_views(("hflip", "vflip") if flips else (), x.shape[2:])
            return tta.merge(tta.maps(lambda x: probabilities(model(x)), x, passes))
        return tta.at_size(views, inputs(batch), args.imgsz) if args.resize else views(inputs(batch))

    def evaluate(model, flips=False, found=None):
        metric = metrics.BinaryIoU(ignore=args.ignore) if args.classes == 1 else \
            metrics.MeanIoU(args.classes, ignore=args.ignore)
        for i, batch in enumerate(val_loader):
            batch = engine.to_device(batch, device)
            probs = predict(model, batch, flips)
            metric.update(probs if args.classes == 1 else probs.argmax(1), batch["mask"])
            if found:
                masks = probs[:, 0] > 0.5 if args.classes == 1 else probs.argmax(1)
                found.update(batch["index"], masks, batch["mask"])
            if i == 0 and dist.rank() == 0:
                sheets.segmentation_sheet(folder / "val.png", batch["image"], batch["mask"], probs,
                                            ignore=args.ignore)
        metric.reduce()
        if args.classes == 1:  # predict.py takes it from the checkpoint
            header["threshold"] = metric.best_threshold()
        return metric.compute()

    def draw(model, indices):
        for sample in (val_data[i] for i in indices):
            batch = engine.to_device(torch.utils.data.default_collate([sample]), device)
            yield sheets.segmentation_row(sample["image"], sample["mask"], predict(model, batch, flips=True)[0],
                                            ignore=args.ignore)

    if args.show_augment:
        if dist.rank() == 0:
            save_augmentations(folder / "augment.png", train_data, mixed)
        return

    # ---- training ----
    if dist.rank() == 0:
        params = sum(p.numel() for p in model.parameters())
        print(f"{len(paired_train)} tiles to train, {len(val_data) if val else 0} to validate; {params:,} parameters; "
              f"{device}")
        batch = [train_data[0, i] for i in range(min(args.bs, 8))]
        sheets.segmentation_sheet(folder / "train_batch.png", torch.stack([b["image"] for b in batch]),
                                  torch.stack([b["mask"] for b in batch]), ignore=args.ignore)
    header = {"task": "seg", "arch": {"name": "UNet", "kwargs": arch}, "classes": args.classes, "bands": bands,
              "scale": scale, "mean_planes": args.mean_planes, "imgsz": args.imgsz, "resize": args.resize,
              "args": vars(args), "threshold": (resume or {}).get("threshold")}
    state = engine.fit(model, loader, compute_loss=compute_loss, evaluate=evaluate if val else None, folder=folder,
                       header=header, device=device, resume=resume, **training(args, folder, model, loader))
    if args.debug:
        engine.check_debug(state.history)
    if val:
        write_report(state, evaluate, draw, folder, args.ignore, [paired[i][0] for i in judged])


def save_augmentations(path, data, mixed, samples=8, epochs=6):
    """A sheet of what is trained on: a row per tile, a column per epoch, labels drawn in."""
    columns = []
    for epoch in range(epochs):
        batch = torch.utils.data.default_collate([data[epoch, i] for i in range(min(samples, len(data)))])
        image, [(masks, _), *_] = mixed(batch)
        columns.append([sheets.overlay(sheets.to_rgb(x), mask) for x, mask in zip(image, masks)])
    sheets.contact_sheet(path, list(zip(*columns)), titles=[f"epoch {k + 1}" for k in range(epochs)])
    print(path)


def check_flags(args, resumed):
    """Flags that are right by themselves and wrong together; of a resumed run idle ones may stay."""
    known, smoothed = (BINARY, SMOOTHED[0]) if args.classes == 1 else (MULTICLASS, SMOOTHED[1])
    for name, _ in args.loss or ():
        if name not in known:
            raise UserError(f"--loss {name}: not for --classes {args.classes}; choose from {', '.join(known)}")
    if args.classes == 1 and args.ignore in (0, 1):
        raise UserError(f"--ignore {args.ignore}: is one of the two values of a binary mask; see --classes")
    if args.tile and (args.resize or args.tile < args.imgsz):
        why = "--resize sees images as a whole; leave one out" if args.resize else \
            f"smaller than the crops, --imgsz {args.imgsz}; raise it"
        raise UserError(f"--tile {args.tile}: {why}")
    if args.p_object and args.resize:
        raise UserError("--p-object: is for crops, --resize makes none; leave one out")
    if args.label_smoothing and args.loss and not smoothed & dict(args.loss).keys() and not resumed:
        raise UserError(f"--label-smoothing: does nothing without a --loss of {', '.join(sorted(smoothed))}; leave it "
                        f"out, or add one")


def write_report(state, evaluate, draw, folder, ignore, files):
    """The run's last weights judged with flips, at 0.5: results.json; tile by tile samples.csv; the worst and the
    best tiles, and scores by class and by size, in review.png."""
    found = review.SegmentationReview(ignore)
    scores = engine.evaluate_on(state, functools.partial(evaluate, flips=True, found=found))
    found.reduce()
    if dist.rank() > 0:
        return
    by_class = [{"class": int(k[4:]), "iou": v} for k, v in scores.items() if k.startswith("iou_") and k[4:].isdigit()]
    samples, tables, parts = found.samples(files), {"Classes": by_class} if by_class else {}, {}
    tables |= found.tables()  # of all classes together
    for part, chosen in zip(("worst", "best"), review.ends([row["score"] for row in samples])):
        rows = engine.evaluate_on(state, lambda model, chosen=chosen: list(draw(model, chosen)))
        parts[part] = [(samples[i], row) for i, row in zip(chosen, rows)]
    review.page(folder / "review.png", parts, tables=tables, titles=("image", "truth", "prediction", "errors"))
    charts.write_csv(folder / "samples.csv", samples)
    write_json(folder / "results.json", {"last": state.history[-1], "last with flips": scores} | tables)
    print("last epoch with flip-TTA: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))


if __name__ == "__main__":
    cli(main)
