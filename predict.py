"""Predictions: checkpoints in, submission, GeoTIFFs and pictures out.

    python predict.py --task seg --tta                        # newest run, its data's test_img folder
    python predict.py --task seg --tta hflip rot90 scale --merge gmean
    python predict.py --task seg --weights runs/seg/exp*/best.pt --source scene.tif --tile 512 --polygons
    python predict.py --task seg --detector runs/det/exp/best.pt     # detect, crop, segment
    python predict.py --task det --weights runs/det/exp/best.pt --tta --imgsz 1536 --source photos --tile 1024
    python predict.py --task cls --tta --weights runs/cls/*/best.pt --fit-weights
    python predict.py --task cls --probs a.csv b.csv --ensemble-weights 1.5 1    # tables alone, of any predictions
    torchrun --nproc_per_node 4 predict.py --task seg --tta   # the inputs shared out among four GPUs

Several checkpoints are averaged: folds, seeds and epochs make an ensemble.
"""
import argparse
import contextlib
import functools
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import cls, det, images, labels, seg
from data.results import masks, pseudo, submissions
from data.loader import eval_loader
from nets import backbones
from nets.blocks import fuse
from nets.unet import UNet, probabilities
from nets.yolo import YOLOv5
from utils.metrics import ensemble
from utils.ops import boxes, geometry, tta
from utils.pictures import review, table
from utils.train import checkpoint, dist, engine, runs
from utils.train.args import noise_list, float_range, int_range
from utils.errors import NumericalError, Parser, UserError, cli

NETS = {"seg": UNet, "det": YOLOv5, "cls": backbones.make}
NEEDED = {"seg": {"mean_planes"}, "det": {"category_ids"}, "cls": {"exclusive", "norm"}}  # of a checkpoint, and:
COMMON = {"classes", "bands", "scale", "imgsz", "args"}
ONLY = {  # flags that not all tasks have
    "tile": ("seg", "det"), "overlap": ("seg", "det"), "overlays": ("seg", "det"),
    "imgsz": ("det", "cls"), "ensemble_weights": ("det", "cls"), "polygons": ("seg",), "detector": ("seg",),
    "conf": ("det",), "iou": ("det",), "max_det": ("det",), "max_mb": ("det",), "probs": ("cls",),
    "fit_weights": ("cls",), "ensemble": ("cls",)}
