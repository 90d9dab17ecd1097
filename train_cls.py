"""Image classification, several classes an image or one: the EfficientNetV2 that won Dirty-MNIST, and beyond it.

    python train_cls.py                                        # ./resources/dirty_mnist_2nd{_answer.csv,/*.png}
    python train_cls.py --net efficientnetv2_m --weights timm:tf_efficientnetv2_m.in21k --bs 32 --accumulate 16
    python train_cls.py --synthesize resources/mnist_data/train.csv     # images made on the fly, never the same twice
    torchrun --nproc_per_node 4 train_cls.py --data photos --bands 1-3 --loss ce       # photos/train/CLASS/*.jpg
"""
import dataclasses
import os

import numpy as np
import torch

import nets
from data import cls, folds, images, units
from data.augment import mix, of_flags
from data.loader import eval_loader, train_loader
from data.samples import dirty_mnist
from nets import pretrained
from utils import losses
from utils.errors import UserError, answers_for, cli
from utils.files import write_json
from utils.metrics.classification import Accuracy
from utils.ops import decide
from utils.pictures import review, sheets
from utils.train import dist, engine
from utils.train.args import (add_shares, check_batch, class_weights, debug_sizes, float_range, int_range, loss_term,
                              setup_run, train_parser, training, weight_list, word)

# (logits (B, C), labels (B, C), smoothing=..., weight=...) -> mean over the batch
LOSSES = {"bce": losses.bce, "focal": losses.focal, "ce": losses.cross_entropy}


RECIPES = {  # defaults of flags: the competition's, and those for photographs
    "dirty-mnist": "--optimizer adam --weight-decay 1e-5 --cutout 0.5 --cutout-size 0.3 --rot90 --p-affine 0.5 "
                   "--degrees 15 --translate 0.0625 --zoom 0.9 1.1 --zoom-linear --border reflect",
    # a random resized crop of 35 to 100 % of the area, as `photos` of other libraries have it
    "photos": "--optimizer adamw --weight-decay 0.05 --cutout 0 --cutout-size 0.5 --no-rot90 --p-affine 1 --degrees 0 "
              "--translate 0 --zoom 1 1.7 --no-zoom-linear --border reflect --aspect 1.33 --crop-padding 1 --hflip 0.5 "
              "--hue 0.02 --saturation 0.3 --value 0.3",
}


def make_parser():
    parser = train_parser(__doc__, "cls", RECIPES, data="resources", epochs=30, bs=32, imgsz=384, lr=1e-3,
                          schedule="cosine", lr_floor=0.01)
    add = parser.add_argument_group("classification").add_argument
    add("--net", default="efficientnetv2_s", metavar="NAME", help=f"{', '.join(nets.NAMES)}, or mine.Mine: class "
        f"Mine in nets/mine.py")
    add("--labels", metavar="CSV", help="table of answers; without: see data/cls.py")
    add("--images", metavar="DIR", help="folder of that table's images")
    add("--columns", nargs="+", metavar="NAME", help="of that table: the column of the images' names, then that of the "
        "label, or those of the classes")
    add("--synthesize", metavar="CSV", help="train on Dirty-MNIST images made on the fly from these letters")
    add("--letters-per-image", type=int_range(1, 26), nargs=2, default=[10, 14], metavar="N", help="of --synthesize")
    add("--noise", type=int_range(0, 255), default=254, help="largest value of the background of --synthesize")
    add("--synthesize-count", type=int_range(1, 10**9), default=50000, help="images per epoch of --synthesize")
    add("--subset", type=int_range(2, 10**9), help="train on about so many samples, with the same share of every class")
    add("--val-interval", type=float_range(1e-4, 1), default=1.0, help="validate after this share of a pass over the "
        "data (1, 1/2, 1/3, ...), which is then shown as an epoch")
    add("--loss", type=loss_term(LOSSES), nargs="+", metavar="NAME[=WEIGHT]",
        help=f"sum of {', '.join(LOSSES)}; without: ce where every image has a single label, else bce (with single "
        f"labels, bce and focal find the class, but what predict.py makes of their logits are no probabilities)")
    add("--class-weights", type=weight_list, metavar="W,W", help="of each class in the loss; with several labels per "
        "image, of the images that have it; balanced: in inverse proportion to the classes' images")
    add("--drop", type=float_range(0, 0.99), help="EfficientNetV2: dropout before the classifier (0.5)")
    add("--drop-path", type=float_range(0, 0.99), help="EfficientNetV2: stochastic depth of the last block (0.2)")
    add_shares(add, {"cutmix": "probability that a batch gets boxes of other images"})
    return parser


