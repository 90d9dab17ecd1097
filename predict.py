"""Predictions: checkpoints in, submission, GeoTIFFs and pictures out.

    python predict.py --task seg --tta                        # newest run, its data's test_img folder
    python predict.py --task seg --tta hflip rot90 scale --merge gmean
    python predict.py --task seg --weights runs/seg/exp*/best.pt --source scene.tif --tile 512 --polygons
    python predict.py --task seg --detector runs/det/exp/best.pt     # detect, crop, segment
    python predict.py --task det --weights runs/det/exp/best.pt --tta --imgsz 1536 --source photos --tile 1024
    python predict.py --task cls --tta --weights runs/cls/*/best.pt --fit-weights
    python predict.py --task cls --probs a.csv b.csv --ensemble-weights 1.5 1    # only tables, of any predictions
    torchrun --nproc_per_node 4 predict.py --task seg --tta   # the inputs are shared among four GPUs

Several checkpoints are averaged: folds, seeds and epochs make an ensemble. How a net is fed and what its output means
is defined in data/<task>.py (Input) and in utils/ops/decide.py, for training and prediction alike.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import nets
from data import cls, det, images, labels, seg
from data.loader import eval_loader
from data.results import pseudo, scenes, submissions
from nets.blocks import fuse
from utils.errors import Parser, UserError, cli
from utils.metrics import ensemble
from utils.ops import boxes, decide, tta
from utils.pictures import review, table
from utils.train import checkpoint, dist, engine, runs
from utils.train.args import float_range, int_range, noise_list

INPUT = {"seg": seg.Input, "det": det.Input, "cls": cls.Input}
TEST_FOLDER = {"seg": seg.test_folder, "det": labels.test_folder, "cls": cls.test_folder}
ONLY = {  # flags that only some tasks have
    "tile": ("seg", "det"), "overlap": ("seg", "det"), "overlays": ("seg", "det"), "imgsz": ("det", "cls"),
    "ensemble_weights": ("det", "cls"), "polygons": ("seg",), "detector": ("seg",), "conf": ("det",), "iou": ("det",),
    "max_det": ("det",), "max_mb": ("det",), "probs": ("cls",), "fit_weights": ("cls",), "ensemble": ("cls",)}
OVERLAP = 0.25  # of neighbouring windows, if the training had no --overlap


class Member(NamedTuple):
    """A checkpoint that predicts. state: what the file holds; inputs: the INPUT of its task."""
    path: str
    state: dict
    net: Any
    inputs: Any


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", choices=INPUT, required=True)
    add("--weights", nargs="+", metavar="PATH", help="checkpoints; without: the newest run's best.pt or last.pt")
    add("--source", nargs="+", metavar="PATH|DIR|GLOB", help="images; without: the test images of the training's data")
    add("--noisy", type=noise_list, metavar="CSV:K", help="instead of --source: those of the K worst samples of a "
        "noise.csv that the checkpoint's run has held out, to be labelled anew by --pseudo")
    add("--out", metavar="DIR", help="new folder for the results; without: predict in the run's folder")
    add("--tta", nargs="*", choices=tta.NAMES, metavar="NAME", help=f"test-time augmentation: the views are all "
        f"combinations of the names, {', '.join(tta.NAMES)}; without names: seg both flips, det three sizes, one of "
        f"them flipped, cls quarter turns")
    add("--tta-scales", type=float_range(0.1, 10), nargs="+", metavar="F", help=f"sizes of --tta scale; without: "
        f"{' '.join(f'{scale:g}' for scale in tta.SCALES)}")
    add("--merge", choices=(*tta.MERGES, "wbf"), help="how the views are merged; seg, cls: their probabilities, "
        "without: mean; sum is capped at 1 and needs --threshold, tsharpen averages sqrt(p), so the threshold is "
        "sqrt(threshold); det: wbf is weighted boxes fusion, without: non-maximum suppression")
    add("--bs", type=int_range(1, 65536), default=8, help="images per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: starts half a minute later, then runs faster")
    add("--workers", type=int_range(0, 256), default=2, help="loader processes per process")
    add("--project", metavar="DIR", help="where to look for the newest run; without: runs/TASK")
    add("--tile", type=int_range(16, 65536), help="larger images are read in windows of this side; without: seg twice "
        "the training size (the whole image after --resize), det the training's --tile")
    add("--overlap", type=float_range(0, 0.9), help="of neighbouring windows; without: seg 0.25, det the training's")
    add("--overlays", action=argparse.BooleanOptionalAction, default=True, help="pictures with the result drawn in")
    add("--threshold", type=float_range(0, 1), help="seg, cls: probability above which a pixel or a class is positive; "
        "det: score from which a box is drawn; without: the best ones of the validation, which checkpoints store")
    add("--pseudo", type=float_range(0.5, 1), metavar="P", help="also write what has at least this probability as "
        "pseudo labels, for --extra-data; seg: other pixels are ignored, cls: other images are left out, det: other "
        "boxes are background; not with --merge sum, max, min, tsharpen")
    add("--soup", action="store_true", help="average the checkpoints' weights instead of their predictions")
    add("--imgsz", type=int_range(32, 65536), help="det, cls, --detector: side of the net's input; without: as trained")
    add("--ensemble-weights", type=float_range(1e-6), nargs="+", metavar="W", help="det, cls: of the checkpoints, and "
        "then of the tables")
    add = parser.add_argument_group("segmentation").add_argument
    add("--polygons", action="store_true", help="also write the masks' outlines as GeoJSON")
    add("--detector", metavar="PATH", help="a checkpoint of train_det.py: only its boxes, a little enlarged, are "
        "segmented")
    add = parser.add_argument_group("detection").add_argument
    add("--conf", type=float_range(0, 1), help="lowest score of a detection, before it is fused with others; without: "
        "0.01, for --detector 0.25")
    add("--iou", type=float_range(0, 1), default=0.7, help="boxes that overlap by more suppress each other")
    add("--max-det", type=int_range(1, 100000), default=300, help="most detections per image")
    add("--max-mb", type=float_range(0.001), default=20.0, help="largest submission.json, 10^6 bytes; the best scores "
        "are kept")
    add = parser.add_argument_group("classification").add_argument
    add("--probs", nargs="+", metavar="CSV", help="probabilities.csv of earlier predictions, to be averaged in")
    add("--fit-weights", action="store_true", help="find the checkpoints' weights and a threshold per class on the "
        "images that all their runs held out; both are used, and written to ensemble.json")
    add("--ensemble", metavar="JSON", help="the ensemble.json of an earlier --fit-weights, for the same checkpoints "
        "and views")
    args = parser.parse_args()
    for flag, tasks in ONLY.items():
        used = args.task in tasks or args.detector and flag in ("imgsz", "conf", "iou", "max_det")
        if vars(args)[flag] != parser.get_default(flag) and not used:
            raise UserError(f"--{flag.replace('_', '-')}: does nothing for --task {args.task}; leave it out")
    args.conf = (0.25 if args.detector else 0.01) if args.conf is None else args.conf
    check_views(args)
    return args


def main():
    args = parse_args()
    device = dist.setup(args.device, patience=timedelta(days=7))  # a rank may have the one large scene
    if args.probs and not args.weights:
        with writing(args):
            return combine_tables(args)
    paths = args.weights or [runs.newest(args.project or f"runs/{args.task}", "best.pt", "last.pt")]
    check_ensemble(args, paths)
    if args.noisy:
        if args.source or len(paths) > 1:
            raise UserError("--noisy: is for one checkpoint, instead of --source; give one --weights and no --source")
        args.source = review.read_noise(*args.noisy, Path(paths[0]).parent)
    states = [checkpoint.load(path) for path in paths]
    if args.soup:
        paths, states = paths[:1], [checkpoint.average(paths, states)]
    members = load_members(args, args.task, device, paths, states)
    with writing(args):
        {"seg": predict_seg, "det": predict_det, "cls": predict_cls}[args.task](args, device, members)
    dist.barrier()


@contextlib.contextmanager
def writing(args):
    """Answers for results that cannot be written; errors of reading are UserErrors already."""
    try:
        yield
    except ConnectionError:  # to a loader worker or to another rank
        raise
    except OSError as error:
        what = error.filename or args.out or "the results"
        raise UserError(f"{what}: cannot be written ({error.strerror or error}); make room, or choose another --out"
                        ) from None


def check_views(args):
    """Whether the flags of test-time augmentation go together."""
    if args.merge and (args.merge == "wbf") != (args.task == "det"):
        raise UserError(f"--merge {args.merge}: not for --task {args.task}; wbf is for boxes, the others are for "
                        f"probabilities")
    if args.merge and args.tta is None:
        raise UserError("--merge: says how the views of --tta are merged; give that too")
    # of single labels too: normalising to a sum of 1 turns only sum into a mean, which is there already
    if args.pseudo and args.merge in ("sum", "max", "min", "tsharpen"):
        raise UserError(f"--pseudo: the results of --merge {args.merge} are no probabilities; take mean or gmean")
    if args.tta_scales and "scale" not in (args.tta or ()):
        raise UserError("--tta-scales: are the sizes of --tta scale; give that too")


def check_ensemble(args, paths):
    """Whether the flags of an ensemble go together."""
    given = [f"--{flag.replace('_', '-')}" for flag in ("fit_weights", "ensemble", "ensemble_weights")
             if getattr(args, flag)]
    if len(given) > 1:
        raise UserError(f"{given[0]}, {given[1]}: both say how the checkpoints are weighted; leave one out")
    if args.fit_weights and len(set(map(os.path.realpath, paths))) < len(paths):
        raise UserError("--fit-weights: one of the checkpoints is given twice; leave it out once")
    count, tables = 1 if args.soup else len(paths), len(args.probs or ())
    if len(paths) + tables == 1 and (args.soup or args.ensemble_weights):
        raise UserError(f"{'--soup' if args.soup else '--ensemble-weights'}: is for several checkpoints; leave it out, "
                        f"or give more")
    if args.soup and given and not (args.ensemble_weights and tables):
        raise UserError(f"--soup: makes one net of the checkpoints, there is nothing to weight; leave it out, or "
                        f"{given[0]}")
    if args.threshold is not None and (args.fit_weights or args.ensemble):
        raise UserError(f"--threshold: {given[0]} brings thresholds of its own; leave one out")
    if tables and given and not args.ensemble_weights:
        raise UserError(f"{given[0]}: is for checkpoints, --probs come without their held-out images; give "
                        f"--ensemble-weights instead")
    if args.ensemble_weights and len(args.ensemble_weights) != count + tables:
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} numbers for {count} checkpoints and {tables} "
                        f"tables; give one each")


# ---- what all tasks share --------------------------------------------------------------------------------------------
def load_members(args, task, device, paths, states):
    """-> a Member per checkpoint, its net on the device with batch norms folded away, in half precision where the
    hardware has it. UserError for checkpoints that cannot be used, or cannot be used together."""
    dtype, members = engine.precision(args.amp, device) or torch.float32, []
    if args.compile:  # the weights as constants, which CPUs get packed; several nets would be compiled one by one
        torch._inductor.config.freezing = device.type == "cpu" and len(paths) == 1
    for path, state in zip(paths, states):
        if state["task"] != task:
            raise UserError(f"{path}: trained for --task {state['task']}; choose that, or other checkpoints")
        try:
            net, inputs, classes = nets.build(state["arch"]), INPUT[task](**state["input"]), state["classes"]
            np.broadcast_to(np.asarray(state.get("threshold") or 0.5, float), np.size(classes))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(checkpoint.OTHER_VERSION.format(path) + f" ({error})") from None
        if classes != states[0]["classes"]:
            shown = f"{classes} classes" if isinstance(classes, int) else f"the classes {', '.join(classes)}"
            raise UserError(f"{path}: has {shown}, {paths[0]} others; an ensemble needs the same")
        if state.get("single_label") != states[0].get("single_label"):
            raise UserError(f"{path}: is for {'one label' if state['single_label'] else 'several labels'} per image, "
                            f"{paths[0]} is not; predict them apart")
        checkpoint.load_weights(net, state, path)
        net = fuse(net).to(device, dtype, memory_format=torch.channels_last)
        if args.compile:
            net.compile(dynamic=False if task == "seg" else None)
        members.append(Member(path, state, net, inputs))
    return members


def view_options(args, default=()):
    """The keyword arguments of `decide.segment` and `decide.classify` for the views that --tta asks for."""
    names = default if args.tta == [] else args.tta or ()
    return dict(names=names, scales=args.tta_scales or tta.SCALES, merge=args.merge or "mean")


def all_bands(members):
    """What to read of an image: the bands (from 1, sorted) that any of the checkpoints needs."""
    return sorted({band for member in members for band in member.inputs.bands})


def find_sources(args, members):
    """The image files to predict: --source, or the test images of the first training's data."""
    default = TEST_FOLDER[args.task](members[0].state["args"]["data"])
    return images.find_sources(args.source, default, members[0].inputs.pixel_scale)


