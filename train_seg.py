"""Segmentation of multispectral tiles: the system that took 2nd place in AI SPARK 2024 (wildfire), and beyond it.

    python train_seg.py --epochs 150 --bs 64                          # ./Wildfire/{train_img,train_mask}
    python train_seg.py --folds 0                                     # on everything, for the submission
    python train_seg.py --data water --pixel-scale 10000 --imgsz 128 --groups water/groups.csv
    torchrun --nproc_per_node 4 train_seg.py                          # the same on four GPUs
"""
import dataclasses
import functools
import inspect
import itertools
from argparse import BooleanOptionalAction

import numpy as np
import torch
from torch.utils.data import default_collate

import nets
from data import folds, seg, units
from data.augment import mix, of_flags
from data.loader import eval_loader, train_loader
from nets import pretrained
from utils import losses
from utils.errors import UserError, answers_for, cli
from utils.files import write_json
from utils.metrics.segmentation import BinaryIoU, MeanIoU, SampleIoU
from utils.ops import decide, tiles
from utils.pictures import review, sheets
from utils.train import dist, engine
from utils.train.args import (add_shares, check_batch, class_weights, debug_sizes, float_range, int_range, loss_term,
                              positive, setup_run, train_parser, training, weight_list, word)

BINARY = {  # (logits (B, 1, H, W), mask (B, H, W), ignore=...) -> mean over the batch
    "lovasz_elu": functools.partial(losses.lovasz_hinge, elu=True),
    "lovasz": losses.lovasz_hinge,
    "bce": losses.bce,
    "dice": losses.dice,
    "focal": losses.focal,
}
MULTICLASS = {  # the same for logits (B, classes, H, W) and masks of class indices
    "lovasz": losses.lovasz_softmax,
    "ce": losses.cross_entropy,
    "dice": losses.dice_softmax,
    "focal": losses.focal_softmax,
}
RECIPES = {  # defaults of flags: the competition's, and those for photographs
    "wildfire": "--bands 1-7 --mean-planes --conv0 32 32 --stem-stride 1 --epochs 150 --bs 64 --repeat 10 "
                "--schedule restarts --hflip 0.5 --rot90 --crop-padding 2 --border reflect wrap",
    "photos": "--bands all --no-mean-planes --conv0 --stem-stride 2 --epochs 100 --bs 8 --repeat 1 --schedule cosine "
              "--hflip 0.5 --no-rot90 --crop-padding 1 --border reflect --hue 0.02 --saturation 0.3 --value 0.3",
}
OPTIONS = {"label_smoothing": "smoothing", "class_weights": "weight"}  # flag: the name in those losses that take it


def make_parser():
    parser = train_parser(__doc__, "seg", RECIPES, data="Wildfire", imgsz=256, lr=1e-3)
    add = parser.add_argument_group("segmentation").add_argument
    add("--mean-planes", action=BooleanOptionalAction,
        help="give the net a constant plane per band, with the band's mean")
    add("--classes", type=int_range(1, 255), default=1, help="1: binary masks; else masks hold 0 to N-1")
    add("--ignore", type=int_range(-2**31), help="mask value of pixels that are left out of loss and metric")
    add("--resize", action="store_true", help="train on whole tiles at --imgsz, not on crops; masks are resized back")
    add("--tile", type=int_range(16, 65536), help="images larger than this side are read in windows of this side; "
        "crops are cut from the windows")
    add("--overlap", type=float_range(0, 0.9), default=0.25, help="of neighbouring training windows; 0 in validation")
    add("--repeat", type=positive, help="passes over the data per epoch")
    add("--aux-cls", type=float_range(0), default=0.0, metavar="WEIGHT", help="loss weight of an auxiliary head that "
        "predicts which classes an image contains and sets the masks of absent classes to 0; 0: no head")
    add_shares(add, {"p-object": "probability that a crop is laid over an object",
                     "cutmix": "probability that a batch gets boxes of other images"})
    add("--loss", nargs="+", type=loss_term(BINARY | MULTICLASS), metavar="NAME[=WEIGHT]",
        help=f"sum of {', '.join(BINARY)}, such as: --loss lovasz_elu bce=0.5, --loss dice focal; for several classes "
        f"of {', '.join(MULTICLASS)}; without: lovasz_elu and bce, or lovasz and ce")
    add("--class-weights", type=weight_list, metavar="W,W", help="of background and object, or of each class, in the "
        "losses but the binary lovasz and dice; balanced: in inverse proportion to the classes' pixels")
    add("--net", default="unet.UNet", metavar="NAME", help="mine.Mine: class Mine in nets/mine.py")
    add("--encoder", metavar="NAME", default="regnetx_002", help="of the UNet: regnetx_002 ... 032, efficientnetv2_s, "
        "m, l, b0 ... b3, repvgg_a0 ..., hrnet_w18 ..., or mine.Mine")
    add("--conv0", type=int_range(1, 4096), nargs="*", help="of the UNet: widths of the 1x1 "
        "convolutions before the encoder")
    add("--stem-stride", type=int, choices=(1, 2), help="of a RegNetX encoder's first convolution; 2: a quarter of the "
        "time (all other encoders have 2)")
    add("--decoder", type=int_range(1, 4096), nargs="*", help="of the UNet: widths, coarse to fine; without: as many "
        "as reach the input's resolution; no numbers: all maps are concatenated (with an HRNet this is HRNetV2)")
    return parser


