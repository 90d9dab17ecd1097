"""Object detection: the YOLOv5 system that took 2nd place in the 2022 AI Challenge (parking lots), and beyond it.

    python train_det.py                                               # ./DATA/train/{images,label/Train.json}
    torchrun --nproc_per_node 4 train_det.py --imgsz 1280 --variant s6 --bs 64
    python train_det.py --data coco.json --variant m --weights yolov5:yolov5m
    python train_det.py --variant x6 --imgsz 1280 --bs 2 --accumulate 32 --weights yolov5:yolov5x6 \
        --stages 50,15 --epoch-parts 15 --image-weights --folds 0      # the competition's two stages
"""
import dataclasses
import math
import os
import sys
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace

import numpy as np
import torch
import torch.nn.functional as F

import nets
from data import det, folds, images, labels, units
from data.augment import mix, of_flags
from data.loader import eval_loader, train_loader
from nets import pretrained
from nets.yolo import BINS, VARIANTS
from utils.errors import UserError, answers_for, cli
from utils.files import folder_of, write_json
from utils.losses import detection as losses
from utils.metrics.average_precision import AREAS, DetectionAP
from utils.ops import anchors, decide
from utils.ops.boxes import confident
from utils.pictures import detection as pictures, review, sheets
from utils.train import dist, engine, optim
from utils.train.args import (begin_run, check_batch, debug_sizes, float_range, fraction, int_range, positive,
                              setup_run, train_parser, training, word)

YOLO = "yolo.YOLOv5"
RECIPES = dict.fromkeys(("parking-lots", "photos"), "--hflip 0.5 --zoom-linear")  # --preset has all other defaults
GAINS = {  # per head: weights of the parts of the loss
    "free": dict(box=7.5, dfl=1.5, obj=1.0, cls=0.5),
    "anchor": dict(box=0.05, dfl=1.5, obj=1.0, cls=0.5),
}
IDLE = {  # per head: flags without effect
    "free": ("obj", "obj_pw", "cls_pw", "label_smoothing", "anchor_threshold", "autoanchor"),
    "anchor": ("dfl",),
}
VALIDATION = dict(conf=0.001, iou=0.65, max_det=300)
NEEDS = {"tile": ("overlap",), "mosaic": ("mixup", "close_mosaic"),
         "warmup_epochs": ("warmup_bias_lr", "warmup_momentum")}
COMMON = dict(obj_pw=1.0, cls_pw=1.0, label_smoothing=0.0, anchor_threshold=4.0, autoanchor=True,
              hue=0.015, saturation=0.7, value=0.4, translate=0.1, zoom=[0.5, 1.5])
PRESETS = {
    "default": COMMON | dict(
        head="free", optimizer="adamw", lr=2e-3, lr_floor=0.01, schedule="flat", momentum=0.9, weight_decay=0.05,
        warmup_epochs=2.0, warmup_bias_lr=0.0, warmup_momentum=0.9),
    # the competition's two stages, with the anchor head of its published weights
    "scratch-low": COMMON | dict(
        head="anchor", optimizer="sgd", lr=0.01, lr_floor=0.01, schedule="linear", momentum=0.937, weight_decay=5e-4,
        warmup_epochs=3.0, warmup_bias_lr=0.1, warmup_momentum=0.8),
    "finetune": COMMON | dict(
        head="anchor", optimizer="sgd", lr=0.0032, lr_floor=0.12, schedule="linear", momentum=0.843,
        weight_decay=3.6e-4, warmup_epochs=2.0, warmup_bias_lr=0.05, warmup_momentum=0.5, box=0.0296, obj=0.301,
        obj_pw=0.911, cls=0.243, cls_pw=0.631, anchor_threshold=2.91, hue=0.0, saturation=0.0, zoom=[0.1, 1.9]),
}


