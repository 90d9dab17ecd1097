"""Image classification, several classes an image or one: the EfficientNetV2 that won Dirty-MNIST, and beyond it.

    python train_cls.py                                        # ./resources/dirty_mnist_2nd{_answer.csv,/*.png}
    python train_cls.py --net efficientnetv2_m --weights timm:tf_efficientnetv2_m.in21k --bs 32 --accumulate 16
    python train_cls.py --synthesize resources/mnist_data/train.csv     # images made on the fly, never the same twice
    torchrun --nproc_per_node 4 train_cls.py --data photos --bands 1-3 --loss ce       # photos/train/CLASS/*.jpg
"""
import os
from argparse import BooleanOptionalAction

import numpy as np
import torch

from data import cls, folds, images, mix
from data.samples import dirty_mnist
from data.loader import eval_loader, train_loader
from nets import backbones, pretrained
from utils import losses, metrics
from utils.pictures import charts, review, sheets
from utils.train import dist, engine
from utils.train.args import band_list, loss_term, float_range, setup_run, train_parser, training, int_range
from utils.errors import UserError, answers_for, cli
from utils.files import write_json

LOSSES = {  # (logits (B, C), labels (B, C), smoothing) -> mean over the batch
    "bce": lambda z, y, s: losses.bce(z, y, smoothing=s),
    "focal": lambda z, y, s: losses.focal(z, y, smoothing=s),
    "ce": lambda z, y, s: losses.cross_entropy(z, y, smoothing=s),
}


def parse_args():
    parser = train_parser(__doc__.splitlines()[0], "cls", data="resources", epochs=30, bs=32, imgsz=384, lr=1e-3,
                          optimizer="adam", weight_decay=1e-5, schedule="cosine", lr_floor=0.01, folds=None)
    add = parser.add_argument_group("classification").add_argument
    add("--net", choices=backbones.NAMES, default="efficientnetv2_s")
    add("--bands", type=band_list, help="such as 1 or 1-3; without: all of the first image")
    add("--scale", type=float_range(1e-9, 1e12), help="pixel values are divided by it (65535 for uint16, 255 for uint8)")
    add("--labels", metavar="CSV", help="table of answers; without: see data/cls.py")
    add("--images", metavar="DIR", help="folder of that table's images")
    add("--synthesize", metavar="CSV", help="train on Dirty-MNIST images made on the fly from these letters")
    add("--letters-per-image", type=int_range(1, 26), nargs=2, default=[10, 14], metavar="N", help="of --synthesize")
    add("--noise", type=int_range(0, 255), default=254, help="largest value of the background of --synthesize")
    add("--synthesize-count", type=int_range(1, 10**9), default=50000, help="images of an epoch of --synthesize")
    add("--subset", type=int_range(2, 10**9), help="train on about so many samples, with the same share of every class")
    add("--val-interval", type=float_range(1e-4, 1), default=1.0, help="validate every so many passes (1, 1/2, 1/3, ...), "
        "each then shown as an epoch")
    add("--loss", type=loss_term(LOSSES), nargs="+", metavar="NAME[=WEIGHT]",
        help=f"sum of {', '.join(LOSSES)}; without: ce where every image has one class, else bce "
        "(in place of ce, bce and focal find the class, but what predict.py makes of them are no probabilities)")
    add("--label-smoothing", type=float_range(0, 0.99), default=0.0, help="pulls labels towards the middle")
    add("--drop", type=float_range(0, 0.99), help="EfficientNetV2: dropout before the classifier (0.5)")
    add("--drop-path", type=float_range(0, 0.99), help="EfficientNetV2: stochastic depth of the last block (0.2)")
    add("--rot90", action=BooleanOptionalAction, default=True, help="random quarter turns")
    add("--flip", type=float_range(0, 1), default=0.0, help="probability of each flip")
    add("--degrees", type=float_range(0, 180), default=15.0, help="largest rotation")
    add("--p-affine", type=float_range(0, 1), default=0.5, help="probability of a small shift, scale and rotation")
    add("--mixup", type=float_range(0, 1), default=0.0, metavar="P", help="share of the batches whose images are blended")
    add("--cutmix", type=float_range(0, 1), default=0.0, metavar="P", help="share of the batches with boxes of others")
    add("--snapmix", type=float_range(0, 1), default=0.0, metavar="P", help="the same, labels weighed by where the net looks")
    add("--gridmask", type=float_range(0, 1), default=0.0, metavar="P", help="share of the images that lose a grid of squares")
    add("--cutout", type=float_range(0, 0.99), default=0.3, help="side of a blank square, share of the image; 0: none")
    return setup_run(parser, needs={"synthesize": ("letters_per_image", "noise", "synthesize_count")})