OVERLAP = 0.25  # of windows, where the training has none of its own
TTA = {"seg": ("hflip", "vflip"), "cls": ("rot90", "rot180")}  # what --tta by itself means


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", choices=NETS, required=True)
    add("--weights", nargs="+", metavar="PATH", help="checkpoints; without: the newest run's best.pt or last.pt")
    add("--source", nargs="+", metavar="PATH|DIR|GLOB", help="images; without: the test images of the "
        "training's data")
    add("--noisy", type=noise_list, metavar="CSV:K", help="in place of --source: those of the K worst samples of a "
        "noise.csv that the checkpoint's run has held out, to be labelled anew by --pseudo")
    add("--out", metavar="DIR", help="new folder for the results; without: predict in the run's folder")
    add("--tta", nargs="*", choices=tta.NAMES, metavar="NAME", help=f"several views of every image: all combinations "
        f"of what the names offer, {', '.join(tta.NAMES)}; without names: for seg its flips, for det three sizes, one "
        f"flipped, for cls quarter turns")
    add("--tta-scales", type=float_range(0.1, 10), nargs="+", metavar="F", help=f"sizes of --tta scale; without: "
        f"{' '.join(f'{scale:g}' for scale in tta.SCALES)}")
    add("--merge", choices=(*tta.MERGES, "wbf"), help="how the views are joined; seg, cls: their probabilities, "
        "without: mean; sum is capped at 1 and needs --threshold, tsharpen averages square roots, so that a threshold "
        "of 0.5 is a probability of 0.25; det: weighted boxes fusion, without: suppression")
    add("--bs", type=int_range(1, 65536), default=8, help="images per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: half a minute's start, then faster")
    add("--workers", type=int_range(0, 256), default=2, help="loader processes per process")
    add("--project", metavar="DIR", help="where to look for the newest run; without: runs/TASK")
    add("--tile", type=int_range(16, 65536), help="larger images go through windows of this side; without: for seg "
        "twice the training size (whole after --resize), for det the training's --tile")
    add("--overlap", type=float_range(0, 0.9), help="of neighbouring windows; without: 0.25, for det the training's")
    add("--overlays", action=argparse.BooleanOptionalAction, default=True, help="pictures with the result drawn in")
    add("--threshold", type=float_range(0, 1), help="probability from which a pixel, a class is there; det: score from which "
        "a box is drawn; without: the best ones of the trainings' validations, of which --merge tsharpen takes the "
        "square roots")
    add("--pseudo", type=float_range(0.5, 1), metavar="P", help="also write what has at least this probability as labels, for "
        "--extra-data; in doubt, pixels are ignored, images left out, boxes background; not with --merge sum, max, "
        "min, tsharpen")
    add("--soup", action="store_true", help="average the checkpoints' weights instead of their predictions")
    add("--imgsz", type=int_range(32, 65536), help="det, cls, --detector: side of the net's input; without: that of the "
        "training")
    add("--ensemble-weights", type=float_range(1e-6), nargs="+", metavar="W", help="det, cls: of the checkpoints (and then of "
        "the tables)")
    add = parser.add_argument_group("segmentation").add_argument
    add("--polygons", action="store_true", help="also write the masks' outlines as GeoJSON")
    add("--detector", metavar="PATH", help="a checkpoint of train_det.py: only its boxes, a little enlarged, are cut "
        "out and segmented")
    add = parser.add_argument_group("detection").add_argument
    add("--conf", type=float_range(0, 1), help="lowest score of a detection, before it is fused with others; without: 0.01, "
        "for --detector 0.25")
    add("--iou", type=float_range(0, 1), default=0.7, help="overlap from which the lower score goes")
    add("--max-det", type=int_range(1, 100000), default=300, help="most detections per image")
    add("--max-mb", type=float_range(0.001), default=20.0, help="largest submission.json, 10^6 bytes; the best scores stay")
    add = parser.add_argument_group("classification").add_argument
    add("--probs", nargs="+", metavar="CSV", help="probabilities.csv of earlier predictions, to be averaged in")
    add("--fit-weights", action="store_true", help="find the checkpoints' weights and a threshold per class on the "
        "images that all their runs held out; both are used, and kept in ensemble.json")
    add("--ensemble", metavar="JSON", help="the ensemble.json of an earlier --fit-weights, for the same checkpoints, "
        "seen in the same way")
    args = parser.parse_args()
    for flag, tasks in ONLY.items():
        used = args.task in tasks or args.detector and flag in ("imgsz", "conf", "iou", "max_det")
        if vars(args)[flag] != parser.get_default(flag) and not used:
            raise UserError(f"--{flag.replace('_', '-')}: does nothing for --task {args.task}; leave it out")
    args.conf = (0.25 if args.detector else 0.01) if args.conf is None else args.conf
    return args


def main():
    args = parse_args()
    check_tta(args)
    device = dist.setup(args.device, patience=timedelta(days=7))  # a rank may have the one large scene
    if args.probs and not args.weights:
        with writing(args):
            return combine_tables(args)
    paths = args.weights or [runs.newest(args.project or f"runs/{args.task}", "best.pt", "last.pt")]
    check_ensemble(args, paths)
    if args.noisy:
        if args.source or len(paths) > 1:
            raise UserError("--noisy: is for one checkpoint, in place of --source; give one --weights and no --source")
        args.source = review.read_noise(*args.noisy, Path(paths[0]).parent)
    states = [checkpoint.load(path) for path in paths]
    for path, state in zip(paths, states):
        if state["task"] != args.task:
            raise UserError(f"{path}: trained for --task {state['task']}; choose that, or other --weights")
    if args.soup:
        paths, states = paths[:1], [checkpoint.average(paths, states)]
    nets = load_nets(args, device, paths, states)
    with writing(args):
        {"seg": predict_seg, "det": predict_det, "cls": predict_cls}[args.task](args, device, paths, states, nets)
    dist.barrier()


@contextlib.contextmanager
def writing(args):
    """Answers for results that cannot be written; what cannot be read has been answered before."""
    try:
        yield
    except ConnectionError:  # to a loader worker or to another rank
        raise
    except OSError as error:
        what = error.filename or args.out or "the results"
        raise UserError(f"{what}: cannot be written ({error.strerror or error}); make room, or choose another --out"
                        ) from None