def make_parser():
    parser = train_parser(__doc__, "det", RECIPES, data="DATA", epochs=50, bs=16, imgsz=640)
    add = parser.add_argument_group("detection").add_argument
    add("--preset", choices=PRESETS, default="default", help="our recipe, or a stage of the competition's recipe")
    add("--stages", type=stage_list, metavar="N,N", help="two runs: N epochs of scratch-low, then N epochs of finetune "
        "from the last weights of the first run")
    add("--net", default=YOLO, metavar="NAME", help="mine.Mine: class Mine in nets/mine.py, see nets/yolo.py")
    add("--variant", choices=VARIANTS, help="of YOLOv5; variants with a 6 are for --imgsz 1280; without: that of "
        "--weights")
    add("--head", choices=GAINS, help="free: anchor-free, decoupled; anchor: YOLOv5's own, the default for its weights")
    add("--tile", type=int_range(32, 65536), help="larger images are trained on in windows of this side, at full "
        "resolution, and validated as predict.py --tile predicts them")
    add("--overlap", type=float_range(0, 0.9), default=0.25, help="of neighbouring windows")
    add("--epoch-parts", type=positive, default=1, help="an epoch is one of this many parts of the data")
    add("--image-weights", action=BooleanOptionalAction, default=False, help="draw images with rare classes more often")
    add("--multi-scale", type=float_range(0, 0.9), default=0.0, help="every batch at a random size, 1 - F to 1 "
        "+ F times --imgsz")
    add("--autoanchor", action=BooleanOptionalAction, help="fit new anchors where the net's anchors do "
        "not fit the data (anchor)")
    add("--mosaic", type=fraction, default=1.0, help="probability; --mixup blends two mosaics")
    add("--close-mosaic", type=int_range(0), default=0, help="number of last epochs without mosaic")
    add = parser.add_argument_group("loss").add_argument
    for name, what in {"box": "the boxes' CIoU", "dfl": "the distances' distributions (free)",
                       "obj": "the objectness (anchor)", "cls": "the classes",
                       "obj-pw": "positives in the objectness (anchor)",
                       "cls-pw": "positives in the classes (anchor)"}.items():
        add(f"--{name}", type=float_range(0), help=f"weight of {what}")
    add("--anchor-threshold", type=float_range(1, 100), help="largest ratio of a box's side to its anchor's (anchor)")
    add("--warmup-bias-lr", type=float_range(0, 10), help="learning rate of the biases at the start")
    add("--warmup-momentum", type=float_range(0, 0.9999), help="momentum at the start")
    # the preset gives the defaults, which --help shows
    known, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    if known.stages:
        known.preset = "scratch-low"
        parser.set_defaults(preset=known.preset, epochs=known.stages[0])
    # --head changes the default gains; it is no default itself: the table of runs shows it
    defaults = recipe(known.preset, known.head)
    follows = not known.head and known.preset == "default"
    kwargs = {"head": None}
    if known.weights and known.net == YOLO and (follows or not known.variant):
        try:
            kwargs = pretrained.checkpoint(known.weights, "det")["arch"]["kwargs"]
        except UserError:  # not a whole YOLOv5; pretrained.load tells whether it is the trunk of the given variant
            if not known.variant or not os.path.isfile(known.weights):  # the ranks must not differ in the head
                raise
    if follows and "head" not in kwargs:  # YOLOv5's head, trained, is better than a new one
        defaults = recipe(known.preset, "anchor") | {"head": "anchor"}
    parser.set_defaults(**defaults, variant=kwargs.get("variant", "s"))
    return parser


def recipe(preset, head=None):
    """-> {flag: value} of a preset, with the gains for its own head or for another one."""
    values = PRESETS[preset]
    # the gains in the presets are for the anchor head
    return values | GAINS["free"] if (head or values["head"]) == "free" else GAINS["anchor"] | values


def stage_list(text):
    """argparse type: "50,15" -> [50, 15]."""
    try:
        first, second = map(positive, text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text} is not two numbers of epochs; write 50,15") from None
    return [first, second]


def describe_net(args, num_classes, in_chans):
    """-> what `nets.build` makes the net of, and the checkpoint keeps."""
    kwargs = dict(num_classes=num_classes, in_chans=in_chans)
    if args.net == YOLO:
        kwargs |= dict(variant=args.variant, head=args.head)
    return {"name": args.net, "kwargs": kwargs}


def check_flags(args):
    """Refuses flags that have no effect beside the others, or that are wrong together."""
    usual = recipe(args.preset, args.head)
    for flag in IDLE[args.head]:
        if vars(args)[flag] != usual[flag]:
            raise UserError(f"{word(flag)}: does nothing for --head {args.head}; leave it out, or choose the other "
                            f"head")
    if args.border != ["constant"]:
        raise UserError("--border: mirrored objects would have no boxes; leave it out")
    if args.stages and args.resume is None and (args.preset, args.epochs) != ("scratch-low", args.stages[0]):
        flag = "--epochs" if args.preset == "scratch-low" else "--preset"
        raise UserError(f"{flag}: does nothing with --stages, which tells the epochs of two presets; leave one out")
    with torch.device("meta"), answers_for("--net:"):
        stride = nets.build(describe_net(args, num_classes=1, in_chans=3)).stride
    if args.net != YOLO and args.variant != "s":
        raise UserError(f"--variant: does nothing for --net {args.net}; leave it out")
    if args.imgsz % stride:
        raise UserError(f"--imgsz {args.imgsz}: not a multiple of the net's stride {stride}; take "
                        f"{-(-args.imgsz // stride) * stride}")
    check_batch(args, int(args.imgsz * (1 - args.multi_scale)), 2 * stride - 1)


