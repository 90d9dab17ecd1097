"""Connected components of label maps, by GDAL."""
import itertools

import numpy as np
import torch
from rasterio import features


def components(labels):
    """labels (H, W), integers -> int64 (H, W) on the same device: 0 where labels <= 0, else the number 1, 2, ... of the
    pixel's component.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). GDAL
    draws the outline of each component; the outlines are filled with their numbers.
    """
    values = labels.cpu().numpy().astype(np.int32)
    outlines = [outline for outline, _ in features.shapes(values, mask=values > 0, connectivity=8)]
    if not outlines:  # of which rasterio draws none
        return torch.zeros_like(labels, dtype=torch.int64)
    numbers = features.rasterize(zip(outlines, itertools.count(1)), values.shape, dtype=np.int32)
    return torch.from_numpy(numbers).to(labels.device, torch.int64)