def check_tta(args):
    """Whether the flags of test-time augmentation go together."""
    if args.merge and (args.merge == "wbf") != (args.task == "det"):
        raise UserError(f"--merge {args.merge}: not for --task {args.task}; wbf is for boxes, the others are for "
                        f"probabilities")
    if args.merge and args.tta is None:
        raise UserError("--merge: says how the views of --tta are joined; give that too")
    # for exclusive classes too: rescaling to 1 turns only sum into a mean, and mean exists already
    if args.pseudo and args.merge in ("sum", "max", "min", "tsharpen"):
        raise UserError(f"--pseudo: what --merge {args.merge} makes are no probabilities; take mean or gmean")
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
    nets, tables = 1 if args.soup else len(paths), len(args.probs or ())
    if len(paths) + tables == 1 and (args.soup or args.ensemble_weights):
        raise UserError(f"{'--soup' if args.soup else '--ensemble-weights'}: is for several checkpoints; leave it out, "
                        f"or give more")
    if args.soup and given and not (args.ensemble_weights and tables):
        raise UserError(f"--soup: makes one net of the checkpoints, there is nothing to weigh; leave it out, or "
                        f"{given[0]}")
    if args.threshold is not None and (args.fit_weights or args.ensemble):
        raise UserError(f"--threshold: {given[0]} brings thresholds of its own; leave one out")
    if tables and given and not args.ensemble_weights:
        raise UserError(f"{given[0]}: is for checkpoints, --probs come without their held-out images; give "
                        f"--ensemble-weights instead")
    if args.ensemble_weights and len(args.ensemble_weights) != nets + tables:
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {nets} checkpoints and {tables} tables; "
                        f"give one each")


# ---- what all tasks share ----
def load_nets(args, device, paths, states):
    """The checkpoints' nets on the device, batch norms folded away, in half precision where the hardware has it: the
    same results, several times faster. UserError for checkpoints that cannot be used, or not together."""
    dtype, nets = engine.precision(args.amp, device) or torch.float32, []
    if args.compile:  # the weights as constants, which CPUs get packed; several nets would be compiled one by one
        torch._inductor.config.freezing = device.type == "cpu" and len(paths) == 1
    for path, state in zip(paths, states):
        try:
            net = NETS[state["task"]](**state["arch"]["kwargs"])
            known = COMMON | NEEDED[state["task"]] <= state.keys()
            np.broadcast_to(np.asarray(state.get("threshold") or 0.5, float), np.size(state["classes"]))
        except (TypeError, ValueError, KeyError):
            known = False
        if not known:
            raise UserError(checkpoint.OTHER_VERSION.format(path))
        if state["classes"] != states[0]["classes"]:
            classes = state["classes"]
            shown = f"{classes} classes" if isinstance(classes, int) else f"the classes {', '.join(classes)}"
            raise UserError(f"{path}: has {shown}, {paths[0]} others; an ensemble needs the same")
        if state.get("exclusive") != states[0].get("exclusive"):
            raise UserError(f"{path}: is for {'one class' if state['exclusive'] else 'several classes'} an image, "
                            f"{paths[0]} is not; predict them apart")
        checkpoint.load_weights(net, state, path)
        nets.append(fuse(net).to(device, dtype, memory_format=torch.channels_last))
        if args.compile:
            nets[-1].compile(dynamic=False if state["task"] == "seg" else None)
    return nets


def all_bands(states):
    """What to read of an image: the bands (from 1, sorted) that any of the checkpoints needs."""
    return sorted({band for state in states for band in state["bands"]})


def net_input(raw, bands, state, device):
    """Images (B, len(bands), H, W) in the files' numbers -> the checkpoint's bands of them, scaled, on the device."""
    chosen = [bands.index(band) for band in state["bands"]]
    return raw[:, chosen].to(device, non_blocking=True).float() / state["scale"]


def run(net, x):
    """The net's output for x, in the net's precision and memory format."""
    return net(x.to(next(net.parameters()).dtype, memory_format=torch.channels_last))


def check_finite(probs):
    """Raises NumericalError where what a net said is no number: it would be taken for an empty answer."""
    if not probs.isfinite().all():
        raise NumericalError("the net's output is not finite; predict with --amp off")


