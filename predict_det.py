"""predict.py --task det: boxes as the parking-lot competition's submission, in COCO's and in YOLO's format, as pictures."""
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
    bands = sorted({band for state in states for band in state["bands"]})
    views = Views(files, bands=bands, imgsz=imgsz, stride=stride, tile=args.tile, overlap=args.overlap)
    ids = image_ids(files, root) if args.source is None else image_ids(files, files[0].parent, others=True)
    out = runs.new_folder(args.out, Path(paths[0]).parent / "predict")

    loader = eval_loader(views, args.bs, shapes=views.shapes, workers=args.workers, device=device, collate=det.collate)
    found = {}  # view -> detections of each checkpoint
    progress = tqdm(total=len(views), desc="predict", unit="view" if args.tile else "img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            per_member = [[det.restore(d.cpu(), m) for d, m in zip(some, batch["matrix"])] for some in predict(batch["image"])]
            found |= zip(batch["index"].tolist(), zip(*per_member))
            bar.update(len(batch["image"]) * dist.world_size())
    found = {view: rows for part in dist.gather(found) for view, rows in part.items()}
    results = [merge(views, i, found, args) for i in range(len(files))]

    names = states[0]["classes"]
    for folder in ("labels", *["overlays"] * args.overlays):
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


def det_ensemble(args, device, paths, states):
    """-> (predict(raw images (B, bands, H, W)) -> per checkpoint a list with the detections (n, 6) of each image,
    side that the images are to be letterboxed to, stride of the nets)."""
    dtype = engine.precision(args.amp, device) or torch.float32
    for path, state in zip(paths, states):
        if not {"classes", "category_ids", "bands", "scale", "imgsz", "args"} <= state.keys():
            raise UserError(OTHER_VERSION.format(path))
    imgsz = args.imgsz or max(state["imgsz"] for state in states)
    bands = sorted({band for state in states for band in state["bands"]})
    if args.ensemble_weights and len(args.ensemble_weights) != len(paths):
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {len(paths)} checkpoints; give one each")
    members = []
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
    """What the nets look at: every image as a whole and, if it is larger than `tile`, also its windows."""

    def __init__(self, files, *, bands, imgsz, stride, tile=None, overlap=0.25):
        self.files, self.bands, self.imgsz = files, bands, imgsz
        self.sizes, self.items = [], []  # (height, width) per file; (file index, window or None)
        self.first = []  # item of each file, and the end
        for i, file in enumerate(files):
            count, *size = images.size(file)
            if count < bands[-1] and not (count == 1 and bands == [1, 2, 3]):
                raise UserError(f"{file}: has {count} bands, the checkpoint needs band {bands[-1]}; choose another --source")
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
            to_view = geometry.translate(-window[1], -window[0])
        else:  # of a scene that is far larger than the net's input only every so manieth pixel is read
            step = max(height, width) // (4 * self.imgsz) or 1
            shape = (max(1, height // step), max(1, width // step))
            image = det.read(self.files[i], self.bands, shape=shape if step > 1 else None)
            to_view = geometry.scale(shape[1] / width, shape[0] / height)
        image = image if image.dtype == torch.uint8 else image.float()
        canvas = det.new_canvas(image, self.shapes[k])
        matrix = augment.letterbox(*image.shape[1:], self.imgsz, self.shapes[k])
        matrix, _ = geometry.paste(image, matrix, canvas, (0, 0, *self.shapes[k][::-1]))
        return {"image": canvas.permute(1, 2, 0), "boxes": torch.zeros(0, 5), "matrix": torch.from_numpy(matrix @ to_view),
                "index": k}


def merge(views, i, found, args):
    """All that was found in image i, by all checkpoints in all views -> detections (n, 6), within the image."""
    height, width = views.sizes[i]
    mine = range(views.first[i], views.first[i + 1])
    per_member = []
    for member in zip(*[found[k] for k in mine]):
        if len(mine) > 1:
            whole = [rows if window is None else uncut(rows, window, height, width)
                     for rows, (_, window) in zip(member, (views.items[k] for k in mine))]
            member = [boxes.suppress(torch.cat(whole), iou=args.iou, max_det=args.max_det)]
        per_member.append(member[0])
    rows = per_member[0] if len(per_member) == 1 else boxes.wbf(per_member, weights=args.ensemble_weights)[:args.max_det]
    rows = boxes.clip(rows, height, width)
    return rows[(rows[:, 2:4] > rows[:, :2]).all(1)]


def uncut(rows, window, height, width, margin=2):
    """Without the detections that end at a border of the window within the image: a neighbour sees them whole, or the
    view of the whole image does."""
    y, x, h, w = window
    inner = torch.stack((rows[:, 0] < x + margin if x > 0 else torch.zeros(len(rows), dtype=torch.bool),
                         rows[:, 1] < y + margin if y > 0 else torch.zeros(len(rows), dtype=torch.bool),
                         (rows[:, 2] > x + w - margin) & (x + w < width), (rows[:, 3] > y + h - margin) & (y + h < height)))
    return rows[~inner.any(0)]


def image_ids(files, near, *, others=False):
    """The competition's ids, from Test_Images_Information.json in `near` or above; without it the file's name, as a
    number where it is one. others: also where the file lists none of them, for they may be training images."""
    for folder in (near, *list(Path(near).resolve().parents)[:2]):
        known = labels.test_ids(folder)
        if known and not (others and known.keys().isdisjoint(file.name for file in files)):
            missing = [file for file in files if file.name not in known]
            if missing:
                raise UserError(f"{missing[0]}: not in {folder / labels.TEST_INFORMATION} ({len(missing)} such); add it there, "
                                f"or remove the image")
            return [known[file.name] for file in files]
    return [int(file.stem) if file.stem.isascii() and file.stem.isdigit() else file.stem for file in files]


def coco_items(results, ids, category_ids):
    """COCO's results format: [{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}]."""
    return [{"image_id": image_id, "category_id": category_ids[int(label)], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            for image_id, rows in zip(ids, results) for x1, y1, x2, y2, score, label in rows.tolist()]


def submission_items(results, ids, category_ids):
    """The same as the parking-lot competition took it: a tenth of a pixel, four digits of score, empty segmentation."""
    return [item | {"bbox": [round(v, 1) for v in item["bbox"]], "score": round(item["score"], 4), "segmentation": []}
            for item in coco_items(results, ids, category_ids)]


def cut(items, limit):
    """-> (JSON of as many items as stay below `limit` bytes, those of highest score, in their order; how many did not)."""
    texts = [json.dumps(item) for item in items]
    sizes = np.array([len(text.encode()) + 2 for text in texts])  # with ", " between them; and [ ] around all
    order = np.argsort([-item["score"] for item in items], kind="stable")
    kept = sorted(order[:int((sizes[order].cumsum() < limit).sum())])
    return "[" + ", ".join(texts[i] for i in kept) + "]", len(items) - len(kept)


def yolo_lines(rows, height, width):
    """Per line: class, centre x, centre y, width, height as shares of the image, score."""
    xywh = boxes.to_xywh(rows[:, :4].double()) / torch.tensor([width, height] * 2)
    return "".join(f"{int(label)} {x:.6f} {y:.6f} {w:.6f} {h:.6f} {score:.6f}\n"
                   for (x, y, w, h), (score, label) in zip(xywh.tolist(), rows[:, 4:].tolist()))


def draw(path, file, size, rows, names, bands, limit=1920, score=0.25):
    """The image, at most `limit` pixels a side, with its better detections."""
    factor = min(1, limit / max(size))
    shape = tuple(max(1, round(side * factor)) for side in size)
    rgb = pictures.to_rgb(det.read(file, bands, shape=shape))
    rows = rows[rows[:, 4] >= score]
    rgb = pictures_det.draw_boxes(rgb, rows[:, :4] * factor, rows[:, 5].long(), names, rows[:, 4])
    Image.fromarray(rgb).save(path, quality=90)