def describe_net(args, in_chans, classes):
    """-> what `nets.build` makes the net of, and the checkpoint keeps; and what only training needs."""
    drop = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    drop = {name: value for name, value in drop.items() if value is not None}
    if args.net.startswith("efficientnetv2"):
        drop = {"drop_rate": 0.5, "drop_path_rate": 0.2} | drop
    elif drop:
        raise UserError(f"--drop, --drop-path: {args.net} has neither; leave them out, or take an EfficientNetV2")
    return {"name": args.net, "kwargs": {"in_chans": in_chans, "num_classes": classes}}, drop


def check_flags(args):
    """Refuses flags that are right alone and wrong together."""
    if args.synthesize:
        for flag in ("extra_data", "subset", "drop_noisy"):
            if getattr(args, flag):
                raise UserError(f"{word(flag)}: not with --synthesize, which trains on no files; leave one out")
    arch, drop = describe_net(args, 1, 2)
    with torch.device("meta"), answers_for("--net"):
        net = nets.build(arch, **drop)
    check_batch(args, args.imgsz, getattr(net, "strides", [1])[-1])


def load_samples(args, folder, resume):
    """-> the data (cls.Samples), the indices to validate on, the bands to read, and the training samples' files, labels
    and weights: how often each of them comes, beside the 1 of --data."""
    data = cls.read(args.data, table=args.labels, folder=args.images, columns=args.columns)
    data = data.usable(args.data, args.bands, args.allow_bad)
    bands = args.bands or images.default_bands(data.files)
    if resume:  # a run of an older version may have taken single labels for several
        data = data._replace(single_label=resume["single_label"])
    train, val = split(args, folder, data)
    folds.describe(args.data, f"{'one label' if data.single_label else 'several labels'} each, such as {data.files[0]}",
                   data.names, data.labels, (train, val))
    few, fewer = debug_sizes(args)
    train, val = folds.spread(train, few), folds.spread(val, fewer)
    files, labels, weights = [data.files[i] for i in train], data.labels[train], [1.0] * len(train)
    for more, weight in args.extra_data:
        extra = cls.with_names(cls.read(more, least=1).usable(more, bands, args.allow_bad), data, more)
        chosen = folds.spread(folds.without_copies(extra.files, [data.files[i] for i in val], more), few)
        files, labels = files + [extra.files[i] for i in chosen], np.concatenate((labels, extra.labels[chosen]))
        weights += [weight] * len(chosen)
    return data, val, bands, files, labels, weights


def split(args, folder, data):
    """Indices to train on, reduced to --subset, and to validate on. Without --folds: the data's own validation images
    are held out, else a fifth; with --synthesize, which trains on none of the files, all of them are."""
    names = [os.path.relpath(path, args.data) for path in data.files]
    spec = folds.parse_folds(args.folds, names, data.held_out, args.fold)
    if args.synthesize and args.folds is None and not any(data.held_out):
        spec = dict.fromkeys(names, args.fold)
    train, val = folds.load_or_make_split(folder, names, spec, args.fold, files=data.files, groups=args.groups,
                                          strata=cls.strata(data.labels), drop=args.drop_noisy,
                                          untrained=bool(args.synthesize))
    if args.subset and args.subset < len(train):
        smaller = [train[i] for i in cls.subset(data.labels[train], args.subset, seed=args.seed)]
        change = data.labels[smaller].mean(0) - data.labels[train].mean(0)
        dist.print0(f"subset of {len(smaller)}: the classes' shares change by at most {np.abs(change).max():.4f}: "
                    + ", ".join(f"{name} {value:+.4f}" for name, value in zip(data.names, change)))
        train = smaller
    return train, val