def main():
    parser = make_parser()
    args, device, folder, resume = setup_run(parser, needs=NEEDS, check=check_flags, photographs=units.photographs)
    first_stage = args.stages and args.preset == "scratch-low" and not args.show_augment
    # torchrun may have restarted this script in the second stage
    if not (first_stage and resume and len(resume["history"]) >= args.epochs):
        experiment(args, device, folder, resume)
    if first_stage:
        args, folder, resume = begin_run(parser, second_stage(args, folder))
        experiment(args, device, folder, resume)


def second_stage(args, folder):
    """The flags of the run that goes on from the last weights in `folder`, the first stage's. A flag that differs from
    the first stage's recipe was given by the user and is kept."""
    before, after = recipe("scratch-low", args.head), recipe("finetune", args.head)
    changed = {flag: value for flag, value in after.items() if vars(args)[flag] == before[flag]}
    changed |= dict(preset="finetune", epochs=args.stages[1], image_weights=False, weights=str(folder / "last.pt"),
                    project=str(folder.parent), name=f"{folder.name}-finetune", resume=None)
    return Namespace(**vars(args) | changed)


def experiment(args, device, folder, resume):
    """One run, from the labels to the results of the last epoch."""
    # ---- samples ----
    data, val, samples = load_samples(args, folder)
    names, files = data.names, [sample.file for sample in val]
    bands = args.bands or images.default_bands(data.files)
    reading = dict(bands=bands, imgsz=args.imgsz, cache=args.cache)
    samples = det.cut(samples, args.tile, args.overlap)
    changes = of_flags(vars(args))
    train_data = det.DetData(samples, **changes, seed=args.seed, mosaic=args.mosaic, mixup=args.mixup,
                             close_mosaic=args.epochs - args.close_mosaic, **reading)
    loader = train_loader(train_data, args.bs, workers=args.workers, seed=args.seed, device=device,
                          parts=args.epoch_parts, weights=draw_weights(samples, args.image_weights),
                          collate=det.collate)

    # ---- net ----
    inputs = det.Input.of(resume, args.imgsz) if resume else det.Input(bands, imgsz=args.imgsz, **units.choose(
        list(dict.fromkeys(train_data.files)), bands, args.pixel_scale, clamped=True))
    units.check(files, inputs)
    arch = describe_net(args, len(names), len(bands))
    model = nets.build(arch, grad_checkpoint=args.grad_checkpoint)
    if args.weights and not resume:
        if dist.is_main():  # other machines need not have the file: the first stage's lies on one
            with answers_for("--weights"):
                print(pretrained.describe(pretrained.load(model, args.weights)))
        dist.same_weights(model)
    pretrained.freeze(model, args.freeze)
    if args.head == "anchor" and args.autoanchor and not resume:
        fit_anchors(model.head, samples, args)
    state, options = start_training(args, folder, model, loader, device)

    # ---- loss ----
    levels = 3 / len(model.strides)  # the anchor head's gains are for 3 levels, 80 classes and 640 pixels
    gains = dict(box=args.box * levels, obj=args.obj * (args.imgsz / 640) ** 2 * levels,
                 cls=args.cls * len(names) / 80 * levels)

    def augmented(batch):  # -> the net's input in training
        x = inputs(batch["image"], colour=batch["colour"])
        return mix.random_erase(x, p_gridmask=args.gridmask, p_cutout=args.cutout, cutout_size=args.cutout_size)

    def draw_augmented(epoch):
        data = det.DetData(samples, mosaic=0.0, **reading) if epoch is None else train_data
        batch = det.collate([data[epoch or 0, i] for i in range(5)])
        x = (augmented(batch) * 255).byte()  # bytes are not stretched, so that brightness can be compared
        return [pictures.draw_boxes(sheets.to_rgb(image), rows, names)
                for image, rows in zip(x, det.gt_boxes(batch))], [""] * len(x)

    def compute_loss(net, batch):
        x, boxes = augmented(batch), batch["boxes"]
        if args.multi_scale:
            x, boxes = random_size(x, boxes, args.multi_scale, model.stride)
        maps = net(x)
        if args.head == "free":
            return losses.free_loss(maps, boxes, model.strides, BINS, box=args.box, dfl=args.dfl, cls=args.cls)
        return losses.anchor_loss(maps, boxes, model.head.anchors, model.strides, threshold=args.anchor_threshold,
                                  obj_pw=args.obj_pw, cls_pw=args.cls_pw, smoothing=args.label_smoothing,
                                  **gains)

    # ---- validation ----
    if val:
        gt_boxes = [torch.from_numpy(sample.boxes).float() for sample in val]
        val_data = det.TiledImages(files, gt_boxes, stride=model.stride, tile=args.tile, overlap=args.overlap,
                                   **reading)
        val_loader = eval_loader(val_data, max(1, args.bs // dist.world_size()), shapes=val_data.shapes,
                                 workers=args.workers, device=device, collate=det.collate)

    def average_precision(model):  # -> DetectionAP, in pixels of the files, on every rank
        def predict(batch):
            x = inputs(engine.to_device(batch, device)["image"])
            found = decide.detect(model, x, **VALIDATION)
            if 0 in batch["index"]:
                pictures.detection_sheet(folder / "val.png", x, det.gt_boxes(batch), found, names=names)
            return [found]

        metric = DetectionAP(len(names))
        found = val_data.detect(val_loader, predict, iou=VALIDATION["iou"], max_det=VALIDATION["max_det"])
        metric.update(found, [rows.roll(-1, 1) for rows in gt_boxes])
        return metric

    def evaluate(model):
        metric = average_precision(model)
        threshold, _ = metric.best_threshold()
        return metric.compute() | {"threshold": decide.THRESHOLD["det"] if math.isnan(threshold) else threshold}

    # ---- training ----
    if args.show_augment:
        return sheets.augmentation_sheet(folder, draw_augmented, changes)
    if dist.is_main():
        print(f"{len(train_data)} images with {sum(len(sample.boxes) for sample in samples)} boxes to train, "
              f"{len(val)} to validate; {len(names)} classes")
        batch = det.collate([train_data[0, i] for i in range(min(args.bs, 8))])
        pictures.detection_sheet(folder / "train_batch.png", augmented(batch), det.gt_boxes(batch), names=names)
    header = {"task": "det", "arch": arch, "classes": names, "category_ids": data.category_ids,
              "input": dataclasses.asdict(inputs), "args": vars(args)}
    engine.fit(state, loader, compute_loss, evaluate if val else None, folder=folder, header=header, resume=resume,
               **options)
    if val:
        write_report(state, average_precision, names, folder, files, bands)


def load_samples(args, folder):
    """-> the labels (data.labels.Labels), the samples to validate on, and the samples to train on (det.Sample).
    Without --folds: the data's own validation images, else a fifth. The folds are stratified by the rarest class of an
    image."""
    data = labels.usable(args.data, labels.read(args.data, allow_bad=args.allow_bad), args.bands, args.allow_bad)
    keys = [os.path.relpath(file, folder_of(args.data)) for file in data.files]
    per_class = [np.bincount(classes, minlength=len(data.names)) for classes in data.classes]
    count = np.sum(per_class, 0)
    rarest = [int(c[count[c].argmin()]) if len(c) else -1 for c in data.classes]
    spec = folds.parse_folds(args.folds, keys, data.held_out, args.fold)
    train, val = folds.load_or_make_split(folder, keys, spec, args.fold, files=data.files, strata=rarest,
                                          groups=args.groups, drop=args.drop_noisy)
    folds.describe(args.data, data.layout, data.names, per_class, (train, val))
    few, fewer = debug_sizes(args)
    samples, val = det.samples(data, folds.spread(train, few)), det.samples(data, folds.spread(val, fewer))
    for more, weight in args.extra_data:
        extra = labels.usable(more, labels.read(more, allow_bad=args.allow_bad), args.bands, args.allow_bad)
        extra = labels.with_names(extra, data.names, more)
        chosen = folds.without_copies(extra.files, [sample.file for sample in val], more)
        samples += det.samples(extra, folds.spread(chosen, few), weight)
    return data, val, samples


def start_training(args, folder, model, loader, device):
    """-> what `utils.train.args.training` returns, with YOLOv5's learning rates and warm-up."""
    # YOLOv5's rates are for a sum over the images of a step, its weight decay for 64 of them; the loss here is a mean.
    # The steps of Adam do not depend on the size of the loss, except by eps and by a decay that is part of the gradient
    count = args.bs * args.accumulate
    rate = count if args.optimizer == "sgd" else 1
    state, options = training(args, folder, model, loader, device, lr_factor=rate, eps=1e-8 / count,
                              decay_divisor={"sgd": 64, "adam": count}.get(args.optimizer, 1))
    optim.warm_up(state.optimizer, round(args.warmup_epochs * -(-len(loader) // args.accumulate)),
                  bias_lr=args.warmup_bias_lr * rate, momentum=args.warmup_momentum)
    return state, options


def draw_weights(samples, image_weights):
    """How often each sample is drawn: by its weight, and with --image-weights by `class_balance`."""
    weights = np.array([sample.weight for sample in samples])
    if image_weights:
        weights *= class_balance([sample.boxes[:, 0] for sample in samples])
    return weights


def class_balance(classes):
    """How often each image is to be drawn: classes, an (n,) array per image -> (images,), the sum over the boxes of an
    image of 1 / (number of boxes of that class in all images). So all classes weigh the same in total."""
    found, counts = np.unique(np.concatenate(classes), return_counts=True)
    weights = np.array([(1 / counts[np.searchsorted(found, c)]).sum() for c in classes])
    return weights + min(weights[weights > 0], default=1) / 10  # images without boxes are drawn too


def random_size(x, boxes, change, stride):
    """Images (B, C, side, side) and boxes (n, 6) resized to a random multiple of the stride, 1 - change to 1 + change
    of their side, the same on all ranks."""
    low, high = (int(x.shape[2] * (1 + f * change)) // stride for f in (-1, 1))
    side = dist.broadcast(int(torch.randint(max(low, 1), high + 1, ()))) * stride
    factors = boxes.new_tensor([1, 1] + [side / x.shape[2]] * 4)
    return F.interpolate(x, (side, side), mode="bilinear"), boxes * factors


def fit_anchors(head, samples, args):
    """Gives the head anchors that fit the boxes of the samples as the net sees them, where its own do not."""
    strides = torch.tensor(head.strides)[:, None, None]
    wh = [(sample.boxes[:, 3:] - sample.boxes[:, 1:3]) * args.imgsz / max(sample.size) for sample in samples]
    pixels, line = anchors.auto(np.concatenate(wh), (head.anchors * strides).numpy(), threshold=args.anchor_threshold,
                                seed=args.seed)
    head.anchors.copy_(torch.as_tensor(pixels) / strides)
    dist.print0(line)


def draw_sample(file, bands, truth, found, names):
    """-> an image, at most 1920 pixels wide and high, with its labels drawn in, and with its detections drawn in."""
    image, zoom = images.thumbnail(file, bands, 1920)  # a larger scene may be too large to be read
    rgb = sheets.to_rgb(image)
    return [pictures.draw_boxes(rgb, rows, names, zoom) for rows in (truth, found)]


def make_tables(scores, classes, names):
    """The results -> {title: rows} for `review.write_review`: AP and number of boxes by class, AP by area."""
    by_class = [{"class": pictures.class_name(names, k), "AP": c["ap"], "AP50": c["ap50"], "boxes": c["truths"]}
                for k, c in enumerate(classes)]
    by_area = [{"size": name.removeprefix("ap_"), "AP": scores[name]} for name in AREAS if name != "ap"]
    return {"Classes": by_class, "Boxes by area": by_area}


def write_report(state, average_precision, names, folder, files, bands):
    """Evaluates the last weights of the run class by class (results.json) and image by image (samples.csv; the
    worst and the best images and tables in review.png)."""
    metric = engine.evaluate_on(state, average_precision)
    if not dist.is_main():
        return
    scores, classes, (threshold, f1) = metric.compute(), metric.per_class(), metric.best_threshold()
    write_json(folder / "results.json", {
        "last": scores, "best F1": {"score threshold": threshold, "f1": f1}, "classes": dict(zip(names, classes))})

    def draw(chosen):
        return [draw_sample(files[i], bands, metric.gt_boxes[i], confident(metric.detections[i], threshold), names)
                for i in chosen]

    review.write_review(folder, metric.samples(files), draw, tables=make_tables(scores, classes, names),
                        titles=("labels", "detections"), max_side=640)
    print(f"last epoch: {engine.line(scores)}")
    for name, c in zip(names, classes):
        print(f"  {name}: AP {c['ap']:.3f}  AP50 {c['ap50']:.3f}  {c['truths']} boxes")


if __name__ == "__main__":
    cli(main)
