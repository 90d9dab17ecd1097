"""predict.py --task det: boxes as the parking-lot competition's submission, as COCO's and YOLO's files, as pictures."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from data import augment, det, images, labels
from data.loader import eval_loader
from nets.blocks import fuse
from nets.yolo import YOLOv5
from utils import boxes, checkpoint, dist, engine, geometry, pictures, pictures_det, runs, tiles, tta
from utils.errors import UserError

OTHER_VERSION = "{}: made by another version of this project; use that, or train again"


def predict_det(args, device, paths, states):
    predict, imgsz, stride = det_ensemble(args, device, paths, states)
    data = Path(states[0]["args"]["data"])
    root = data.parent if data.is_file() else data
    files = images.find_sources(args.source, root / "test" / "images")
    bands = all_bands(states)
    views = Views(files, bands=bands, imgsz=imgsz, stride=stride, tile=args.tile, overlap=args.overlap)
    ids = image_ids(files, root) if args.source is None else image_ids(files, files[0].parent, others=True)
    out = runs.new_folder(args.out, Path(paths[0]).parent / "predict")

    loader = eval_loader(views, args.bs, shapes=views.shapes, workers=args.workers, device=device, collate=det.collate)
    found = {}  # view -> detections of each checkpoint
    progress = tqdm(total=len(views), desc="predict", unit="view" if args.tile else "img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            per_member = [[det.restore(rows.cpu(), matrix) for rows, matrix in zip(detections, batch["matrix"])]
                          for detections in predict(batch["image"])]
            found |= zip(batch["index"].tolist(), zip(*per_member))
            bar.update(len(batch["image"]) * dist.world_size())
    found = {view: rows for part in dist.gather(found) for view, rows in part.items()}
    results = [merge(views, i, found, args) for i in range(len(files))]

    names = states[0]["classes"]
    for folder in ("labels", "overlays") if args.overlays else ("labels",):
        (out / folder).mkdir(exist_ok=True)
    for file, size, rows in list(zip(files, views.sizes, results))[dist.rank()::dist.world_size()]:
        (out / "labels" / f"{file.stem}.txt").write_text(yolo_lines(rows, *size))
        if args.overlays:
            draw(out / "overlays" / f"{file.stem}.jpg", file, size, rows, names, states[0]["bands"])
    if dist.rank() == 0:
        submission, dropped = cut(submission_items(results, ids, states[0]["category_ids"]), args.max_mb * 1e6)
        (out / "submission.json").write_text(submission)
        (out / "coco.json").write_text(json.dumps(coco_items(results, ids, states[0]["category_ids"])))
        note = f", of which the {dropped} of lowest score are not in submission.json (--max-mb)" if dropped else ""
        print(f"{len(files)} images, {sum(map(len, results))} detections{note}: {out}")


def all_bands(states):
    """What to read of an image: the bands (from 1, sorted) that any of the checkpoints needs."""
    return sorted({band for state in states for band in state["bands"]})


def det_ensemble(args, device, paths, states):
    """-> (predict, side in pixels that images are to be letterboxed to, stride that both sides of a batch must share).

    predict: images (B, len(all_bands), H, W) in the files' numbers -> per checkpoint a list with the detections (n, 6)
    of each image, in pixels of the batch. UserError for checkpoints that cannot be used, or not together.
    """
    dtype = engine.precision(args.amp, device) or torch.float32
    for path, state in zip(paths, states):
        if not {"classes", "category_ids", "bands", "scale", "imgsz", "args"} <= state.keys():
            raise UserError(OTHER_VERSION.format(path))
    imgsz, bands = args.imgsz or max(state["imgsz"] for state in states), all_bands(states)
    if args.ensemble_weights and len(args.ensemble_weights) != len(paths):
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {len(paths)} checkpoints; give one each")
    members = []  # net, where its bands are among all, what pixels are divided by, its side's share of imgsz
    for path, state in zip(paths, states):
        try:
            net = YOLOv5(**state["arch"]["kwargs"])
            members.append((net, [bands.index(band) for band in state["bands"]], state["scale"],
                            1.0 if args.imgsz else state["imgsz"] / imgsz))
        except (TypeError, ValueError, KeyError):
            raise UserError(OTHER_VERSION.format(path)) from None
        checkpoint.load_weights(net, state, path)
        fuse(net).to(device, dtype, memory_format=torch.channels_last)
        if args.compile:
            net.compile()
        if state["classes"] != states[0]["classes"]:
            raise UserError(f"{path}: knows the classes {', '.join(state['classes'])}, {paths[0]} others; an ensemble "
                            f"needs the same")

    def predict(raw):
        results = []
        for net, chosen, scale, factor in members:
            x = raw[:, chosen].to(device, non_blocking=True).float() / scale
            passes = tta.scaled(*x.shape[2:], net.stride, tta.DETECTION if args.tta else ((1.0, False),), factor)
            # resized in fp32: CPUs cannot in bf16
            rows = tta.cat_rows(lambda view: net(view.to(dtype, memory_format=torch.channels_last)), x, passes)
            results.append(boxes.nms(rows, conf=args.conf, iou=args.iou, max_det=args.max_det))
        return results
    return predict, imgsz, max(net.stride for net, *_ in members)


class Views(Dataset):
    """What the nets look at: every image as a whole and, if it is larger than `tile`, also its windows.

    `views[k]` -> as a letterboxed sample of det.DetData, without boxes. UserError for a file without the bands.
    """

    def __init__(self, files, *, bands, imgsz, stride, tile=None, overlap=0.25):
        self.files, self.bands, self.imgsz = files, bands, imgsz
        self.sizes = []  # (height, width) per file
        self.items = []  # (file's index, window (y, x, height, width) or None) per view
        self.first = []  # each file's first view; at the end the number of views
        for i, file in enumerate(files):
            count, *size = images.size(file)
            if count < bands[-1] and not (count == 1 and bands == [1, 2, 3]):
                raise UserError(f"{file}: has {count} bands, the checkpoint needs band {bands[-1]}; choose another "
                                f"--source")
            self.sizes.append(tuple(size))
            self.first.append(len(self.items))
            self.items.append((i, None))
            if tile and max(size) > tile:
                sides = [min(tile, side) for side in size]
                self.items += [(i, (y, x, *sides)) for y in tiles.starts(size[0], tile, overlap)
                               for x in tiles.starts(size[1], tile, overlap)]
        self.first.append(len(self.items))
        self.shapes = [det.rect(window[2:] if window else self.sizes[i], imgsz, stride) for i, window in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        i, window = self.items[k]
        height, width = self.sizes[i]
        if window:
            image = det.read(self.files[i], self.bands, window=window)
            to_read = geometry.translate(-window[1], -window[0])
        else:  # of a far larger scene only every step-th pixel is read, still four for each one of the net's input
            step = max(height, width) // (4 * self.imgsz) or 1
            shape = (max(1, height // step), max(1, width // step))
            image = det.read(self.files[i], self.bands, shape=shape if step > 1 else None)
            to_read = geometry.scale(shape[1] / width, shape[0] / height)
        image = image if image.dtype == torch.uint8 else image.float()
        canvas = det.new_canvas(image, self.shapes[k])
        matrix = augment.letterbox(*image.shape[1:], self.imgsz, self.shapes[k])
        matrix, _ = geometry.paste(image, matrix, canvas, (0, 0, *self.shapes[k][::-1]))
        return {"image": canvas.permute(1, 2, 0), "boxes": torch.zeros(0, 5),
                "matrix": torch.from_numpy(matrix @ to_read), "index": k}


def merge(views, i, found, args):
    """All that was found in image i -> its detections (n, 6), within the image, in its pixels.

    found: {view: detections of each checkpoint}. A checkpoint's views are joined by suppression, the checkpoints by
    fusion.
    """
    height, width = views.sizes[i]
    mine = range(views.first[i], views.first[i + 1])
    per_member = []
    for by_view in zip(*[found[k] for k in mine]):
        rows = by_view[0]
        if len(mine) > 1:
            kept = [some if window is None else uncut(some, window, height, width)
                    for some, (_, window) in zip(by_view, (views.items[k] for k in mine))]
            rows = boxes.suppress(torch.cat(kept), iou=args.iou, max_det=args.max_det)
        per_member.append(rows)
    rows = per_member[0]
    if len(per_member) > 1:
        rows = boxes.wbf(per_member, weights=args.ensemble_weights)[:args.max_det]
    rows = boxes.clip(rows, height, width)
    return rows[(rows[:, 2:4] > rows[:, :2]).all(1)]


def uncut(rows, window, height, width, margin=2):
    """Detections (n, 6), in pixels of the image, less those that a border of the window cuts: that end within `margin`
    pixels of it, where the image goes on. A neighbour sees such an object whole, or the view of the whole image does.

    window: (y, x, height, width) in an image of height x width.
    """
    y, x, h, w = window
    limits = rows.new_tensor([x + margin if x > 0 else -torch.inf, y + margin if y > 0 else -torch.inf,
                              x + w - margin if x + w < width else torch.inf,
                              y + h - margin if y + h < height else torch.inf])
    cut = torch.cat((rows[:, :2] < limits[:2], rows[:, 2:4] > limits[2:]), 1)
    return rows[~cut.any(1)]


def image_ids(files, near, *, others=False):
    """The competition's image ids, from Test_Images_Information.json in `near` or at most two folders above; without
    it the file's stem, as a number where it is one.

    others: a list that knows none of the images is no error but ignored: they may be training images.
    """
    for folder in (near, *list(Path(near).resolve().parents)[:2]):
        known = labels.test_ids(folder)
        if known and not (others and known.keys().isdisjoint(file.name for file in files)):
            missing = [file for file in files if file.name not in known]
            if missing:
                raise UserError(f"{missing[0]}: not in {folder / labels.TEST_INFORMATION} ({len(missing)} such); add "
                                f"it there, or remove the image")
            return [known[file.name] for file in files]
    return [int(file.stem) if file.stem.isascii() and file.stem.isdigit() else file.stem for file in files]


def coco_items(results, ids, category_ids):
    """COCO's results format: [{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}]."""
    return [{"image_id": image_id, "category_id": category_ids[int(label)], "bbox": [x1, y1, x2 - x1, y2 - y1],
             "score": score}
            for image_id, rows in zip(ids, results) for x1, y1, x2, y2, score, label in rows.tolist()]


