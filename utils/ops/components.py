"""Connected components of label maps, by GDAL."""
import numpy as np
import torch
from rasterio import features


def components(labels):
    """labels (H, W), integers -> int64 (H, W) on the same device: 0 where labels <= 0, else the number 1, 2, ... of the
    pixel's component, in the order of their first pixels.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). GDAL
    draws the outline of each component; the outlines are filled with their numbers.
    """
    values, numbers = labels.cpu().numpy().astype(np.int32), np.zeros(labels.shape, np.int64)
    outlines = [outline for outline, _ in features.shapes(values, mask=values > 0, connectivity=8)]
    if outlines:
        filled = features.rasterize(zip(outlines, range(len(outlines))), values.shape, fill=-1, dtype=np.int32)
        pixels = filled[filled >= 0]
        order = np.unique(pixels, return_index=True)[1].argsort().argsort()  # by the first pixels
        numbers[filled >= 0] = 1 + order[pixels]
    return torch.from_numpy(numbers).to(labels.device)
