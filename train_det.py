"""Object detection: the YOLOv5 system that took 2nd place in the 2022 AI Challenge (parking lots), and beyond it.

    python train_det.py                                               # ./DATA/train/{images,label/Train.json}
    torchrun --nproc_per_node 4 train_det.py --imgsz 1280 --variant s6 --bs 64
    python train_det.py --data coco.json --variant m --weights yolov5:yolov5m --head anchor
    python train_det.py --variant x6 --imgsz 1280 --bs 2 --accumulate 32 --weights yolov5:yolov5x6 \
        --stages 50,15 --epoch-parts 15 --image-weights --folds 0      # the competition's two stages
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import augment, det, folds, images, labels, mix
from data.loader import eval_loader, train_loader
from nets import pretrained
from nets.yolo import BINS, VARIANTS, YOLOv5
from utils import metrics
from utils.losses import detection as losses_det
from utils.ops import anchors, boxes
from utils.train import dist, engine, optim
from utils.pictures import charts, detection as pictures_det, review, sheets, table
from utils.train import runs
from utils.train.args import float_range, setup_run, train_parser, training, int_range
from utils.metrics.average_precision import AREAS
from utils.errors import UserError, answers_for, cli
from utils.files import write_json

GAINS = {  # per head: weights of the loss's parts
    "free": dict(box=7.5, dfl=1.5, obj=1.0, cls=0.5),
    "anchor": dict(box=0.05, dfl=1.5, obj=1.0, cls=0.5),
}
IDLE = {  # per head: flags without effect
    "free": ("obj", "obj_pw", "cls_pw", "label_smoothing", "focal_gamma", "anchor_threshold", "autoanchor"),
    "anchor": ("dfl",),
}
NEEDS = {"tile": ("overlap",), "mosaic": ("mixup", "grid", "close_mosaic"),
         "warmup_epochs": ("warmup_bias_lr", "warmup_momentum")}
COMMON = dict(obj_pw=1.0, cls_pw=1.0, anchor_threshold=4.0, hsv=[0.015, 0.7, 0.4], translate=0.1, scale=0.5)
SECOND = "second-stage.json"  # in its folder
PRESETS = {
    "default": COMMON | dict(head="free", optimizer="adamw", lr=2e-3, lr_floor=0.01, schedule="flat", momentum=0.9,
                             weight_decay=0.05, warmup_epochs=2.0, warmup_bias_lr=0.0, warmup_momentum=0.9),
    # the competition's two stages, with the anchor head that its weights were made for
    "scratch-low": COMMON | dict(
        head="anchor", optimizer="sgd", lr=0.01, lr_floor=0.01, schedule="linear", momentum=0.937, weight_decay=5e-4,
        warmup_epochs=3.0, warmup_bias_lr=0.1, warmup_momentum=0.8),
    "finetune": COMMON | dict(
        head="anchor", optimizer="sgd", lr=0.0032, lr_floor=0.12, schedule="linear", momentum=0.843,
        weight_decay=3.6e-4, warmup_epochs=2.0, warmup_bias_lr=0.05, warmup_momentum=0.5, box=0.0296, obj=0.301,
        obj_pw=0.911, cls=0.243, cls_pw=0.631, anchor_threshold=2.91, hsv=[0.0, 0.0, 0.4], scale=0.9),
}


def parse_args():
    parser = train_parser(__doc__.splitlines()[0], "det", data="DATA", epochs=50, bs=16, imgsz=640, folds=None)
    add = parser.add_argument_group("detection").add_argument
    add("--preset", choices=PRESETS, default="default", help="recipe: ours, or a stage of the competition's")
    add("--stages", type=stage_list, metavar="N,N",
        help="epochs of scratch-low, then of finetune from its last weights, as two runs")
    add("--variant", choices=VARIANTS, default="s", help="of the net; those with a 6 are for --imgsz 1280")
    add("--head", choices=("free", "anchor"), help="free: anchor-free, decoupled; anchor: YOLOv5's own")
    add("--allow-bad-labels", action="store_true", help="go on when more than 1 %% of the boxes had to be dropped")
    add("--tile", type=int_range(32, 65536), help="larger images are learned in windows of this side, at full resolution, "
        "and validated as predict.py --tile goes through them")
    add("--overlap", type=float_range(0, 0.9), default=0.25, help="of neighbouring windows")
    add("--epoch-parts", type=int_range(1, 10**6), default=1, help="an epoch is one of so many parts of the data")
    add("--image-weights", action="store_true", help="images with rare classes come more often")
    add("--multi-scale", type=float_range(0, 0.9), default=0.0, help="batches at 1 - F to 1 + F times --imgsz")
    add("--autoanchor", action=BooleanOptionalAction, default=True,
        help="new anchors where the net's do not fit the data (anchor)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--mosaic", type=float_range(0, 1), default=1.0, help="probability")
    add("--grid", type=int, choices=(4, 9), default=4, help="images in a mosaic")
    add("--close-mosaic", type=int_range(0), default=0, help="last epochs without mosaic")
    add("--hsv", type=float_range(0, 1), nargs=3, metavar=("H", "S", "V"), help="largest change of hue, saturation, value")
    add("--degrees", type=float_range(0, 180), default=0.0, help="largest rotation")
    add("--translate", type=float_range(0, 1), help="largest shift, share of the size")
    add("--scale", type=float_range(0, 0.99), help="zoom, 1 - F to 1 + F")
    add("--shear", type=float_range(0, 80), default=0.0, help="degrees")
    add("--flip-ud", type=float_range(0, 1), default=0.0, help="probability")
    add("--flip-lr", type=float_range(0, 1), default=0.5, help="probability")
    add = parser.add_argument_group("loss").add_argument
    for name, what in {"box": "of the boxes' CIoU", "dfl": "of the distances' distribution (free)",
                       "obj": "of objectness (anchor)", "cls": "of the classes"}.items():
        add(f"--{name}", type=float_range(0), help=f"weight {what}")
    add("--obj-pw", type=float_range(0), help="weight of positives in objectness (anchor)")
    add("--cls-pw", type=float_range(0), help="weight of positives in the classes (anchor)")
    add("--anchor-threshold", type=float_range(1, 100), help="largest ratio of a box's side to its anchor's (anchor)")
    add("--focal-gamma", type=float_range(0, 10), default=0.0, help="focal loss; 0: cross-entropy (anchor)")
    add("--warmup-bias-lr", type=float_range(0, 10), help="learning rate of the biases at the start")
    add("--warmup-momentum", type=float_range(0, 0.9999), help="momentum at the start")
    # without the flag for help: that is to show the recipe's values
    known, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    preset = "scratch-low" if known.stages else known.preset
    # another head changes the gains' defaults, and is none itself: the table of runs is to show it
    parser.set_defaults(**recipe(preset, known.head) | {"head": PRESETS[preset]["head"]})
    for flag in ("epochs", "preset"):
        if known.stages and known.resume is None and vars(known)[flag] != parser.get_default(flag):
            raise UserError(f"--{flag}: does nothing with --stages, which tells the epochs of two presets; leave one "
                            f"of them out")
    return setup_run(parser, needs=NEEDS)


def recipe(preset, head=None):
    """The values of a preset, for its own head or for another one: {flag: value}."""
    values = PRESETS[preset] | ({"head": head} if head else {})
    if values["head"] == "free":
        return values | GAINS["free"]  # the competition's own gains are the anchor head's
    return GAINS["anchor"] | values


def stage_list(text):
    """argparse type: "50,15" -> [50, 15]."""
    try:
        first, second = map(int_range(1, 10**6), text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not two numbers of epochs; write 50,15") from None
    return [first, second]


def main():
    args, device, folder, resume = parse_args()
    again = dist.broadcast(dist.rank() == 0 and second_stage(folder))
    if again:
        vars(args).update(again)
        dist.print0(f"restarted in the second stage: {folder / SECOND} holds, not the command line")
    both = args.stages and not ((resume or again) and args.preset == "finetune")  # else the second stage goes on
    if both:
        stages = [args.epochs] * 2 if args.debug else args.stages
        longer = resume and resume["args"]["epochs"] != args.epochs  # --resume --epochs
        args.preset, args.epochs = "scratch-low", args.epochs if longer else stages[0]
    experiment(args, device, folder, resume)
    if both and not args.show_augment:
        before, after = recipe("scratch-low", args.head), recipe("finetune", args.head)
        # a flag that differs from the first stage's recipe was asked for, and stays
        changed = {k: v for k, v in after.items() if vars(args)[k] == before[k]}
        changed |= {"preset": "finetune", "epochs": stages[1], "image_weights": False,
                    "weights": str(folder / "last.pt")}
        second = runs.new_folder(f"{folder}-finetune", "--project")
        if dist.rank() == 0:
            write_json(second / SECOND, vars(args) | changed)
            for file in (folder / "run.json", folder / "dropped.json"):
                if file.exists():
                    shutil.copyfile(file, second / file.name)
        experiment(argparse.Namespace(**vars(args) | changed), device, second, None)


def second_stage(folder):
    """The second stage's flags, where this is its folder and torchrun has restarted the command that began it: what
    stands there is for the first stage. None where a user resumes it: then the command line is for this one."""
    path = folder / SECOND
    if not path.exists():
        return None
    flags = json.loads(path.read_text())
    # a lock names the torchrun that works in its folder; who began the second stage has worked in the first's
    first = Path(flags["weights"]).with_name("lock")
    return flags if runs.launcher() and first.exists() and first.read_text() == runs.launcher() else None


def experiment(args, device, folder, resume):
    """One run, from the labels to the last epoch's results; the competition's two stages are two of them."""
    engine.seed_everything(args.seed, args.deterministic)
    if dist.rank() == 0 and not resume:
        write_json(folder / "args.json", vars(args))  # of a second stage, what has changed too

    if args.grid == 9 and (args.degrees or args.shear):  # pictures at its sides would cover others' objects
        raise UserError("--grid 9: not with --degrees or --shear; take --grid 4")
    usual = recipe(args.preset, args.head) | dict(label_smoothing=0.0, focal_gamma=0.0, autoanchor=True)
    stored = resume["args"] if resume else {}  # of an older version, which took such flags
    for flag in IDLE[args.head]:
        if vars(args)[flag] not in (usual[flag], stored.get(flag, usual[flag])):
            raise UserError(f"{table.flags({flag: vars(args)[flag]}, {})}: does nothing for --head {args.head}; "
                            f"leave it out, or choose the other head")

    # ---- data ----
    data = labels.read(args.data, allow_bad=args.allow_bad_labels)
    train, val = split(args, folder, data)
    bands = args.bands or images.default_bands(data.files)
    if args.debug:
        train, val = folds.some(train, 8 * args.bs), folds.some(val, args.bs)
    sources, weights = pick(data, train), np.ones(len(train))
    for more, weight in args.extra_data:
        extra = labels.with_names(labels.read(more, allow_bad=args.allow_bad_labels), data.names, more)
        chosen = folds.unseen(extra.files, [data.files[i] for i in val], more)
        chosen = folds.some(chosen, 8 * args.bs) if args.debug else chosen
        sources = [ours + theirs for ours, theirs in zip(sources, pick(extra, chosen))]
        weights = np.concatenate((weights, np.full(len(chosen), weight)))
    scale = args.pixel_scale or det.default_scale(sources[0] + [data.files[i] for i in val], bands)
    if args.tile:
        sources, image_of = det.cut(*sources, tile=args.tile, overlap=args.overlap)
        weights = weights[image_of]
    names, reading = data.names, dict(bands=bands, imgsz=args.imgsz, cache=args.cache)
    train_data = det.DetData(*sources, seed=args.seed, mosaic=args.mosaic, grid=args.grid, mixup=args.mixup,
                             close_mosaic=args.epochs - args.close_mosaic, hsv=args.hsv, degrees=args.degrees,
                             translate=args.translate, scale=args.scale, shear=args.shear, flip_ud=args.flip_ud,
                             flip_lr=args.flip_lr, **reading)
    if args.image_weights:
        weights *= class_balance(sources[2], len(names))
    loader = train_loader(train_data, args.bs, workers=args.workers, seed=args.seed, device=device,
                          parts=args.epoch_parts, same=args.debug, weights=weights if np.ptp(weights) else None,
                          collate=det.collate)

    # ---- net ----
    arch = dict(variant=args.variant, num_classes=len(names), in_chans=len(bands), head=args.head)
    if resume and args.head == "anchor":
        arch["anchors"] = resume["arch"]["kwargs"].get("anchors")
    model = YOLOv5(**arch, grad_checkpoint=args.grad_checkpoint)
    if args.imgsz % model.stride:
        raise UserError(f"--imgsz {args.imgsz}: not a multiple of the net's stride {model.stride}; take "
                        f"{-(-args.imgsz // model.stride) * model.stride}")
    if args.bs == dist.world_size() and int(args.imgsz * (1 - args.multi_scale)) < 2 * model.stride:
        raise UserError(f"--bs {args.bs} --imgsz {args.imgsz}: batch norm would see a single pixel; raise one of them")
    if args.weights and not resume:
        if dist.rank() == 0:  # other machines need not have the file: a first stage's lies on one
            with answers_for("--weights"):
                print(pretrained.describe(pretrained.load(model, args.weights)))
        dist.same_weights(model)
    if args.head == "anchor" and not resume:
        arch["anchors"] = fit_anchors(model.head, args, *sources[1::2])
    model = model.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.sync_batch_norm(model, device)
    head = model.head

    # ---- loss ----
    def inputs(batch):  # -> (B, C, H, W) float32, 0..1
        if "colour" not in batch:
            return (batch["image"].float() / scale).clamp_(0, 1)  # as recolour does
        x = augment.recolour(batch["image"], batch["colour"], scale)
        return mix.random_erase(x, p_gridmask=args.gridmask, p_cutout=args.cutout)

    def compute_loss(model, batch):
        x, targets = inputs(batch), batch["boxes"]
        if args.multi_scale:
            low, high = (int(args.imgsz * (1 + f * args.multi_scale)) // head.strides[-1] for f in (-1, 1))
            side = dist.broadcast(int(torch.randint(max(low, 1), high + 1, ()))) * head.strides[-1]
            x = F.interpolate(x, (side, side), mode="bilinear")
            targets = torch.cat((targets[:, :2], targets[:, 2:] * (side / args.imgsz)), 1)
        maps = model(x)
        if args.head == "free":
            loss, parts = losses_det.free_loss(maps, targets, head.strides, BINS,
                                               box=args.box, dfl=args.dfl, cls=args.cls)
        else:
            levels = 3 / len(maps)  # the gains are for 3 levels, 80 classes and 640 pixels
            loss, parts = losses_det.anchor_loss(
                maps, targets, head.anchors, head.strides, threshold=args.anchor_threshold, box=args.box * levels,
                obj=args.obj * (args.imgsz / 640) ** 2 * levels, cls=args.cls * len(names) / 80 * levels,
                obj_pw=args.obj_pw, cls_pw=args.cls_pw, smoothing=args.label_smoothing, gamma=args.focal_gamma)
        # the loss of a step is a sum over its images: the learning rates are for that
        return loss * args.bs * args.accumulate, parts

    # ---- validation ----
    if val and args.tile:
        val_data = det.TiledImages([data.files[i] for i in val], labelled(data, val), bands=bands, imgsz=args.imgsz,
                             stride=model.stride, tile=args.tile, overlap=args.overlap)
        shapes = val_data.shapes
    elif val:
        shapes = [det.rect(data.sizes[i], args.imgsz, model.stride) for i in val]
        val_data = det.DetData(*pick(data, val), shapes=shapes, **reading)
    if val:
        val_loader = eval_loader(val_data, max(1, args.bs // dist.world_size()), shapes=shapes, workers=args.workers,
                                 device=device, collate=det.collate)

    def judge(model):  # boxes are compared in pixels of the files
        metric, by_view = metrics.DetectionAP(len(names)), {}
        for i, batch in enumerate(val_loader):
            batch = engine.to_device(batch, device)
            x = inputs(batch)
            found = boxes.nms(model(x), conf=0.001, iou=0.65, max_det=300)
            truths = det.gt_boxes(batch)
            restored = [det.restore(rows, m) for rows, m in zip(found, batch["matrix"])]
            if args.tile:
                by_view |= {view: (rows.cpu(),) for view, rows in zip(batch["index"].tolist(), restored)}
            else:
                sizes = [data.sizes[val[i]] for i in batch["index"].tolist()]
                metric.update([boxes.clip(rows, *size) for rows, size in zip(restored, sizes)], truths, batch["index"])
            if i == 0 and dist.rank() == 0:
                seen = [det.move(rows, m) for rows, m in zip(truths, batch["matrix"])]
                pictures_det.detection_sheet(folder / "val.png", x, seen, found, names=names)
        if args.tile:  # an image's windows may lie on several ranks
            by_view = {view: rows for part in dist.gather(by_view) for view, rows in part.items()}
            for i in range(dist.rank(), len(val), dist.world_size()):
                truth = val_data.boxes[i].roll(-1, 1)
                metric.update([val_data.merge(i, by_view, iou=0.65, max_det=300)], [truth], torch.tensor([i]))
        return metric.reduce()

    def evaluate(model):
        began = time.monotonic()
        metric = judge(model)
        threshold, _ = metric.best_threshold()  # boxes below it are not drawn
        return metric.compute() | {"val_seconds": time.monotonic() - began,
                                   "threshold": None if math.isnan(threshold) else threshold}

    if args.show_augment:
        if dist.rank() == 0:
            save_augmentations(folder / "augment.png", train_data, inputs, names)
        return

    # ---- training ----
    if dist.rank() == 0:
        params = sum(p.numel() for p in model.parameters())
        print(f"{len(train_data)} images with {sum(map(len, sources[1]))} boxes to train, "
              f"{len(val)} to validate; {len(names)} classes; {params:,} parameters; {device}")
        batch = det.collate([train_data[0, i] for i in range(min(args.bs, 8))])
        pictures_det.detection_sheet(folder / "train_batch.png", inputs(batch), det.gt_boxes(batch), names=names)
        pictures_det.label_statistics(folder / "labels.png", *sources[1:4], names)
    # sgd follows a sum over images, and its decay is for 64 of them; adamw's does not depend on their number
    decay = args.weight_decay * (args.bs * args.accumulate / 64 if args.optimizer == "sgd" else 1)
    state, options = training(args, folder, model, loader, device, weight_decay=decay)
    steps = -(-len(loader) // args.accumulate)
    optim.warm_up(state.optimizer, round(args.warmup_epochs * steps), bias_lr=args.warmup_bias_lr,
                  momentum=args.warmup_momentum)
    header = {"task": "det", "arch": {"name": "YOLOv5", "kwargs": arch}, "classes": names,
              "category_ids": data.category_ids, "bands": bands, "scale": scale, "imgsz": args.imgsz,
              "args": vars(args)}
    engine.fit(state, loader, compute_loss, evaluate if val else None, folder=folder, header=header, resume=resume,
               **options)
    if args.debug:
        if args.head == "free" and state.history[0]["box"] < state.history[-1]["box"]:  # its mean is over what it finds
            dist.print0("--debug: the net finds too little as yet for its loss to tell; look at train_batch.png")
        else:
            engine.check_debug(state.history)
    if val:
        write_report(state, judge, names, folder, [data.files[i] for i in val], bands)


def save_augmentations(path, data, inputs, names, samples=8, epochs=4):
    """A sheet of what is trained on: a row per image (and those around it), a column per epoch."""
    columns = []
    for epoch in range(epochs):
        batch = det.collate([data[epoch, i] for i in range(samples)])
        shown = (sheets.to_rgb((x * 255).byte()) for x in inputs(batch))
        columns.append([pictures_det.draw_boxes(rgb, rows[:, :4], rows[:, 4].long(), names)
                        for rgb, rows in zip(shown, det.gt_boxes(batch))])
    sheets.contact_sheet(path, list(zip(*columns)), titles=[f"epoch {k + 1}" for k in range(epochs)], max_side=320)
    print(path)


def split(args, folder, data):
    """Indices of the images to train and to validate on. Without --folds: the data's own validation images, else a
    fifth. Strata: an image's rarest class."""
    root = args.data if os.path.isdir(args.data) else os.path.dirname(args.data)
    names = [os.path.relpath(path, root) for path in data.files]
    count = np.bincount(np.concatenate(data.classes), minlength=len(data.names))
    rarest = [int(c[count[c].argmin()]) if len(c) else -1 for c in data.classes]
    spec = folds.given(args.folds, names, data.held_out, args.fold)
    return folds.load_or_make_split(folder, names, spec, args.fold, files=data.files, strata=rarest, groups=args.groups,
                        drop=args.drop_noisy)


