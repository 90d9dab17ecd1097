"""Boxes of the objects in segmentation masks, so that a detector trains on a segmentation data set as it is.

    DATA/train_img/*.tif   DATA/train_mask/*.tif        python train_det.py --data DATA

An object is a connected part of one class. With the detector, `predict.py --task seg --detector` looks for objects in
crops of large images only.
"""
import torch
from tqdm import tqdm

from data import images, seg
from data.labels.formats import Parsed
from utils.train import dist
from utils.errors import UserError
from utils.ops.components import components

VOID = 255  # beside classes above 1 it is no object, else the objects of a binary mask


def parse(layout):
    """Layout whose labels and images are those of `seg.pairs`, in one order -> label_formats.Parsed."""
    parsed, found = Parsed(), []
    for i, (file, label) in enumerate(tqdm(list(zip(layout.images, layout.labels)), desc="masks", leave=False,
                                           disable=dist.rank() > 0)):
        mask = seg.read_mask(layout.root / label, classes=256)
        size = images.size(layout.root / file)[1:]
        if tuple(mask.shape) != tuple(size):
            raise UserError(f"{layout.root / label}: is {tuple(mask.shape)} pixels, its image {file} is {tuple(size)}; "
                            f"make them equal")
        parsed.add_image(file, False)
        found += [(i, value, box, (label, number)) for number, (value, box) in enumerate(find(mask.long()), 1)]
    binary = {value for _, value, _, _ in found} <= {1, VOID}
    for i, value, box, place in found:
        if binary or value != VOID:
            parsed.add_box(i, 1 if binary else value, box, place)
    values = sorted(set(parsed.category))
    parsed.names = {value: "object" if values == [1] else f"class {value}" for value in values}
    return parsed


def find(mask):
    """mask (H, W), integers -> [(value, (x1, y1, x2, y2))] of its connected parts with a value above 0, pixels."""
    numbers = components(mask)
    y, x = numbers.nonzero(as_tuple=True)
    count = int(numbers.max()) if numbers.numel() else 0
    number, corners = numbers[y, x] - 1, torch.stack((x, y, x + 1, y + 1), 1)
    place = number[:, None].expand(-1, 2)
    low = torch.full((count, 2), 2**31).scatter_reduce_(0, place, corners[:, :2], "amin")
    high = torch.zeros(count, 2, dtype=torch.long).scatter_reduce_(0, place, corners[:, 2:], "amax")
    values = torch.zeros(count, dtype=torch.long).scatter_(0, number, mask[y, x])
    return [(value, tuple(map(float, box))) for value, box in zip(values.tolist(), torch.cat((low, high), 1).tolist())]
