"""predict.py --task seg: masks as GeoTIFF, overlays, polygons, and the wildfire competition's y_pred.pkl."""
import json
import math
import pickle
from pathlib import Path

import rasterio
import torch
from PIL import Image
from rasterio import features
from rasterio.windows import Window
from torch.utils.data import Dataset
from tqdm import tqdm

from data import images, seg
from data.loader import eval_loader
from nets.blocks import fuse
from nets.unet import UNet, probabilities
from utils import checkpoint, dist, engine, geometry, pictures, runs, tiles, tta
from utils.errors import UserError


def predict_seg(args, device, paths, states):
    predict = seg_ensemble(args, device, paths, states)
    files = images.find_sources(args.source, Path(states[0]["args"]["data"]) / "test_img")
    tile = args.tile or 2 * states[0]["imgsz"]
    bands = sorted({band for state in states for band in state["bands"]})
    sizes = {}
    for file in files:
        sizes[file] = images.size(file)
        if sizes[file][0] < bands[-1]:
            raise UserError(f"{file}: has {sizes[file][0]} bands, the checkpoint needs band {bands[-1]}; choose "
                            f"another --source")
    out = runs.new_folder(args.out, Path(paths[0]).parent / "predict")
    for folder in ("masks",) + ("overlays",) * args.overlays + ("polygons",) * args.polygons:
        (out / folder).mkdir(exist_ok=True)

    small = [file for file in files if max(sizes[file][1:]) <= tile]
    large = [file for file in files if max(sizes[file][1:]) > tile]
    loader = eval_loader(Tiles(small), args.bs, shapes=[sizes[file] for file in small], workers=args.workers,
                         device=device)
    progress = tqdm(total=len(files), desc="predict", unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            masks = decide(predict(batch["image"]), args.threshold)
            for i, mask in zip(batch["index"].tolist(), masks):
                with new_mask(small[i], out) as target:
                    target.write(mask.numpy(), 1)
                finish(small[i], out, args, states[0]["bands"])
            bar.update(len(masks) * dist.world_size())
        for file in large[dist.rank()::dist.world_size()]:
            predict_scene(file, sizes[file][1:], predict, tile, args, out, device)
            finish(file, out, args, states[0]["bands"])
            bar.update(dist.world_size())
    dist.barrier()
    if dist.rank() == 0:
        write_submission(files, sizes, out)
        print(f"{len(files)} images: {out}")


def seg_ensemble(args, device, paths, states):
    """-> predict(raw images (B, all bands, H, W)) -> mean probabilities (B, K, H, W) fp32, for any H and W."""
    dtype = engine.precision(args.amp, device) or torch.float32
    members = []
    for path, state in zip(paths, states):
        try:
            net = UNet(**state["arch"]["kwargs"])
            members.append((net, state["bands"], state["scale"], state["mean_planes"]))
        except (TypeError, ValueError, KeyError):
            raise UserError(f"{path}: made by another version of this project; use that, or train again") from None
        checkpoint.load_weights(net, state, path)
        # batch norms folded away, weights in half precision: the same masks, several times faster
        fuse(net).to(device, dtype, memory_format=torch.channels_last)
        if args.compile:
            net.compile(dynamic=False)
        if state["classes"] != states[0]["classes"]:
            raise UserError(f"{path}: has {state['classes']} classes, {paths[0]} {states[0]['classes']}; an ensemble "
                            f"needs the same")

    def predict(raw):
        count, total = len(raw), 0
        if args.compile:  # one shape, one compilation: a last, smaller batch is filled up
            raw = raw[torch.arange(args.bs) % count]
        for net, bands, scale, mean_planes in members:
            x = raw[:, [band - 1 for band in bands]].to(device, non_blocking=True).float() / scale
            x = seg.add_mean_planes(x) if mean_planes else x
            height, width = x.shape[2:]
            padded = [-(-side // net.stride) * net.stride for side in (height, width)]
            if padded != [height, width]:
                x = geometry.warp(x, geometry.translate(0, 0), padded, border="reflect")
            x = x.to(dtype, memory_format=torch.channels_last)
            maps = tta.mean_map(lambda x: probabilities(net(x)), x, tta.flips(*padded)[:4 if args.tta else 1])
            total = total + maps[..., :height, :width]
        return (total / len(members))[:count]
    return predict


def decide(probs, threshold):
    """Probabilities (B, K, H, W) -> uint8 class maps (B, H, W) on the CPU."""
    return (probs[:, 0] > threshold if probs.shape[1] == 1 else probs.argmax(1)).to(torch.uint8).cpu()


class Tiles(Dataset):
    """Whole images, or windows of one: {"image": (C, H, W), "index"}."""

    def __init__(self, files, windows=None):
        self.files, self.windows = files, windows

    def __len__(self):
        return len(self.windows or self.files)

    def __getitem__(self, i):
        if not self.windows:
            return {"image": images.read(self.files[i]).float(), "index": i}  # a batch may be of several dtypes
        return {"image": images.read(self.files[0], window=self.windows[i]), "index": i}


def predict_scene(file, size, predict, tile, args, out, device):
    """An image larger than a tile, window by window, read and written in pieces."""
    height, width = size
    swaths = tiles.plan(height, width, tile, args.overlap)
    boxes = [(y, x, min(tile, height), min(tile, width)) for y, x in tiles.windows(swaths)]
    loader = torch.utils.data.DataLoader(Tiles([file], boxes), args.bs, num_workers=args.workers)
    maps = (probs for batch in tqdm(loader, desc=file.name, leave=False, disable=dist.rank() > 0)
            for probs in predict(batch["image"]))
    with new_mask(file, out) as target:
        for y, x, block in tiles.merge(swaths, maps, height):
            mask = decide(block[None], args.threshold)[0]
            target.write(mask.numpy(), 1, window=Window(x, y, mask.shape[1], mask.shape[0]))


def new_mask(file, out):
    """The mask's GeoTIFF, open for writing, at the place on Earth of its source (if that has one)."""
    _, height, width = images.size(file)
    place = {}
    if images.kind(file) == "GTiff":
        with images.open_raster(file) as source:
            place = {"crs": source.crs, "transform": source.transform}
    return rasterio.open(out / "masks" / f"{file.stem}.tif", "w", driver="GTiff", dtype="uint8", count=1, height=height,
                         width=width, compress="deflate", tiled=max(height, width) > 1024, BIGTIFF="IF_SAFER", **place)


def finish(file, out, args, bands):
    """Overlay picture and polygons from a written mask."""
    with rasterio.open(out / "masks" / f"{file.stem}.tif", driver="GTiff") as mask:
        if args.overlays:
            reduced = tuple(max(1, round(side * min(1, 1024 / max(mask.shape)))) for side in mask.shape)
            rgb = pictures.to_rgb(images.read(file, bands, shape=reduced))
            picture = pictures.overlay(rgb, mask.read(1, out_shape=reduced))
            Image.fromarray(picture).save(out / "overlays" / f"{file.stem}.png")
        if args.polygons:
            shapes = features.shapes(rasterio.band(mask, 1), transform=mask.transform)
            collection = {"type": "FeatureCollection", "name": file.stem, "features": [
                {"type": "Feature", "geometry": shape, "properties": {"class": int(value)}}
                for shape, value in shapes if value > 0]}
            if mask.crs:  # GeoJSON's own default is WGS 84
                collection["crs"] = {"type": "name", "properties": {"name": mask.crs.to_string()}}
            (out / "polygons" / f"{file.stem}.geojson").write_text(json.dumps(collection))


def write_submission(files, sizes, out):
    """y_pred.pkl of the wildfire competition: {file name: uint8 mask (H, W)}, a pickle."""
    masks = {}
    for file in files:
        if math.prod(sizes[file][1:]) > 2**26:
            print(f"{file.name}: too large for y_pred.pkl; its mask is in {out / 'masks'}")
            continue
        with rasterio.open(out / "masks" / f"{file.stem}.tif", driver="GTiff") as mask:
            masks[file.name] = mask.read(1)
    with open(out / "y_pred.pkl", "wb") as file:
        pickle.dump(masks, file)
