"""Predictions: checkpoints in, submission, GeoTIFFs and pictures out.

    python predict.py --task seg --tta                        # newest run, its data's test_img folder
    python predict.py --task seg --weights runs/seg/exp*/best.pt --source scene.tif --tile 512 --polygons
    python predict.py --task seg --submission sample_submission.csv  # the sample's rows and columns, filled
    python predict.py --task seg --detector runs/det/exp/best.pt     # detect, crop, segment
    python predict.py --task det --weights runs/det/exp/best.pt --tta --imgsz 1536 --source photos --tile 1024
    python predict.py --task cls --tta --weights runs/cls/exp*/best.pt --ensemble-weights 1.5 1 1
    torchrun --nproc_per_node 4 predict.py --task seg --tta   # the inputs are shared among four GPUs

Several checkpoints are averaged: folds, seeds and epochs make an ensemble. How a net is fed and what its output means
is defined in data/<task>.py (Input) and in utils/ops/decide.py, for training and prediction alike.
"""
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import nets
from data import bad, cls, det, images, labels, seg, units
from data.loader import eval_loader
from data.results import masks, pseudo, sample, submissions
from nets import pretrained
from nets.blocks import fuse
from utils import flags
from utils.errors import PartialError, UserError, cli
from utils.files import write_text
from utils.ops import boxes, decide, tta
from utils.pictures import review
from utils.train import checkpoint, dist, runs
from utils.train.state import precision, to_device

INPUT = {"seg": seg.Input, "det": det.Input, "cls": cls.Input}
TEST_FOLDER = {"seg": seg.test_folder, "det": labels.test_folder, "cls": cls.test_folder}
NEEDED = {"seg": (), "det": ("category_ids",), "cls": ("single_label",)}  # of a checkpoint, beside what all have
OVERLAP = 0.25  # of neighbouring windows, if the training had no --overlap


class Member(NamedTuple):
    """A checkpoint that predicts. state: what the file holds; inputs: the INPUT of its task."""
    path: str
    state: dict
    net: Any
    inputs: Any


class Sources(NamedTuple):
    """What is predicted. files: all images; failed: {file: the reason} of those that cannot be read; good: the others;
    ids: of all files, None where no result has ids; wanted: the Sample of --submission, or None."""
    files: list
    failed: dict
    good: list
    ids: Any
    wanted: Any


def main():
    args = flags.parse(__doc__.splitlines()[0])
    device = dist.setup(args.device)
    paths = args.weights or [runs.newest(args.project or f"runs/{args.task}", "best.pt", "last.pt")]
    if args.noisy:
        args.source = review.read_noise(*args.noisy, Path(paths[0]).parent)
    members = load_members(args, args.task, device, paths, names=args.names)
    tasks = {"seg": predict_seg, "det": predict_det, "cls": predict_cls}
    out, (files, failed, _, _, wanted), results = tasks[args.task](args, device, members)
    if wanted:
        failed |= wanted.lost
        if dist.is_main():
            sample.write(wanted, out, results)
    dist.barrier()
    if failed:
        report_failed(out, files, failed)


# ---- what all tasks share --------------------------------------------------------------------------------------------
def load_members(args, task, device, paths, names=None):
    """-> a Member per checkpoint, its net on the device with batch norms folded away, in half precision where the
    hardware has it. names: of `pretrained.checkpoint`. UserError for checkpoints that cannot be used, or cannot be used
    together."""
    states = [pretrained.checkpoint(path, task, names) for path in paths]
    dtype, members = precision(args.amp, device) or torch.float32, []
    if args.compile:  # the weights as constants, which CPUs get packed; several nets would be compiled one by one
        torch._inductor.config.freezing = device.type == "cpu" and len(paths) == 1
    for path, state in zip(paths, states):
        if state["task"] != task:
            raise UserError(f"{path}: trained for --task {state['task']}; give a checkpoint of train_{task}.py")
        try:
            with torch.device("meta"):  # what does not fit is refused before it gets memory
                checkpoint.load_weights(nets.build(state["arch"]), state, path)
            net, inputs, classes = nets.build(state["arch"]), INPUT[task](**state["input"]), state["classes"]
            threshold = np.broadcast_to(np.asarray(state.get("threshold") or 0.5, float), np.size(classes))
            number, kwargs = classes if isinstance(classes, int) else len(classes), state["arch"]["kwargs"]
            if kwargs.get("in_chans", inputs.channels) != inputs.channels or \
                    not ((0 <= threshold) & (threshold <= 1)).all() or \
                    kwargs.get("classes", kwargs.get("num_classes", number)) != number:
                raise ValueError("its net, input, classes and threshold do not belong together")
            [Path(state["args"]["data"]), *(state[key] for key in NEEDED[args.task])]
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(checkpoint.OTHER_VERSION.format(path) + f" ({error})") from None
        for key in ("classes", "single_label"):
            value, first = (one.get(key) for one in (state, states[0]))
            if value != first:
                raise UserError(f"{path}: has {key} {value}, but {paths[0]} has {first}; predict them apart")
        checkpoint.load_weights(net, state, path)
        net = fuse(net).to(device, dtype, memory_format=torch.channels_last)
        if args.compile:
            net.compile(dynamic=False if task == "seg" else None)
        members.append(Member(path, state, net, inputs))
    return members