def describe_net(args, in_chans):
    """-> what `nets.build` makes the net of, and the checkpoint keeps."""
    kwargs = dict(in_chans=in_chans, classes=args.classes)
    if args.net == "unet.UNet":
        kwargs |= dict(encoder=args.encoder, conv0=args.conv0, decoder=args.decoder, aux_cls=args.aux_cls > 0,
                       stem_stride=args.stem_stride)
    return {"name": args.net, "kwargs": kwargs}


def class_names(args):
    return ["background", "object"] if args.classes == 1 else list(map(str, range(args.classes)))


def takes(loss, option):
    return option in inspect.signature(loss).parameters


def check_flags(args):
    """Refuses flags that are right alone and wrong together. A resumed run may keep flags without effect."""
    known = BINARY if args.classes == 1 else MULTICLASS
    for name, _ in args.loss or ():
        if name not in known:
            raise UserError(f"--loss {name}: not for --classes {args.classes}; choose from {', '.join(known)}")
    if args.classes == 1 and args.ignore in (0, 1):
        raise UserError(f"--ignore {args.ignore}: is one of the two values of a binary mask; see --classes")
    if args.tile and (args.resize or args.tile < args.imgsz):
        why = "--resize needs whole images; leave one out" if args.resize else \
            f"smaller than the crops, --imgsz {args.imgsz}; raise it"
        raise UserError(f"--tile {args.tile}: {why}")
    if args.p_object and args.resize:
        raise UserError("--p-object: is for crops, --resize makes none; leave one out")
    if args.aux_cls and args.net != "unet.UNet":
        raise UserError("--aux-cls: is a head of the UNet; leave it out")
    for flag, option in OPTIONS.items():
        takers = {name for name, loss in known.items() if takes(loss, option)}
        if vars(args)[flag] and args.loss and not takers & dict(args.loss).keys() and args.resume is None:
            raise UserError(f"{word(flag)}: does nothing without a --loss of {', '.join(sorted(takers))}; leave it "
                            f"out, or add one")
    with torch.device("meta"), answers_for("--net, --encoder, --decoder:"):
        net = nets.build(describe_net(args, in_chans=1))
    check_batch(args, args.imgsz, net.stride)


def load_samples(args, folder):
    """-> the data (seg.Samples), the samples to validate on, and those to train on."""
    masks = dict(classes=args.classes, ignore=args.ignore, allow_bad=args.allow_bad)
    data = seg.read(args.data, bands=args.bands, **masks)
    if not any(data.areas):
        dist.print0(f"warning: {args.data}: no mask has a pixel of a class above 0; see --classes and --ignore")
    train, val = folds.load_or_make_split(
        folder, data.names, folds.parse_folds(args.folds, data.names, data.held_out, args.fold), args.fold,
        files=data.images, groups=args.groups or (data.groups if any(data.groups) else None),
        strata=folds.area_strata(data.areas), drop=args.drop_noisy)
    folds.describe(args.data, f"{data.pairs[0][0]} has the mask {data.pairs[0][1]}, by pixels", class_names(args)[1:],
                   [counts[1:] for counts in data.counts], (train, val))
    few, fewer = debug_sizes(args)
    samples, val = data.pick(folds.spread(train, few)), data.pick(folds.spread(val, fewer))
    for more, weight in args.extra_data:
        extra = seg.read(more, bands=data.bands, **masks)
        extra = extra._replace(weights=[weight * own for own in extra.weights])
        samples += extra.pick(folds.spread(folds.without_copies(extra.images, val.images, more), few))
    return data, val, samples