def main():
    args, device, folder, resume = parse_args()
    engine.seed_everything(args.seed, args.deterministic)

    # ---- data ----
    table = cls.read(args.data, table=args.labels, folder=args.images)
    if resume:  # a run of an older version may have taken a table of one 1 a row for several classes an image
        table = table._replace(exclusive=resume["exclusive"])
    terms = args.loss or [("ce" if table.exclusive else "bce", 1.0)]
    if not table.exclusive and "ce" in dict(terms):
        raise UserError("--loss ce: is for one class an image, this data has several; take bce or focal")
    bands = args.bands or images.default_bands(table.files)
    train, val = split(args, folder, table)
    if args.debug:
        train, val = folds.spread(train, 8 * args.bs), folds.spread(val, args.bs)
        args.synthesize_count = 8 * args.bs
    files, answers, weights = [table.files[i] for i in train], table.labels[train], [1.0] * len(train)
    for more, weight in args.extra_data:
        extra = cls.with_names(cls.read(more, least=1), table, more)
        chosen = folds.without_copies(extra.files, [table.files[i] for i in val], more)
        chosen = folds.spread(chosen, 8 * args.bs) if args.debug else chosen
        files, answers = files + [extra.files[i] for i in chosen], np.concatenate((answers, extra.labels[chosen]))
        weights += [weight] * len(chosen)
    known = table.files + files[len(train):]
    cls.check_bands(known, bands)
    scale = args.scale or images.default_scale(known)
    options = dict(bands=bands, limit=2 * args.imgsz, cache=args.cache)
    if args.synthesize:
        for flag in ("extra_data", "subset", "drop_noisy"):
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')}: not with --synthesize, which trains on no files; leave "
                                f"one out")
        if table.names != dirty_mnist.HEADER[1:] or bands != [1]:
            raise UserError(f"--synthesize {args.synthesize}: makes grey images of the classes a to z, the data's are "
                            f"others; leave it out, or see --data and --bands")
        side = images.size(table.files[0])[1]
        if side < dirty_mnist.LARGEST:
            raise UserError(f"{table.files[0]}: is {side} pixels high, and --synthesize makes letters of up to "
                            f"{dirty_mnist.LARGEST} in images of that size; leave it out")
        source = dirty_mnist.Synthetic(args.synthesize, args.synthesize_count, seed=args.seed, size=side,
                                       counts=tuple(args.letters_per_image), noise=args.noise,
                                       device=device if device.type == "cuda" else "cpu")
    else:
        source = cls.Images(files, answers, **options)
    train_data = cls.AugmentedImages(source, args.imgsz, seed=args.seed, rot90=args.rot90, flip=args.flip, degrees=args.degrees,
                           cutout=args.cutout, p_affine=args.p_affine)
    on_gpu = args.synthesize and device.type == "cuda"  # made there: no workers, and nothing to be pinned
    parts, batches = round(1 / args.val_interval), -(-len(train_data) // args.bs)
    parts = min(parts, batches) if args.debug else parts
    if parts > batches:
        raise UserError(f"--val-interval {args.val_interval:g}: of {len(train_data)} images that is less than a batch; "
                        f"raise it, or lower --bs")
    loader = train_loader(train_data, args.bs, workers=0 if on_gpu else args.workers, seed=args.seed,
                          device="cpu" if on_gpu else device, parts=parts, same=args.debug, collate=cls.collate,
                          weights=weights if set(weights) - {1.0} else None)

    # ---- net ----
    arch = dict(name=args.net, in_chans=len(bands), num_classes=len(table.names))
    drop = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    drop = {name: value for name, value in drop.items() if value is not None}
    if args.net.startswith("efficientnetv2"):
        drop = {"drop_rate": 0.5, "drop_path_rate": 0.2} | drop
    elif drop:
        raise UserError(f"--drop, --drop-path: {args.net} has neither; leave them out, or take an EfficientNetV2")
    model = backbones.make(**arch, **drop, grad_checkpoint=args.grad_checkpoint)
    if args.imgsz <= model.strides[-1] and args.bs == dist.world_size():
        raise UserError(f"--imgsz {args.imgsz} --bs {args.bs}: batch norm would see a single pixel; raise one of them")
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    frequencies = (table.labels if args.synthesize else answers).mean(0)
    first_guess(linear, frequencies, table.exclusive)
    if args.weights and not resume:
        with answers_for("--weights"):
            dist.print0(pretrained.describe(pretrained.load(model, args.weights)))
            if pretrained.classes(args.weights) not in (None, (table.names, table.exclusive)):
                first_guess(linear, frequencies, table.exclusive)
                dist.print0("weights: of other classes, the classifier begins anew")
    model = model.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.sync_batch_norm(model, device)

    # ---- loss ----
    norm = resume["norm"] if resume else pretrained.normalisation(args.weights, len(bands))

    def inputs(batch):
        return cls.to_input(batch, args.imgsz, scale, *norm)

    def mixed(batch):
        x, labels = inputs(batch), batch["label"]
        return mix.for_labels(x, labels, p_mixup=args.mixup, p_cutmix=args.cutmix, p_snapmix=args.snapmix,
                              heat=lambda: mix.heat(model, linear.weight, x, labels), p_gridmask=args.gridmask)

    def compute_loss(model, batch):
        x, labels = mixed(batch)
        logits = model(x)
        parts = {f"{name}_loss": LOSSES[name](logits, labels, args.label_smoothing) for name, _ in terms}
        return sum(weight * parts[f"{name}_loss"] for name, weight in terms), parts if len(parts) > 1 else {}

    # ---- validation ----
    if val:
        val_data = cls.AugmentedImages(cls.Images([table.files[i] for i in val], table.labels[val], **options), args.imgsz)
        val_loader = eval_loader(val_data, max(1, args.bs // dist.world_size()), workers=args.workers, device=device,
                                 collate=cls.collate)

    def judge(model):
        metric = metrics.Accuracy(len(table.names), exclusive=table.exclusive)
        for batch in val_loader:
            batch = engine.to_device(batch, device)
            logits = model(inputs(batch)).float()
            metric.update(logits.softmax(1) if table.exclusive else logits.sigmoid(), batch["label"], batch["index"])
        return metric.reduce()

    def evaluate(model):
        metric = judge(model)
        if not table.exclusive:  # a threshold per class; predict.py takes them from the checkpoint
            header["threshold"] = metric.best_thresholds()
        return metric.compute()

    if args.show_augment:
        if dist.rank() == 0:
            save_augmentations(folder / "augment.png", train_data, lambda batch: mixed(engine.to_device(batch, device)), table.names)
        return

    # ---- training ----
    if dist.rank() == 0:
        params = sum(p.numel() for p in model.parameters())
        print(f"{len(train_data)} images to train, {len(val)} to validate; {len(table.names)} classes; {params:,} "
              f"parameters; {device}")
        batch = engine.to_device(cls.collate([train_data[0, i] for i in range(16)]), device)
        shown = [sheets.to_rgb(image) for image in cls.to_input(batch, args.imgsz, scale)]
        sheets.contact_sheet(folder / "train_batch.png", [shown[i:i + 4] for i in range(0, 16, 4)])
    header = {"task": "cls", "arch": {"name": "backbones.make", "kwargs": arch}, "classes": table.names,
              "exclusive": table.exclusive, "bands": bands, "scale": scale, "norm": norm, "imgsz": args.imgsz,
              "args": vars(args), "threshold": (resume or {}).get("threshold")}
    state = engine.fit(model, loader, compute_loss=compute_loss, evaluate=evaluate if val else None, folder=folder,
                       header=header, device=device, resume=resume,
                       **training(args, folder, model, loader, part=1 / parts, eps=1e-6))
    if args.debug:
        engine.check_debug(state.history)
    if val:
        write_report(state, judge, table.names, folder, [table.files[i] for i in val], bands)


def split(args, folder, table):
    """Indices to train and to validate on; of the former those of --subset. Without --folds: the data's own validation
    images are held out, else a fifth; with --synthesize, which trains on none of the files, all are."""
    names = [os.path.relpath(path, args.data) for path in table.files]
    spec = folds.parse_folds(args.folds, names, table.held_out, args.fold)
    if args.synthesize and args.folds is None and not table.held_out:
        spec = dict.fromkeys(names, args.fold)
    train, val = folds.load_or_make_split(folder, names, spec, args.fold, files=table.files, groups=args.groups,
                              strata=cls.strata(table.labels), drop=args.drop_noisy, untrained=bool(args.synthesize))
    if args.subset and args.subset < len(train):
        chosen = cls.subset(table.labels[train], args.subset, seed=args.seed)
        smaller = [train[i] for i in chosen]
        change = table.labels[smaller].mean(0) - table.labels[train].mean(0)
        dist.print0(f"subset of {len(smaller)}: the classes' shares change by at most {np.abs(change).max():.4f}: "
                    + ", ".join(f"{name} {value:+.4f}" for name, value in zip(table.names, change)))
        train = smaller
    return train, val


def save_augmentations(path, data, mixed, names, samples=8, epochs=6):
    """A sheet of what is trained on: a row per image, a column per epoch; labels above 1 % are written below."""
    columns, captions = [], []
    for epoch in range(epochs):
        images, labels = mixed(cls.collate([data[epoch, i] for i in range(samples)]))
        columns.append([sheets.to_rgb(image) for image in images])
        captions.append([" ".join(name if share > 0.99 else f"{name} {share:.2f}" for name, share in zip(names, row)
                                  if share > 0.01) for row in labels.tolist()])
    sheets.contact_sheet(path, list(zip(*columns)), captions=list(zip(*captions)),
                           titles=[f"epoch {k + 1}" for k in range(epochs)])
    print(path)


def first_guess(linear, shares, exclusive):
    """The classifier starts with the classes' frequencies (Lin et al. 2017, section 3.3) and small weights: else it
    takes the first hundreds of steps to find that most letters are absent from most images, and a few classes' logits
    of EfficientNetV2's own start (timm's, for 1,000 classes) are far off."""
    shares = torch.as_tensor(shares).clamp(0.001, 0.999)
    torch.nn.init.normal_(linear.weight, 0, 0.01)
    linear.bias.data.copy_(shares.log() if exclusive else shares.logit())


def write_report(state, judge, names, folder, files, bands):
    """The run's last weights: class by class results.json, image by image samples.csv; the worst and the best images
    with labels and predictions, and scores by class, in review.png."""
    metric = engine.evaluate_on(state, judge)
    if dist.rank() == 0:
        scores, classes = metric.compute(), metric.per_class()
        samples = metric.samples(files, names)
        ends = [part for part in review.ends([row["score"] for row in samples]) if part]
        rows = [[sheets.to_rgb(images.read_picture(files[i], bands)) for i in part] for part in ends]
        captions = [[f"{samples[i]['labels']} > {samples[i]['predicted']}   {files[i].name}" for i in part]
                    for part in ends]
        review.sheet(folder / "review.png", rows, captions=captions,
                     tables={"Classes": [{"class": k} | row for k, row in zip(names, classes)]})
        review.keep(folder, [samples[i] for i in ends[0]], [[picture] for picture in rows[0]], captions[0])
        charts.write_csv(folder / "samples.csv", samples)
        write_json(folder / "results.json", {"last": scores, "classes": dict(zip(names, classes))})
        print("last epoch: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))


if __name__ == "__main__":
    cli(main)