def view_options(args, members):
    """The keyword arguments of `decide.segment` and `decide.classify` for the views that --tta asks for; without names
    those that the first checkpoint's training drew."""
    names = args.tta or ()
    if args.tta == []:
        names = decide.drawn_views(args.task, members[0].state["args"])
        dist.print0(f"--tta {' '.join(names)}: the flips and turns that training drew")
    return dict(names=names, scales=args.tta_scales or tta.SCALES, merge=args.merge or "mean")


def all_bands(members):
    """What to read of an image: the bands (from 1, sorted) that any of the checkpoints needs."""
    return sorted({band for member in members for band in member.inputs.bands})


def find_sources(args, members, longest=math.inf):
    """-> the Sources: of --source, or the test images of the first training's data. longest: see `bad.decode`."""
    state = members[0].state
    files = images.find_sources(args.source, TEST_FOLDER[args.task](state["args"]["data"]), lambda file: (
        file.with_suffix("") if args.task == "cls" else file.stem))  # the others' results are files of this name
    failed = dist.broadcast(dist.is_main() and bad.unreadable(files, all_bands(members), longest))
    check_some(files, failed)
    good = [file for file in files if file not in failed]
    units.check(good, members[0].inputs)
    ids = wanted = None
    if args.submission or args.task == "det":
        ids = submissions.image_ids(files, others=args.source is not None, listed=args.ids,
                                    data=args.source and state["args"]["data"])
    if args.submission:
        names = [] if args.task == "seg" else state["classes"]
        numbers = state.get("category_ids") or (range(len(names)) if names else range(1, max(state["classes"], 2)))
        wanted = sample.read(args.submission, files, ids, task=args.task, names=names, numbers=numbers, rle=args.rle)
    return Sources(files, failed, good, ids, wanted)


def check_some(files, failed):
    """UserError if there is no file that can be predicted."""
    if len(failed) == len(files):
        raise UserError(failed[files[0]])


def report_failed(out, files, failed):
    """Names the files that could not be predicted, all of them in OUT/failed.txt. Raises PartialError."""
    if dist.is_main():
        write_text(out / "failed.txt", "".join(f"{reason}\n" for reason in failed.values()))
        print("\n".join(["not predicted:", *list(failed.values())[:20], f"all in {out / 'failed.txt'}"]))
    raise PartialError(f"{len(failed)} of {len({*files, *failed})} images cannot be read and were not predicted, see "
                       f"{out / 'failed.txt'}; replace them and predict again, or use the results without them")


def new_folder(args, path):
    """The folder of the results: --out, or `predict` beside the file at `path`."""
    return runs.new_folder(args.out or Path(path).parent / "predict")


def best_threshold(args, members, single_label=False):
    """--threshold, or else the mean of the thresholds that the checkpoints store; the default of the task without any.
    tsharpen averages sqrt(p), so the threshold is sqrt(threshold)."""
    if args.threshold is not None:
        if single_label:
            raise UserError("--threshold: does nothing where the most probable class is taken; leave it out")
        return args.threshold
    if args.merge == "sum" and not single_label:
        raise UserError("--merge sum: the trainings' thresholds are of single probabilities, not of sums; give "
                        "--threshold")
    found = [m.state["threshold"] for m in members if m.state.get("threshold") is not None]
    threshold = np.mean(found, axis=0) if found else decide.THRESHOLD[args.task]
    return np.sqrt(threshold) if args.merge == "tsharpen" else threshold