def training_windows(args, samples, bands):
    """-> the sample (seg.Samples) of every training window that holds data, and the windows."""
    of, windows = tiles.of_images(samples.sizes, functools.partial(tiles.cover, tile=args.tile, overlap=args.overlap))
    train_tiles = samples.pick(of)
    held = seg.hold_data(train_tiles.images, windows, bands)
    if not all(held):
        dist.print0(f"{held.count(False)} tiles hold no data and are not trained on")
    if not any(held):
        raise UserError(f"{args.data}: no tile holds data; check the no-data values of the images")
    return train_tiles.pick(np.flatnonzero(held)), list(itertools.compress(windows, held))


def loss_terms(args, counts, device):
    """-> [(name, weight, function of logits and mask)] of --loss. counts: pixels of each class."""
    binary = args.classes == 1
    weights = class_weights(args, class_names(args), counts)
    if weights:
        weights = weights[1] / weights[0] if binary else torch.tensor(weights, device=device)
    given = {"ignore": seg.IGNORE, "smoothing": args.label_smoothing, "weight": weights}
    terms = []
    for name, weight in args.loss or [(name, 1.0) for name in (("lovasz_elu", "bce") if binary else ("lovasz", "ce"))]:
        loss = (BINARY if binary else MULTICLASS)[name]
        terms.append((name, weight, functools.partial(loss, **{k: v for k, v in given.items() if takes(loss, k)})))
    return terms