def synthetic_source(args, data, bands, device):
    """The Dirty-MNIST images of --synthesize, as large as those of the data."""
    if data.names != dirty_mnist.HEADER[1:] or bands != [1]:
        raise UserError(f"--synthesize {args.synthesize}: makes grey images of the classes a to z, the data's are "
                        f"others; leave it out, or see --data and --bands")
    side = images.size(data.files[0])[1]
    if side < dirty_mnist.LARGEST:
        raise UserError(f"{data.files[0]}: is {side} pixels high, and --synthesize makes letters of up to "
                        f"{dirty_mnist.LARGEST} in images of that size; leave it out")
    return dirty_mnist.Synthetic(args.synthesize, 8 * args.bs if args.debug else args.synthesize_count, seed=args.seed,
                                 size=side, counts=tuple(args.letters_per_image), noise=args.noise,
                                 device=device if device.type == "cuda" else "cpu")


def main():
    args, device, folder, resume = setup_run(make_parser(), check=check_flags, photographs=units.photographs, needs={
        "synthesize": ("letters_per_image", "noise", "synthesize_count")})

    # ---- samples ----
    data, val, bands, files, labels, weights = load_samples(args, folder, resume)
    names, single_label = data.names, data.single_label
    terms = args.loss or [("ce" if single_label else "bce", 1.0)]
    if not single_label and "ce" in dict(terms):
        raise UserError("--loss ce: is for a single label per image, this data has several; take bce or focal")
    options = dict(bands=bands, limit=2 * args.imgsz, cache=args.cache)
    source = synthetic_source(args, data, bands, device) if args.synthesize else cls.Images(files, labels, **options)
    changes = of_flags(vars(args))
    train_data = cls.AugmentedImages(source, args.imgsz, **changes, seed=args.seed, p_cutout=args.cutout,
                                     cutout_size=args.cutout_size)
    parts = min(round(1 / args.val_interval), -(-len(train_data) // args.bs))  # an epoch has a batch at least
    on_gpu = args.synthesize and device.type == "cuda"  # images are made there: no workers, no pinned memory
    loader = train_loader(train_data, args.bs, workers=0 if on_gpu else args.workers, seed=args.seed,
                          device="cpu" if on_gpu else device, parts=parts, weights=weights, collate=cls.collate)
    val_files = [data.files[i] for i in val]
    if val:
        val_data = cls.AugmentedImages(cls.Images(val_files, data.labels[val], **options), args.imgsz)
        val_loader = eval_loader(val_data, max(1, args.bs // dist.world_size()), workers=args.workers, device=device,
                                 collate=cls.collate)

    # ---- input ----
    with answers_for("--weights"):
        mean, std = pretrained.normalisation(not resume and args.weights, len(bands))
    inputs = cls.Input.of(resume, args.imgsz) if resume else cls.Input(
        bands, imgsz=args.imgsz, mean=mean, std=std, **units.choose(files or data.files, bands, args.pixel_scale))
    units.check(val_files, inputs)

    # ---- net ----
    arch, drop = describe_net(args, len(bands), len(names))
    model = nets.build(arch, **drop, grad_checkpoint=args.grad_checkpoint)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    answers = data.labels if args.synthesize else labels
    init_classifier(linear, answers, single_label)
    if args.weights and not resume:
        with answers_for("--weights"):
            dist.print0(pretrained.describe(pretrained.load(model, args.weights)))
            if pretrained.classes(args.weights) not in (None, (names, single_label)):
                init_classifier(linear, answers, single_label)
                dist.print0("weights: of other classes, the classifier starts anew")
    pretrained.freeze(model, args.freeze)
    state, options = training(args, folder, model, loader, device, part=1 / parts, eps=1e-6)

    # ---- loss ----
    counts = answers.sum(0).astype(int)
    per_class = class_weights(args, names, counts.tolist(), None if single_label else (len(answers) - counts).tolist())
    loss_options = {"smoothing": args.label_smoothing, "weight": per_class and torch.tensor(per_class, device=device)}

    def mixed(batch):
        return mix.for_labels(inputs(batch), batch["label"], p_mixup=args.mixup, p_cutmix=args.cutmix,
                              p_gridmask=args.gridmask)

    def compute_loss(model, batch):
        x, labels = mixed(batch)
        logits = model(x)
        parts = {f"{name}_loss": weight * LOSSES[name](logits, labels, **loss_options) for name, weight in terms}
        return sum(parts.values()), parts if len(parts) > 1 else {}

    def draw_augmented(epoch):  # labels above 1 % are written below
        samples = [train_data[i if epoch is None else (epoch, i)] for i in range(8)]
        batch = engine.to_device(cls.collate(samples), device)
        x, labels = (inputs(batch), batch["label"]) if epoch is None else mixed(batch)
        return [sheets.to_rgb(image) for image in x], [
            " ".join(name if share > 0.99 else f"{name} {share:.2f}" for name, share in zip(names, row) if share > 0.01)
            for row in labels.tolist()]

    # ---- validation ----
    def evaluate_metric(model):
        metric = Accuracy(len(names), single_label)
        for batch in val_loader:
            batch = engine.to_device(batch, device)
            probs = decide.classify(model, inputs, batch, single_label=single_label)
            metric.update(probs, batch["label"], batch["index"])
        return metric.reduce()

    def evaluate(model):
        metric = evaluate_metric(model)
        return metric.compute() | ({} if single_label else {"threshold": metric.best_thresholds()})  # one per class

    # ---- training ----
    if args.show_augment:
        return sheets.augmentation_sheet(folder, draw_augmented, changes)
    if dist.is_main():
        print(f"{len(train_data)} images to train, {len(val)} to validate; {len(names)} classes")
        batch = engine.to_device(cls.collate([train_data[0, i] for i in range(16)]), device)
        sheets.contact_sheet(folder / "train_batch.png", sheets.in_rows([sheets.to_rgb(x) for x in inputs(batch)], 4))
    header = {"task": "cls", "arch": arch, "classes": names, "single_label": single_label,
              "input": dataclasses.asdict(inputs), "args": vars(args)}
    engine.fit(state, loader, compute_loss, evaluate if val else None, folder=folder, header=header, resume=resume,
               **options)
    if val:
        write_report(state, evaluate_metric, names, folder, val_files, bands)


def init_classifier(linear, answers, single_label):
    """The classifier starts with the classes' frequencies in the answers (N, classes) as biases (Lin et al. 2017,
    section 3.3) and small weights. Otherwise the first hundreds of steps only learn that most letters are absent from
    most images, and for a few classes the logits of EfficientNetV2's own initialisation (timm's, for 1,000 classes) are
    far off."""
    shares = torch.as_tensor(answers.mean(0)).clamp(0.001, 0.999)
    torch.nn.init.normal_(linear.weight, 0, 0.01)
    linear.bias.data.copy_(shares.log() if single_label else shares.logit())


def write_report(state, evaluate_metric, names, folder, files, bands):
    """Evaluates the run's last weights: results.json, class by class; samples.csv, a row per image; review.png, the
    worst and the best images with labels and predictions, and scores by class."""
    metric = engine.evaluate_on(state, evaluate_metric)
    if dist.is_main():
        scores, classes = metric.compute(), metric.per_class()
        review.write_review(
            folder, metric.samples(files, names), across=4,
            draw=lambda chosen: [[sheets.to_rgb(images.read_picture(files[i], bands))] for i in chosen],
            caption=lambda row: f"{row['labels']} > {row['predicted']}   {os.path.basename(row['name'])}",
            tables={"Classes": [{"class": k} | row for k, row in zip(names, classes)]})
        write_json(folder / "results.json", {"last": scores, "classes": dict(zip(names, classes))})
        print(f"last epoch: {engine.line(scores)}")


if __name__ == "__main__":
    cli(main)