def make_passes(args, task, size, *, stride=1, factor=1.0):
    """-> the passes [(matrix, (height, width))] over an image of `size` that --tta asks for. See utils.tta."""
    if task == "det" and args.tta == []:
        return tta.yolov5(size, stride=stride, factor=factor)
    names = TTA[task] if args.tta == [] else args.tta or ()
    return tta.tta_views(names, size, stride=stride, scales=args.tta_scales or tta.SCALES, factor=factor)


def best_threshold(args, states):
    """--threshold, or else the mean of those that runs found best in their last validation; of none, 0.5, det 0.25.
    They are of plain probabilities: of tsharpen, a mean of square roots, their square roots say the same.
    """
    exclusive = states[0].get("exclusive") or args.task == "seg" and states[0]["classes"] > 1
    if args.threshold is not None:
        if exclusive:
            raise UserError("--threshold: does nothing where classes exclude each other; leave it out")
        return args.threshold
    fitted = args.fit_weights or args.ensemble  # both bring thresholds fitted to the merged views
    if args.merge == "sum" and not exclusive and not fitted:
        raise UserError("--merge sum: the trainings' thresholds are of single probabilities, not of sums; give "
                        "--threshold")
    found = [state["threshold"] for state in states if state.get("threshold") is not None]
    threshold = np.mean(found, axis=0) if found else 0.25 if args.task == "det" else 0.5
    return np.sqrt(threshold) if args.merge == "tsharpen" else threshold