def main():
    args, device, folder, resume = setup_run(make_parser(), needs={"tile": ("overlap",)}, check=check_flags,
                                             photographs=units.photographs)

    # ---- samples ----
    data, val, samples = load_samples(args, folder)
    options = dict(bands=data.bands, classes=args.classes, ignore=args.ignore, cache=args.cache)
    train_tiles, windows = training_windows(args, samples, data.bands)
    repeat = 1 if args.debug else args.repeat
    changes = of_flags(vars(args))
    train_data = seg.SegData(train_tiles.pairs, windows, imgsz=args.imgsz, repeat=repeat, seed=args.seed,
                             p_object=args.p_object, resize=args.resize, **changes, **options)
    loader = train_loader(train_data, args.bs, workers=args.workers, seed=args.seed, device=device,
                          weights=train_tiles.weights * repeat)
    if val.names:
        of, windows = tiles.of_images(val.sizes, functools.partial(tiles.partition, tile=args.tile))
        val_tiles = val.pick(of)
        val_data = seg.SegData(val_tiles.pairs, windows, **options)
        shapes = [window[2:] if window else size for size, window in zip(val_tiles.sizes, windows)]
        # without gradients, four times the pixels of a training batch fit into memory
        fit = 4 * args.bs * args.imgsz ** 2 // max(height * width for height, width in shapes)
        val_loader = eval_loader(val_data, max(1, min(args.bs, fit) // dist.world_size()), shapes=shapes,
                                 workers=args.workers, device=device)

    # ---- input ----
    with answers_for("--weights"):  # what they expect is of the default --pixel-scale
        mean, std = pretrained.normalisation(
            args.pixel_scale is None and not resume and args.weights, len(data.bands), pretrained.NONE)
    inputs = seg.Input.of(resume, args.imgsz) if resume else seg.Input(
        data.bands, imgsz=args.imgsz, mean_planes=args.mean_planes, resize=args.resize, mean=mean, std=std,
        **units.choose(samples.images, data.bands, args.pixel_scale))
    units.check(val.images, inputs)

    # ---- net ----
    arch = describe_net(args, inputs.channels)
    model = nets.build(arch, grad_checkpoint=args.grad_checkpoint)
    if args.weights and not resume:
        with answers_for("--weights"):
            dist.print0(pretrained.describe(pretrained.load(model, args.weights)))
    pretrained.freeze(model, args.freeze)
    state, options = training(args, folder, model, loader, device)

    # ---- loss ----
    terms = loss_terms(args, np.sum(samples.counts, 0).tolist(), device)

    def mixed(batch):
        return mix.for_masks(batch["image"], batch["mask"], p_mixup=args.mixup, p_cutmix=args.cutmix,
                             p_gridmask=args.gridmask, p_cutout=args.cutout, cutout_size=args.cutout_size)

    def compute_loss(model, batch):
        image, targets = mixed(batch)
        logits = model(inputs(image))
        logits, present = logits if args.aux_cls else (logits, None)
        parts = {f"{name}_loss": weight * sum(share * loss(logits, mask) for mask, share in targets)
                 for name, weight, loss in terms}
        if args.aux_cls:
            parts["aux_cls_loss"] = args.aux_cls * sum(
                share * losses.bce(present, seg.present(mask, args.classes), ignore=seg.UNKNOWN)
                for mask, share in targets)
        return sum(parts.values()), parts if len(parts) > 1 else {}

    def draw_augmented(epoch):
        indices = range(min(8, len(train_data.paired)))
        samples = [train_data[i if epoch is None else (epoch, i)] for i in indices]
        shown = [(sample["image"], sample["mask"]) for sample in samples]  # whole images differ in size
        if epoch is not None:
            image, [(masks, _), *_] = mixed(default_collate(samples))
            shown = zip(image, masks)
        return ([sheets.overlay(sheets.to_rgb(x), mask * (mask != seg.IGNORE)) for x, mask in shown],
                [train_data.paired[i][0].name for i in indices])

    # ---- validation ----
    def evaluate(model, views=(), per_sample=None):
        metric = BinaryIoU(seg.IGNORE) if args.classes == 1 else MeanIoU(args.classes, seg.IGNORE)
        for i, batch in enumerate(val_loader):
            batch = engine.to_device(batch, device)
            probs = decide.segment(model, inputs(batch["image"]), views, side=inputs.side)
            metric.update(probs if args.classes == 1 else probs.argmax(1), batch["mask"])
            if per_sample:
                per_sample.update(batch["index"], decide.masks(probs), batch["mask"])
            if i == 0 and dist.is_main():
                sheets.segmentation_sheet(folder / "val.png", batch["image"], batch["mask"], probs, ignore=seg.IGNORE)
        metric.reduce()
        return metric.compute() | ({"threshold": metric.best_threshold()} if args.classes == 1 else {})

    # ---- training ----
    if args.show_augment:
        return sheets.augmentation_sheet(folder, draw_augmented, changes)
    if dist.is_main():
        print(f"{len(train_data.paired)} tiles to train, {len(val_data) if val.names else 0} to validate")
        batch = default_collate([train_data[0, i] for i in range(min(args.bs, 8))])
        sheets.segmentation_sheet(folder / "train_batch.png", batch["image"], batch["mask"], ignore=seg.IGNORE)
    header = {"task": "seg", "arch": arch, "classes": args.classes, "input": dataclasses.asdict(inputs),
              "args": vars(args)}
    engine.fit(state, loader, compute_loss, evaluate if val.names else None, folder=folder, header=header,
               resume=resume, **options)
    if val.names:
        write_report(args, state, evaluate, inputs, val_data, folder, val_tiles.images)


def write_report(args, state, evaluate, inputs, data, folder, files):
    """Evaluates the run's last weights with the flips that training drew, at a threshold of 0.5: results.json;
    samples.csv, a row per tile; review.png, the worst and the best tiles, and the IoU by class."""
    views, per_sample = decide.drawn_views("seg", vars(args)), SampleIoU(seg.IGNORE)
    scores = engine.evaluate_on(state, functools.partial(evaluate, views=views, per_sample=per_sample))
    scores.pop("threshold", None)
    per_sample.reduce()
    if not dist.is_main():
        return

    def draw(model, indices):
        for sample in (data[i] for i in indices):
            batch = engine.to_device(default_collate([sample]), state.device)
            probs = decide.segment(model, inputs(batch["image"]), views, side=inputs.side)
            yield sheets.segmentation_row(sample["image"], sample["mask"], probs[0], ignore=seg.IGNORE)

    by_class = [{"class": int(k[4:]), "iou": v} for k, v in scores.items() if k.startswith("iou_") and k[4:].isdigit()]
    tables = {"Classes": by_class} if by_class else {}
    review.write_review(folder, per_sample.samples(files), tables=tables,
                        titles=("image", "truth", "prediction", "errors"),
                        draw=lambda chosen: engine.evaluate_on(state, lambda model: list(draw(model, chosen))))
    write_json(folder / "results.json", {"last": state.history[-1], "last with flips": scores} | tables)
    print(f"last epoch with flip-TTA: {engine.line(scores)}")


if __name__ == "__main__":
    cli(main)