def pick(data, indices):
    """-> the files, boxes, classes and sizes of some images, as DetData takes them."""
    return [[column[i] for i in indices] for column in (data.files, data.boxes, data.classes, data.sizes)]


def labelled(data, indices):
    """-> per image float32 (n, 5) of class, x1, y1, x2, y2."""
    return [torch.from_numpy(np.column_stack((data.classes[i], data.boxes[i]))).float() for i in indices]


def class_balance(classes, count):
    """How often each image is to come: classes, an (n,) array per image -> (images,), the sum over an image's boxes
    of 1 / (number of boxes of that class in all images). So all classes weigh the same in total."""
    frequency = np.bincount(np.concatenate(classes), minlength=count)
    weights = np.array([(1 / frequency[c]).sum() for c in classes])
    return weights + min(weights[weights > 0], default=1) / 10  # images without boxes come too


def fit_anchors(head, args, boxes, sizes):
    """Anchors that fit the training boxes as the net sees them, into the head; -> list (levels, 3, 2), pixels."""
    strides = torch.tensor(head.strides)[:, None, None]
    pixels = (head.anchors * strides).numpy()
    if args.autoanchor:
        wh = np.concatenate([(b[:, 2:] - b[:, :2]) * args.imgsz / max(size) for b, size in zip(boxes, sizes)])
        pixels, line = anchors.auto(wh, pixels, threshold=args.anchor_threshold, seed=args.seed)
        head.anchors.copy_(torch.as_tensor(pixels) / strides)
        dist.print0(line)
    return pixels.tolist()