def submission_items(results, ids, category_ids):
    """The same as the parking-lot competition took it: a tenth of a pixel, four digits of score, empty segmentation."""
    return [item | {"bbox": [round(v, 1) for v in item["bbox"]], "score": round(item["score"], 4), "segmentation": []}
            for item in coco_items(results, ids, category_ids)]


def cut(items, limit):
    """As many of the items as stay below `limit` bytes of JSON, those of highest score -> (the JSON, with the items in
    their old order; the number of items left out)."""
    texts = [json.dumps(item) for item in items]
    sizes = np.array([len(text.encode()) + 2 for text in texts])  # ", " between two of them, [ ] around all
    order = np.argsort([-item["score"] for item in items], kind="stable")
    kept = sorted(order[:int((sizes[order].cumsum() < limit).sum())])
    return "[" + ", ".join(texts[i] for i in kept) + "]", len(items) - len(kept)


def yolo_lines(rows, height, width):
    """Detections (n, 6) as text, one a line: class from 0, centre x, centre y, width, height as shares of the image's
    sides, score."""
    xywh = boxes.to_xywh(rows[:, :4].double()) / torch.tensor([width, height] * 2)
    return "".join(f"{int(label)} {x:.6f} {y:.6f} {w:.6f} {h:.6f} {score:.6f}\n"
                   for (x, y, w, h), (score, label) in zip(xywh.tolist(), rows[:, 4:].tolist()))


def draw(path, file, size, rows, names, bands, limit=1920, score=0.25):
    """A JPEG of the image, at most `limit` pixels a side, with the detections of at least this score."""
    shape = det.reduced(size, limit)
    rgb = pictures.to_rgb(det.read(file, bands, shape=shape))
    rows = rows[rows[:, 4] >= score]
    rgb = pictures_det.draw_boxes(rgb, rows[:, :4] * (max(shape) / max(size)), rows[:, 5].long(), names, rows[:, 4])
    Image.fromarray(rgb).save(path, quality=90)