# ---- segmentation ----------------------------------------------------------------------------------------------------
def predict_seg(args, device, members):
    """Masks as GeoTIFF, overlays, polygons, and the wildfire competition's y_pred.pkl."""
    first, bands = members[0], all_bands(members)
    if len({member.inputs.resize for member in members}) > 1:
        raise UserError("--weights: some are trained on whole images (--resize), others on crops; predict them apart")
    # trained on whole images, a net gets whole images
    tile = args.tile or (2**31 if first.inputs.resize else 2 * max(member.inputs.imgsz for member in members))
    overlap = OVERLAP if args.overlap is None else args.overlap
    # scenes are not read twice: what is wrong with them is found when they are predicted
    sources = find_sources(args, members, longest=math.inf if args.detector else tile)
    files, failed, good = sources[:3]
    sizes = {file: images.size(file) for file in good}
    threshold = best_threshold(args, members, single_label=first.state["classes"] > 1)
    views = view_options(args, members)
    parts = find_parts(args, device, good) if args.detector else {}
    out = new_folder(args, members[0].path)
    writer = masks.MaskWriter(out, overlays=first.inputs.bands if args.overlays else None, polygons=args.polygons,
                              pseudo=bool(args.pseudo))

    def predict(raw):
        """Images (B, len(bands), H, W) in the files' numbers -> the mean probabilities (B, K, H, W) of the members."""
        count = len(raw)
        if args.compile:  # one compilation per shape of the views: a last, smaller batch is filled up
            raw = raw[torch.arange(args.bs) % count]
        raw = raw.to(device, non_blocking=True)
        total = sum(decide.segment(m.net, m.inputs(raw, bands), side=m.inputs.side, **views) for m in members)
        return decide.background(total / len(members), images.void(raw))[:count]

    def maps(probs):
        """Probabilities (B, K, H, W) -> [class maps (B, H, W) uint8, and with --pseudo those of the labels]."""
        mask = decide.masks(probs, threshold).cpu()
        return [mask.numpy(), *([pseudo.sure_mask(probs, mask, args.pseudo).numpy()] if args.pseudo else [])]

    def pieces(file, part):
        """Yields (row, column, class map (h, w), labels) of a part (y, x, height, width) of an image."""
        for y, x, probs in seg.predict_windows(file, part, bands, predict, tile=tile, bs=args.bs, workers=args.workers,
                                               overlap=overlap):
            yield y, x, *(found[0] for found in maps(probs[None]))

    small, large = [], []
    for file in good:
        (large if args.detector or max(sizes[file][1:]) > tile else small).append(file)
    loader = eval_loader(seg.Tiles(small, bands), args.bs, shapes=[sizes[file] for file in small], workers=args.workers,
                         device=device)
    progress = tqdm(total=len(good), desc="predict", unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            found = maps(predict(batch["image"]))
            for k, i in enumerate(batch["index"].tolist()):
                writer.write(small[i], [(0, 0, *(values[k] for values in found))])
            bar.update(len(batch["index"]) * dist.world_size())
        for file in large[dist.rank()::dist.world_size()]:
            try:
                if args.detector:  # pixels outside the detections are ignored in the pseudo labels
                    writer.write_parts(file, (piece for part in parts[file] for piece in pieces(file, part)))
                else:
                    writer.write(file, pieces(file, (0, 0, *sizes[file][1:])))
            except UserError:
                _, failed[file] = bad.attempt(bad.decode, file, bands)
                if not failed[file]:  # it is not the scene that is at fault
                    raise
            bar.update(dist.world_size())
    failed |= dist.gather_dicts(failed)
    check_some(files, failed)
    if dist.is_main():
        writer.finish(files, failed)
        if args.pseudo:
            print(f"pseudo labels: train_seg.py --extra-data {out / 'pseudo'}")
        print(f"{len(files) - len(failed)} images: {out}")
    made = {file: out / "masks" / f"{file.stem}.tif" for file in files if file not in failed}
    return out, sources, made


def find_parts(args, device, files):
    """{file: the boxes of --detector in it, as [(y, x, height, width)], the highest score last}, with a margin of a
    tenth on each side: the surroundings of an object show where it ends."""
    members = load_members(args, "det", device, [args.detector])
    views, parts = det_views(args, members, files), {}
    for file, size, rows in zip(files, views.sizes, detect(args, device, members, views)):
        margin = 0.1 * boxes.sides(rows)
        grown = boxes.clip(torch.cat(((rows[:, :2] - margin).floor(), (rows[:, 2:4] + margin).ceil()), 1), *size)
        parts[file] = [(y1, x1, y2 - y1, x2 - x1) for x1, y1, x2, y2 in grown.int().flip(0).tolist()]
    return parts


# ---- detection -------------------------------------------------------------------------------------------------------
def predict_det(args, device, members):
    """Boxes as the parking-lot competition's submission, as COCO's and YOLO's files, and drawn into the images."""
    state, sources = members[0].state, find_sources(args, members)
    files, _, good, ids, _ = sources
    names, category_ids, threshold = state["classes"], state["category_ids"], best_threshold(args, members)
    views = det_views(args, members, good)
    out = new_folder(args, members[0].path)
    results = detect(args, device, members, views)
    found = dict.fromkeys(files, ((1, 1), torch.zeros(0, 6))) | dict(zip(good, zip(views.sizes, results)))
    dropped = submissions.write_boxes(out, files, *zip(*found.values()), ids=ids, category_ids=category_ids,
                                      max_mb=args.max_mb)
    if args.overlays:
        submissions.draw_boxes(out / "overlays", good, results, names=names, threshold=threshold,
                               bands=members[0].inputs.bands)
    if dist.is_main():
        if args.pseudo:
            count, boxed = pseudo.write_boxes(out / "pseudo", good, views.sizes, results, names, category_ids,
                                              args.pseudo)
            print(f"pseudo labels of {count} images, {boxed} boxes: train_det.py --extra-data {out / 'pseudo'}"
                  if count else "no pseudo labels: no box is sure enough; lower --pseudo")
        note = f", of which the {dropped} of lowest score are not in submission.json (--max-mb)" if dropped else ""
        print(f"{len(good)} images, {sum(map(len, results))} detections{note}: {out}")
    return out, sources, dict(zip(good, results))


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
    border = max(member.state["args"].get("canvas_border", 0.5) for member in members)  # 0: as YOLOv5 itself predicts
    return det.TiledImages(files, bands=all_bands(members), imgsz=imgsz, tile=tile, overlap=overlap, border=border,
                           stride=max(member.net.stride for member in members), enlarge=bool(args.imgsz or border))


def detect(args, device, members, views):
    """-> the detections (n, 6) in each of the views' files, in its pixels; the same on every rank."""
    bands, largest = all_bands(members), max(member.inputs.imgsz for member in members)
    make_views = tta.yolov5 if args.tta == [] else functools.partial(
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
    """The competition's submission and the probabilities, weighted means over the checkpoints."""
    names, single_label = members[0].state["classes"], members[0].state["single_label"]
    thresholds, sources = best_threshold(args, members, single_label), find_sources(args, members)
    files, failed, good = sources[:3]
    keys = [file.stem for file in files]
    if len(set(keys)) < len(keys):  # the folders tell them apart
        stems = [os.path.abspath(file.with_suffix("")) for file in files]
        keys = [os.path.relpath(stem, os.path.commonpath(stems)) for stem in stems]
    if cls.test_folder(members[0].state["args"]["data"]).name == cls.COMPETITION_TEST:
        keys = submissions.keys_of(keys)
    out = new_folder(args, members[0].path)
    probs = np.average([class_probabilities(args, device, member, good) for member in members], axis=0,
                       weights=args.ensemble_weights)
    # an image that cannot be read has no class, or where it must have one the most frequent
    rows = np.full((len(files), len(names)), probs.mean(0) * single_label)
    rows[[file not in failed for file in files]] = probs
    decided = submissions.decide(rows, single_label, thresholds)
    if dist.is_main():
        submissions.write_classes(out, keys, names, decided, rows)
        if args.pseudo:
            count = pseudo.write_classes(out / "pseudo", good, probs, names, single_label, args.pseudo)
            print(f"pseudo labels of {count} images: train_cls.py --extra-data {out / 'pseudo'}" if count else
                  "no pseudo labels: no image is sure enough; lower --pseudo")
        print(f"{len(good)} images: {out}")
    return out, sources, {file: pair for file, *pair in zip(files, decided, rows) if file not in failed}


def class_probabilities(args, device, member, files):
    """One checkpoint's probabilities (N, classes) of all files, the same on every rank."""
    state, inputs = member.state, dataclasses.replace(member.inputs, imgsz=args.imgsz or member.inputs.imgsz)
    blank = np.zeros((len(files), len(state["classes"])), np.float32)
    data = cls.AugmentedImages(cls.Images(files, blank, bands=inputs.bands, limit=2 * inputs.imgsz), inputs.imgsz)
    loader = eval_loader(data, args.bs, workers=args.workers, device=device, collate=cls.collate)
    options, probs = view_options(args, [member]), np.zeros(blank.shape)
    progress = tqdm(total=len(files), desc=Path(member.path).parent.name, unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            batch = to_device(batch, device)
            found = decide.classify(member.net, inputs, batch, single_label=state["single_label"], **options)
            probs[batch["index"].cpu().numpy()] = found.cpu().double().numpy()
            bar.update(len(batch["index"]) * dist.world_size())
    return sum(dist.gather(probs))  # every rank has filled its own rows


if __name__ == "__main__":
    cli(main)
