"""Connected components of label maps, by GDAL."""
import numpy as np
import torch
from rasterio import features


def components(labels):
    """labels (H, W) or (B, H, W), integers -> int64, the same shape and device: 0 where labels <= 0, else the number
    1, 2, ... of the pixel's component, in the order of their first pixels, through the whole batch.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). GDAL
    draws the outline of each component; the outlines are filled with their numbers.
    """
    maps = labels.reshape(-1, *labels.shape[-2:]).cpu().numpy().astype(np.int32)
    found, count = np.zeros(maps.shape, np.int64), 0
    for values, numbers in zip(maps, found):
        outlines = [outline for outline, _ in features.shapes(values, mask=values > 0, connectivity=8)]
        if outlines:
            filled = features.rasterize(zip(outlines, range(len(outlines))), values.shape, fill=-1, dtype=np.int32)
            pixels = filled[filled >= 0]
            order = np.unique(pixels, return_index=True)[1].argsort().argsort()  # by the first pixels
            numbers[filled >= 0] = count + 1 + order[pixels]
            count += len(outlines)
    return torch.from_numpy(found).view(labels.shape).to(labels.device)