def new_folder(args, members):
    return runs.new_folder(args.out or Path(members[0].path).parent / "predict")


def best_threshold(args, members, single_label=False):
    """--threshold, or else the mean of the thresholds that the checkpoints store; the default of the task without any.
    tsharpen averages sqrt(p), so the threshold is sqrt(threshold)."""
    if args.threshold is not None:
        if single_label:
            raise UserError("--threshold: does nothing where the most probable class is taken; leave it out")
        return args.threshold
    if args.merge == "sum" and not single_label and not (args.fit_weights or args.ensemble):  # these fit their own
        raise UserError("--merge sum: the trainings' thresholds are of single probabilities, not of sums; give "
                        "--threshold")
    found = [m.state["threshold"] for m in members if m.state.get("threshold") is not None]
    threshold = np.mean(found, axis=0) if found else decide.THRESHOLD[args.task]
    return np.sqrt(threshold) if args.merge == "tsharpen" else threshold


# ---- segmentation ----------------------------------------------------------------------------------------------------
def predict_seg(args, device, members):
    """Masks as GeoTIFF, overlays, polygons, and the wildfire competition's y_pred.pkl."""
    first, bands = members[0], all_bands(members)
    files = find_sources(args, members)
    if len({member.inputs.resize for member in members}) > 1:
        raise UserError("--weights: some are trained on whole images (--resize), others on crops; predict them apart")
    # trained on whole images, a net gets whole images
    tile = args.tile or (2**31 if first.inputs.resize else 2 * max(member.inputs.imgsz for member in members))
    sizes = {file: images.size(file) for file in files}
    for file in files:
        if sizes[file][0] < bands[-1]:
            raise UserError(f"{file}: has {sizes[file][0]} bands, the checkpoint needs band {bands[-1]}; choose "
                            f"another --source")
    unsure = pseudo.unsure(first.state["classes"], first.state["args"].get("ignore"))
    threshold = best_threshold(args, members, single_label=first.state["classes"] > 1)
    parts = find_parts(args, device, files) if args.detector else {}
    out = new_folder(args, members)
    for folder in ("masks", *("overlays",) * args.overlays, *("polygons",) * args.polygons,
                   *("pseudo/train_mask",) * bool(args.pseudo)):
        (out / folder).mkdir(parents=True, exist_ok=True)

    def predict(raw):
        """Images (B, len(bands), H, W) in the files' numbers -> the mean probabilities (B, K, H, W) of the members."""
        count, options = len(raw), view_options(args, decide.SEGMENTATION_VIEWS)
        if args.compile:  # one compilation per shape of the views: a last, smaller batch is filled up
            raw = raw[torch.arange(args.bs) % count]
        raw = raw.to(device, non_blocking=True)
        total = sum(decide.segment(m.net, m.inputs(raw, bands), side=m.inputs.side, **options) for m in members)
        return (total / len(members))[:count]

    def masks_of(probs):
        """Probabilities (B, K, H, W) -> {folder of the results: uint8 class maps (B, H, W)}."""
        masks = decide.masks(probs, threshold).cpu()
        found = {"masks": masks.numpy()}
        if args.pseudo:
            found["pseudo/train_mask"] = pseudo.sure_mask(probs, masks, args.pseudo, unsure).numpy()
        return found

    def pieces(file, part):
        """Yields (folder, row, column, class map (h, w)) of a part (y, x, height, width) of an image."""
        for y, x, probs in scenes.blocks(file, part, bands, predict, tile=tile, bs=args.bs, workers=args.workers,
                                         overlap=OVERLAP if args.overlap is None else args.overlap):
            for folder, [mask] in masks_of(probs[None]).items():
                yield folder, y, x, mask

    def draw(file):
        submissions.draw_mask(file, out, first.inputs.bands, overlay=args.overlays, outlines=args.polygons)

    at_once = {file for file in files if max(sizes[file][1:]) <= tile and not args.detector}
    small, large = ([file for file in files if (file in at_once) is side] for side in (True, False))
    loader = eval_loader(seg.Tiles(small, bands), args.bs, shapes=[sizes[file] for file in small], workers=args.workers,
                         device=device)
    progress = tqdm(total=len(files), desc="predict", unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            found = masks_of(predict(batch["image"]))
            for k, i in enumerate(batch["index"].tolist()):
                for folder, masks in found.items():
                    with submissions.new_mask(small[i], out / folder) as target:
                        target.write(masks[k], 1)
                draw(small[i])
            bar.update(len(batch["index"]) * dist.world_size())
        for file in large[dist.rank()::dist.world_size()]:
            if args.detector:  # pixels outside the detections are ignored in the pseudo labels
                blank = {"masks": 0} | ({"pseudo/train_mask": unsure} if args.pseudo else {})
                found = (piece for part in parts[file] for piece in pieces(file, part))
                scenes.write_parts(file, sizes[file][1:], found, blank, out)
            else:
                scenes.write(file, pieces(file, (0, 0, *sizes[file][1:])), out)
            draw(file)
            bar.update(dist.world_size())
    dist.barrier()
    if dist.rank() == 0:
        submissions.write_masks(files, sizes, out)
        if args.pseudo:
            pseudo.link(files, out / "pseudo/train_img")
            print(f"pseudo labels: train_seg.py --extra-data {out / 'pseudo'} --ignore {unsure}")
        print(f"{len(files)} images: {out}")


def find_parts(args, device, files):
    """{file: the boxes of --detector in it, as [(y, x, height, width)], the highest score last}, with a margin of a
    tenth on each side: the surroundings of an object show where it ends."""
    members = load_members(args, "det", device, [args.detector], [checkpoint.load(args.detector)])
    parts = {}
    views = det_views(args, members, files)
    for file, size, rows in zip(files, views.sizes, detect(args, device, members, views)):
        margin = 0.1 * (rows[:, 2:4] - rows[:, :2])
        grown = boxes.clip(torch.cat((rows[:, :2] - margin, rows[:, 2:4] + margin), 1), *size)
        corners = torch.cat((grown[:, :2].floor(), grown[:, 2:].ceil()), 1).int().flip(0).tolist()
        parts[file] = [(y1, x1, y2 - y1, x2 - x1) for x1, y1, x2, y2 in corners]
    return parts


# ---- detection -------------------------------------------------------------------------------------------------------
def predict_det(args, device, members):
    """Boxes as the parking-lot competition's submission, as COCO's and YOLO's files, and drawn into the images."""
    first, data = members[0].state, Path(members[0].state["args"]["data"])
    files = find_sources(args, members)
    views = det_views(args, members, files)
    near = (data.parent if data.is_file() else data) if args.source is None else files[0].parent
    ids = submissions.image_ids(files, near, others=args.source is not None)
    out = new_folder(args, members)
    results = detect(args, device, members, views)

    names, threshold = first["classes"], best_threshold(args, members)
    for folder in ("labels", "overlays") if args.overlays else ("labels",):
        (out / folder).mkdir(exist_ok=True)
    for file, size, rows in list(zip(files, views.sizes, results))[dist.rank()::dist.world_size()]:
        (out / "labels" / f"{file.stem}.txt").write_text(submissions.yolo_lines(rows, *size))
        if args.overlays:
            drawn = rows[rows[:, 4] >= threshold]
            submissions.draw_boxes(out / "overlays" / f"{file.stem}.jpg", file, size, drawn, names,
                                   members[0].inputs.bands)
    if dist.rank() == 0:
        items = submissions.coco_items(results, ids, first["category_ids"])
        (out / "coco.json").write_text(json.dumps(items))
        submission, dropped = submissions.cut(submissions.parking_items(items), args.max_mb * 1e6)
        (out / "submission.json").write_text(submission)
        if args.pseudo:
            count, boxed = pseudo.write_boxes(out / "pseudo", files, views.sizes, results, names,
                                              first["category_ids"], args.pseudo)
            print(f"pseudo labels of {count} images, {boxed} boxes: train_det.py --extra-data {out / 'pseudo'}"
                  if count else "no pseudo labels: no box is sure enough; lower --pseudo")
        note = f", of which the {dropped} of lowest score are not in submission.json (--max-mb)" if dropped else ""
        print(f"{len(files)} images, {sum(map(len, results))} detections{note}: {out}")


def det_views(args, members, files):
    """The whole images, and windows of large ones, as the nets are to see them."""
    imgsz = args.imgsz or max(member.inputs.imgsz for member in members)
    trained = {member.state["args"].get("tile") for member in members}
    if len(trained) > 1 and not args.tile:
        raise UserError("--weights: were trained with windows of different sizes, or some without; choose by --tile")
    tile = args.tile or trained.pop()
    if args.task == "det" and args.overlap is not None and not tile:
        raise UserError("--overlap: is of windows; leave it out, or give --tile")
    overlap = max(m.state["args"].get("overlap", OVERLAP) for m in members) if args.overlap is None else args.overlap
    return det.TiledImages(files, bands=all_bands(members), imgsz=imgsz, tile=tile, overlap=overlap,
                           stride=max(member.net.stride for member in members))


def detect(args, device, members, views):
    """-> the detections (n, 6) in each of the views' files, in its pixels; the same on every rank."""
    bands, largest = all_bands(members), max(member.inputs.imgsz for member in members)
    make_views = decide.DETECTION_VIEWS if args.tta == [] else functools.partial(
        tta.tta_views, args.tta or (), scales=args.tta_scales or tta.SCALES)
    loader = eval_loader(views, args.bs, shapes=views.shapes, workers=args.workers, device=device, collate=det.collate)

    def predict(batch):  # yields, checkpoint by checkpoint, the detections in each image of the batch
        raw = batch["image"].to(device, non_blocking=True)
        for _, _, net, inputs in members:
            factor = 1.0 if args.imgsz else inputs.imgsz / largest  # each at the size that it was trained for
            yield decide.detect(net, inputs(raw, bands), make_views(raw.shape[2:], stride=net.stride, factor=factor),
                                conf=args.conf, iou=args.iou, max_det=args.max_det, merge=args.merge)
        progress.update(len(raw) * dist.world_size())

    progress = tqdm(total=len(views), desc="predict", unit="view", disable=dist.rank() > 0)
    with torch.inference_mode(), progress:
        return views.detect(loader, predict, iou=args.iou, max_det=args.max_det, weights=args.ensemble_weights)


# ---- classification --------------------------------------------------------------------------------------------------
def predict_cls(args, device, members):
    """The competition's submission, probabilities, weighted ensembles of checkpoints and tables."""
    names, single_label = members[0].state["classes"], members[0].state["single_label"]
    shares = args.ensemble_weights or [1.0] * (len(members) + len(args.probs or ()))
    thresholds = best_threshold(args, members, single_label)
    views = table.flags({flag: vars(args)[flag] for flag in ("tta", "tta_scales", "merge", "imgsz")}, {})
    paths = [member.path for member in members]
    if args.ensemble:
        shares, thresholds = ensemble.read(args.ensemble, paths, names, single_label, flags=views)
        members, shares = zip(*(pair for pair in zip(members, shares) if pair[-1] > 0))
    files = find_sources(args, members)
    keys = [submissions.index_of(file.stem) for file in files]
    file_of = dict(zip(keys, files))  # of several with one number the last
    twice = next((file for key, file in zip(keys, files) if file_of[key] != file), None)
    if twice:
        raise UserError(f"{twice}: another image has the number {int(twice.stem)} too; predict them in two runs")
    _, _, tables = submissions.read_tables(args.probs or (), names, keys)
    known, answers = cls.held_out(paths, [m.state for m in members]) if args.fit_weights else ([], None)
    for member in members:
        cls.check_bands(known + files, member.inputs.bands)
    out = new_folder(args, members)

    found = [class_probabilities(args, device, member, known + files) for member in members]
    if args.fit_weights:
        shares, thresholds = ensemble.fit([probs[:len(known)] for probs in found], answers, single_label)
        if dist.rank() == 0:
            ensemble.write(out / "ensemble.json", paths, shares, names, () if single_label else thresholds, flags=views)
    probs = ensemble.average([*(probs[len(known):] for probs in found), *tables], shares)
    if dist.rank() == 0:
        numbered = cls.test_folder(members[0].state["args"]["data"]).name == cls.COMPETITION_TEST
        submissions.write_classes(out, keys if numbered else [file.stem for file in files], probs, names, single_label,
                                  thresholds)
        if args.pseudo:
            count = pseudo.write_classes(out / "pseudo", files, probs, names, single_label, args.pseudo)
            print(f"pseudo labels of {count} images: train_cls.py --extra-data {out / 'pseudo'}" if count else
                  "no pseudo labels: no image is sure enough; lower --pseudo")
        print(f"{len(files)} images: {out}")


def combine_tables(args):
    """--probs without --weights: the weighted mean of tables, of other systems too. Images have single labels where
    every row adds up to 1."""
    for flag in ("source", "noisy", "tta", "soup", "pseudo", "fit_weights", "ensemble", "imgsz"):
        if getattr(args, flag) not in (None, False):
            raise UserError(f"--{flag.replace('_', '-')}: does nothing for --probs without --weights; leave it out")
    check_ensemble(args, [])
    names, keys, tables = submissions.read_tables(args.probs)
    single_label = all(map(ensemble.adds_up, tables))
    dist.print0("every row adds up to 1: a single label per image, the most probable class" if single_label else
                "rows do not add up to 1: several labels per image, the classes above --threshold")
    if single_label and args.threshold is not None:
        raise UserError("--threshold: does nothing where the most probable class is taken; leave it out")
    probs = ensemble.average(tables, args.ensemble_weights or [1.0] * len(tables))
    out = runs.new_folder(args.out or Path(args.probs[0]).parent / "predict")
    if dist.rank() == 0:
        threshold = decide.THRESHOLD["cls"] if args.threshold is None else args.threshold
        submissions.write_classes(out, keys, probs, names, single_label, threshold)
        print(f"{len(keys)} rows: {out}")


def class_probabilities(args, device, member, files):
    """One checkpoint's probabilities (N, classes) of all files, the same on every rank."""
    state, inputs = member.state, dataclasses.replace(member.inputs, imgsz=args.imgsz or member.inputs.imgsz)
    blank = np.zeros((len(files), len(state["classes"])), np.float32)
    data = cls.AugmentedImages(cls.Images(files, blank, bands=inputs.bands, limit=2 * inputs.imgsz), inputs.imgsz)
    loader = eval_loader(data, args.bs, workers=args.workers, device=device, collate=cls.collate)
    options, probs = view_options(args, decide.CLASSIFICATION_VIEWS), np.zeros(blank.shape)
    progress = tqdm(total=len(files), desc=Path(member.path).parent.name, unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            batch = engine.to_device(batch, device)
            found = decide.classify(member.net, inputs, batch, single_label=state["single_label"], **options)
            probs[batch["index"].cpu().numpy()] = found.cpu().double().numpy()
            bar.update(len(batch["index"]) * dist.world_size())
    return sum(dist.gather(probs))  # every rank has filled its own rows


if __name__ == "__main__":
    cli(main)
