"""Masks of images of any size: windows are read, predicted and merged, and the result written, piece by piece.

    for y, x, probs in scenes.blocks(file, (0, 0, height, width), bands, predict, tile=512, overlap=0.25, bs=8): ...

So memory does not grow with the image, but for `write_parts`. A piece is (folder, row, column, class map (h, w) uint8):
what to write, into which folder's mask of the image, and where.
"""
import contextlib

import numpy as np
from rasterio.windows import Window
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import seg
from data.results import submissions
from utils.ops import tiles
from utils.train import dist


def blocks(file, part, bands, predict, *, tile, overlap, bs, workers=0):
    """Yields (row, column, probabilities (K, h, w)) of a part (y, x, height, width) of an image, every pixel once.

    predict: windows (B, len(bands), h, w) in the file's numbers -> probabilities (B, K, h, w). tile: the windows' side,
    overlap: what neighbours share of it. One window is read without workers: starting them takes longer.
    """
    top, left, height, width = part
    swaths = tiles.plan(height, width, tile, overlap)
    places = [(top + y, left + x, min(tile, height), min(tile, width)) for y, x in tiles.windows(swaths)]
    workers = workers if len(places) > 1 else 0
    loader = DataLoader(seg.Tiles([file], bands, places), bs, num_workers=workers)
    maps = (probs for batch in tqdm(loader, desc=file.name, leave=False, disable=dist.rank() > 0 or not workers)
            for probs in predict(batch["image"]))
    for y, x, block in tiles.merge(swaths, maps, height):
        yield top + y, left + x, block


def write(file, pieces, out):
    """Writes an image's masks OUT/FOLDER/NAME.tif from pieces that cover it."""
    with contextlib.ExitStack() as stack:
        targets = {}
        for folder, y, x, mask in pieces:
            if folder not in targets:
                targets[folder] = stack.enter_context(submissions.new_mask(file, out / folder))
            targets[folder].write(mask, 1, window=Window(x, y, mask.shape[1], mask.shape[0]))


def write_parts(file, size, pieces, blank, out):
    """The same from pieces that need not cover the image of `size` (height, width), whose masks are held in memory.
    blank: {folder: the value elsewhere}, of "masks" and of labels made from them. Where pieces overlap, the last one
    holds that is not blank; where the mask is an object, the labels say the same or are blank."""
    masks = {folder: np.full(size, value, np.uint8) for folder, value in blank.items()}
    for folder, y, x, mask in pieces:
        here = masks[folder][y:y + mask.shape[0], x:x + mask.shape[1]]
        np.copyto(here, mask, where=mask != blank[folder])
    for folder in masks:
        np.copyto(masks[folder], blank[folder], where=(masks["masks"] > 0) & (masks[folder] != masks["masks"]))
    for folder, mask in masks.items():
        with submissions.new_mask(file, out / folder) as target:
            target.write(mask, 1)