def draw_ends(path, metric, samples, files, bands, *, names, tables):
    """The images with the worst F1 and the best: their boxes, and what was detected; below, the tables."""
    threshold, parts = metric.best_threshold()[0], {}
    for part, chosen in zip(("worst", "best"), review.ends([row["score"] for row in samples])):
        parts[part] = []
        for i in chosen:
            size, (found, truths) = images.size(files[i])[1:], metric.boxes_of(i)
            shape = det.reduced(size, 1920)  # whole, a large scene cannot be read
            rgb, zoom = sheets.to_rgb(images.read_picture(files[i], bands, shape=shape)), max(shape) / max(size)
            found = found[found[:, 4] >= threshold]
            row = [pictures_det.draw_boxes(rgb, truths[:, :4] * zoom, truths[:, 4].long(), names),
                   pictures_det.draw_boxes(rgb, found[:, :4] * zoom, found[:, 5].long(), names, found[:, 4])]
            parts[part].append((samples[i], row))
    review.page(path, parts, tables=tables, titles=("labels", "detections"), max_side=640)


def tables(metric, scores, classes, names):
    """{title: rows} for `review.page`, from what a metric has computed: AP and boxes by class, and by their area."""
    boxes = np.concatenate(metric.truths)
    area = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    by_class = [{"class": pictures_det.class_name(names, k), "AP": c["ap"], "AP50": c["ap50"], "boxes": c["truths"]}
                for k, c in enumerate(classes)]
    by_size = [{"size": name.removeprefix("ap_"), "pixels": f"{low} to {high}" if high < 1e10 else f"from {low}",
                "AP": scores[name], "boxes": int(((low <= area) & (area <= high)).sum())}
               for name, (low, high) in AREAS.items() if name != "ap"]
    return {"Classes": by_class, "Boxes by area": by_size}