# ---- segmentation ----
def predict_seg(args, device, paths, states, nets):
    """Masks as GeoTIFF, overlays, polygons, and the wildfire competition's y_pred.pkl."""
    predict = seg_ensemble(args, device, states, nets)
    files = images.find_sources(args.source, Path(states[0]["args"]["data"]) / "test_img", states[0]["scale"])
    if len({bool(state.get("resize")) for state in states}) > 1:
        raise UserError("--weights: some are trained on whole images (--resize), others on crops; predict them apart")
    # trained on whole images, a net gets whole images
    tile = args.tile or (2**31 if states[0].get("resize") else 2 * max(state["imgsz"] for state in states))
    bands = all_bands(states)
    sizes = {}
    for file in files:
        sizes[file] = images.size(file)
        if sizes[file][0] < bands[-1]:
            raise UserError(f"{file}: has {sizes[file][0]} bands, the checkpoint needs band {bands[-1]}; choose "
                            f"another --source")
    unsure = pseudo.unsure_value(states[0]["classes"], states[0]["args"].get("ignore")) if args.pseudo else None
    threshold = best_threshold(args, states)
    parts = find_parts(args, device, files) if args.detector else {}
    out = runs.new_folder(args.out or Path(paths[0]).parent / "predict")
    writer = masks.MaskWriter(out, overlays=states[0]["bands"] if args.overlays else None, polygons=args.polygons,
                              unsure=unsure)

    def pieces(file, part):
        """Yields (row, column, class map (h, w), labels) of a part (y, x, height, width) of an image."""
        for y, x, probs in seg.predict_windows(file, part, bands, predict, tile=tile, bs=args.bs, workers=args.workers,
                                               overlap=OVERLAP if args.overlap is None else args.overlap):
            yield y, x, *(decided[0] for decided in decide(probs[None], threshold, args.pseudo, unsure))

    at_once = {file for file in files if max(sizes[file][1:]) <= tile and not args.detector}
    small, large = ([file for file in files if (file in at_once) is side] for side in (True, False))
    loader = eval_loader(seg.Tiles(small, bands), args.bs, shapes=[sizes[file] for file in small], workers=args.workers,
                         device=device)
    progress = tqdm(total=len(files), desc="predict", unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            decided = decide(predict(batch["image"]), threshold, args.pseudo, unsure)
            for k, i in enumerate(batch["index"].tolist()):
                writer.write(small[i], [(0, 0, *(maps[k] for maps in decided))])
            bar.update(len(batch["index"]) * dist.world_size())
        for file in large[dist.rank()::dist.world_size()]:
            if args.detector:  # pixels outside the detections are ignored in the pseudo labels
                writer.write_parts(file, (piece for part in parts[file] for piece in pieces(file, part)))
            else:
                writer.write(file, pieces(file, (0, 0, *sizes[file][1:])))
            bar.update(dist.world_size())
    dist.barrier()
    if dist.rank() == 0:
        writer.finish(files)
        if args.pseudo:
            print(f"pseudo labels: train_seg.py --extra-data {out / 'pseudo'} --ignore {unsure}")
        print(f"{len(files)} images: {out}")


def seg_ensemble(args, device, states, nets):
    """-> predict(images (B, len(all_bands), H, W) in the files' numbers) -> mean probabilities (B, K, H, W) fp32, for
    any H and W."""
    bands = all_bands(states)

    def predict(raw):
        count, total = len(raw), 0
        if args.compile:  # one compilation per shape of the passes: a last, smaller batch is filled up
            raw = raw[torch.arange(args.bs) % count]
        for net, state in zip(nets, states):
            x = net_input(raw, bands, state, device)
            x = seg.add_mean_planes(x) if state["mean_planes"] else x
            views = functools.partial(seg_views, args, net, state["classes"] > 1)
            total = total + (tta.at_size(views, x, state["imgsz"]) if state.get("resize") else views(x))
        check_finite(total)
        return (total / len(nets))[:count]
    return predict


def seg_views(args, net, exclusive, x):
    """One net's probabilities (B, K, H, W) fp32, its views merged; sides are filled up to multiples of its stride."""
    height, width = x.shape[2:]
    padded = [-(-side // net.stride) * net.stride for side in (height, width)]
    if padded != [height, width]:
        x = geometry.warp(x, geometry.translate(0, 0), padded, border="reflect")
    maps = tta.maps(lambda view: probabilities(run(net, view)), x, make_passes(args, "seg", padded, stride=net.stride))
    return tta.merge(maps, args.merge or "mean", exclusive=exclusive)[..., :height, :width]


def decide(probs, threshold, sure, unsure):
    """Probabilities (B, K, H, W) -> [uint8 class maps (B, H, W)], and the pseudo labels, where `sure` is their least
    probability, and `unsure` the value where it is less."""
    mask = (probs[:, 0] > threshold if probs.shape[1] == 1 else probs.argmax(1)).to(torch.uint8).cpu()
    return [mask.numpy(), *([pseudo.sure_mask(probs, mask, sure, unsure).numpy()] if sure else [])]


def find_parts(args, device, files):
    """{file: what --detector finds in it, as [(y, x, height, width)], the surest last}, its boxes with a margin of a
    tenth at each side: an object's edge, and what is around it, tell where it ends."""
    state = checkpoint.load(args.detector)
    if state["task"] != "det":
        raise UserError(f"{args.detector}: trained for --task {state['task']}; give a checkpoint of train_det.py")
    nets = load_nets(args, device, [args.detector], [state])
    views, parts = det_views(args, [state], nets, files), {}
    for file, size, rows in zip(files, views.sizes, detect(args, device, [state], nets, views)):
        margin = 0.1 * (rows[:, 2:4] - rows[:, :2])
        grown = boxes.clip(torch.cat((rows[:, :2] - margin, rows[:, 2:4] + margin), 1), *size)
        corners = torch.cat((grown[:, :2].floor(), grown[:, 2:].ceil()), 1).int().flip(0).tolist()
        parts[file] = [(y1, x1, y2 - y1, x2 - x1) for x1, y1, x2, y2 in corners]
    return parts


# ---- detection ----
def predict_det(args, device, paths, states, nets):
    """Boxes as the parking-lot competition's submission, as COCO's and YOLO's files, and drawn into the images."""
    files = images.find_sources(args.source, labels.test_folder(states[0]["args"]["data"]), states[0]["scale"])
    views = det_views(args, states, nets, files)
    ids = submissions.image_ids(files, files[0].parent, others=args.source is not None)
    out = runs.new_folder(args.out or Path(paths[0]).parent / "predict")
    results = detect(args, device, states, nets, views)

    names, threshold = states[0]["classes"], best_threshold(args, states)
    dropped = submissions.write_boxes(out, files, views.sizes, results, ids=ids,
                                      category_ids=states[0]["category_ids"], max_mb=args.max_mb)
    if args.overlays:
        submissions.draw_boxes(out / "overlays", files, views.sizes, results, names=names, bands=states[0]["bands"],
                               threshold=threshold)
    if dist.rank() == 0:
        if args.pseudo:
            count, boxed = pseudo.write_boxes(out / "pseudo", files, views.sizes, results, names,
                                              states[0]["category_ids"], args.pseudo)
            print(f"pseudo labels of {count} images, {boxed} boxes: train_det.py --extra-data {out / 'pseudo'}"
                  if count else "no pseudo labels: no box is sure enough; lower --pseudo")
        note = f", of which the {dropped} of lowest score are not in submission.json (--max-mb)" if dropped else ""
        print(f"{len(files)} images, {sum(map(len, results))} detections{note}: {out}")


def det_views(args, states, nets, files):
    """What the nets are to look at."""
    imgsz, stride = args.imgsz or max(state["imgsz"] for state in states), max(net.stride for net in nets)
    trained = {state["args"].get("tile") for state in states}
    if len(trained) > 1 and not args.tile:
        raise UserError("--weights: were trained with windows of different sizes, or some without; choose by --tile")
    tile = args.tile or trained.pop()
    if args.task == "det" and args.overlap is not None and not tile:
        raise UserError("--overlap: is of windows; leave it out, or give --tile")
    overlap = max(state["args"].get("overlap", OVERLAP) for state in states) if args.overlap is None else args.overlap
    return det.TiledImages(files, bands=all_bands(states), imgsz=imgsz, stride=stride, tile=tile, overlap=overlap)


def detect(args, device, states, nets, views):
    """-> the detections (n, 6) in each of the views' files, in its pixels; the same on every rank."""
    predict = det_ensemble(args, device, states, nets)
    loader = eval_loader(views, args.bs, shapes=views.shapes, workers=args.workers, device=device, collate=det.collate)
    found = {}  # view -> detections of each checkpoint
    progress = tqdm(total=len(views), desc="predict", unit="view", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            per_member = [[det.restore(rows.cpu(), matrix) for rows, matrix in zip(detections, batch["matrix"])]
                          for detections in predict(batch["image"])]
            found |= zip(batch["index"].tolist(), zip(*per_member))
            bar.update(len(batch["image"]) * dist.world_size())
    found = {view: rows for part in dist.gather(found) for view, rows in part.items()}
    return [views.merge(i, found, iou=args.iou, max_det=args.max_det, weights=args.ensemble_weights)
            for i in range(len(views.files))]


def det_ensemble(args, device, states, nets):
    """-> predict(images (B, len(all_bands), H, W) in the files' numbers) -> per checkpoint a list with the detections
    (n, 6) of each image, in pixels of the batch."""
    bands, largest = all_bands(states), max(state["imgsz"] for state in states)
    limits = dict(conf=args.conf, iou=args.iou, max_det=args.max_det)

    def predict(raw):
        results = []
        for net, state in zip(nets, states):
            x = net_input(raw, bands, state, device).clamp_(0, 1)
            factor = 1.0 if args.imgsz else state["imgsz"] / largest  # each at the size that it was trained for
            passes = make_passes(args, "det", x.shape[2:], stride=net.stride, factor=factor)
            found = list(tta.tta_boxes(lambda view: run(net, view), x, passes))  # resized in fp32: CPUs cannot in bf16
            for rows in found:
                check_finite(rows)
            if args.merge == "wbf":
                by_pass = [boxes.nms(rows, **limits) for rows in found]
                results.append([boxes.wbf(of_image)[:args.max_det] for of_image in zip(*by_pass)])
            else:
                results.append(boxes.nms(torch.cat(found, 1), **limits))
        return results
    return predict


# ---- classification ----
def predict_cls(args, device, paths, states, nets):
    """The competition's submission, probabilities, weighted ensembles of checkpoints and tables."""
    names, exclusive = states[0]["classes"], states[0]["exclusive"]
    shares = args.ensemble_weights or [1.0] * (len(paths) + len(args.probs or ()))
    thresholds = best_threshold(args, states)
    views = table.flags({flag: vars(args)[flag] for flag in ("tta", "tta_scales", "merge", "imgsz")}, {})
    if args.ensemble:
        shares, thresholds = ensemble.read(args.ensemble, paths, names, exclusive, flags=views)
        paths, states, nets, shares = zip(*(m for m in zip(paths, states, nets, shares) if m[-1] > 0))
    data = Path(states[0]["args"]["data"])
    competition = data / "test_dirty_mnist_2nd"
    tests = competition if competition.is_dir() else data / "test"
    files = images.find_sources(args.source, tests, states[0]["scale"])
    keys = [submissions.index_of(file.stem) for file in files]
    file_of = dict(zip(keys, files))  # of several with one number the last
    twice = next((file for key, file in zip(keys, files) if file_of[key] != file), None)
    if twice:
        raise UserError(f"{twice}: another image has the number {int(twice.stem)} too; predict them in two runs")
    _, _, tables = submissions.read_tables(args.probs or (), names, keys)
    known, labels = cls.held_out(paths, states) if args.fit_weights else ([], None)
    for state in states:
        cls.check_bands(known + files, state["bands"])
    out = runs.new_folder(args.out or Path(paths[0]).parent / "predict")

    members = [class_probabilities(args, device, net, state, known + files, Path(path).parent.name)
               for net, path, state in zip(nets, paths, states)]
    if args.fit_weights:
        shares, thresholds = ensemble.fit([member[:len(known)] for member in members], labels, exclusive)
        if dist.rank() == 0:
            ensemble.write(out / "ensemble.json", paths, shares, names, () if exclusive else thresholds, flags=views)
    probs = ensemble.average([*(member[len(known):] for member in members), *tables], shares)
    if dist.rank() == 0:
        written = keys if competition.is_dir() else [file.stem for file in files]
        submissions.write_classes(out, written, probs, names, exclusive, thresholds)
        if args.pseudo:
            count = pseudo.write_classes(out / "pseudo", files, probs, names, exclusive, args.pseudo)
            print(f"pseudo labels of {count} images: train_cls.py --extra-data {out / 'pseudo'}" if count else
                  "no pseudo labels: no image is sure enough; lower --pseudo")
        print(f"{len(files)} images: {out}")


def combine_tables(args):
    """--probs without --weights: the weighted mean of tables alone, of other systems too. Classes exclude each other
    where every row adds up to 1."""
    for flag in ("source", "noisy", "tta", "soup", "pseudo", "fit_weights", "ensemble", "imgsz"):
        if getattr(args, flag) not in (None, False):
            raise UserError(f"--{flag.replace('_', '-')}: does nothing for --probs without --weights; leave it out")
    check_ensemble(args, [])
    names, keys, tables = submissions.read_tables(args.probs)
    exclusive = all(map(ensemble.adds_up, tables))
    dist.print0("every row adds up to 1: one class an image, the most probable" if exclusive else
                "rows do not add up to 1: several classes an image, those above --threshold")
    if exclusive and args.threshold is not None:
        raise UserError("--threshold: does nothing where classes exclude each other; leave it out")
    probs = ensemble.average(tables, args.ensemble_weights or [1.0] * len(tables))
    out = runs.new_folder(args.out or Path(args.probs[0]).parent / "predict")
    if dist.rank() == 0:
        submissions.write_classes(out, keys, probs, names, exclusive, 0.5 if args.threshold is None else args.threshold)
        print(f"{len(keys)} rows: {out}")


def class_probabilities(args, device, net, state, files, name):
    """One net's probabilities (N, classes) of all files, the same on every rank."""
    imgsz = args.imgsz or state["imgsz"]
    blank = np.zeros((len(files), len(state["classes"])), np.float32)
    data = cls.AugmentedImages(cls.Images(files, blank, bands=state["bands"], limit=2 * imgsz), imgsz)
    loader = eval_loader(data, args.bs, workers=args.workers, device=device, collate=cls.collate)
    passes = make_passes(args, "cls", (imgsz, imgsz))  # square ones
    probs = np.zeros((len(files), len(state["classes"])))
    progress = tqdm(total=len(files), desc=name, unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            batch = engine.to_device(batch, device)
            views = (cls.to_input(batch, size, state["scale"], *state["norm"], turn=turn) for turn, (size, _) in passes)
            logits = (run(net, x).float() for x in views)
            found = tta.merge((z.softmax(1) if state["exclusive"] else z.sigmoid() for z in logits),
                              args.merge or "mean", exclusive=state["exclusive"])
            check_finite(found)
            probs[batch["index"].cpu().numpy()] = found.cpu().double().numpy()
            bar.update(len(batch["index"]) * dist.world_size())
    return sum(dist.gather(probs))  # every rank has filled its own rows


if __name__ == "__main__":
    cli(main)