def write_report(state, judge, names, folder, files, bands):
    """The run's last weights judged class by class (results.json, precision-recall curves, confusion matrix) and image
    by image (samples.csv; the worst and the best, and tables, in review.png)."""
    metric = engine.evaluate_on(state, judge)
    if dist.rank() > 0:
        return
    scores, classes, (threshold, f1) = metric.compute(), metric.per_class(), metric.best_threshold()
    write_json(folder / "results.json", {
        "last": scores, "best F1": {"score threshold": threshold, "f1": f1}, "classes": dict(zip(names, classes))})
    samples = metric.samples(files)
    draw_ends(folder / "review.png", metric, samples, files, bands, names=names,
              tables=tables(metric, scores, classes, names))
    charts.write_csv(folder / "samples.csv", samples)
    pictures_det.pr_curves(folder / "pr.png", *metric.curve(), names, [c["ap50"] for c in classes])
    pictures_det.confusion_matrix(folder / "confusion.png", metric.confusion(), names)
    print("last epoch: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    for name, c in zip(names, classes):
        line = f"  {name}: AP {c['ap']:.3f}  AP50 {c['ap50']:.3f}  {c['truths']} boxes"
        print(line.encode(errors="backslashreplace").decode())  # what JSON escapes need not be text


if __name__ == "__main__":
    cli(main)
