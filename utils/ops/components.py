"""Connected components of label maps, by GDAL."""
import numpy as np
import torch
from rasterio import features


def components(labels):
<<<<<<< HEAD
    """labels (H, W) or (B, H, W), integers -> int64, the same shape and device: 0 where labels <= 0, else the number
    1, 2, ... of the pixel's component, in the order of their first pixels, through the whole batch.
=======
    """labels (H, W), integers -> int64 (H, W): 0 where labels <= 0, else the number 1, 2, ... of the pixel's component,
    in the order of their first pixels.
>>>>>>> 0d4a4c9829019224e51387111f3433ca7ea51c50

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). GDAL
    draws the outline of each component; the outlines are filled with their numbers.
    """
<<<<<<< HEAD
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
=======
    inside, width = labels > 0, labels.shape[1]
    starts = inside.clone()
    starts[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    run = starts.flatten().cumsum(0).view(labels.shape) - 1  # the number of a pixel's run, in reading order
    count, edges = int(starts.sum()), []
    for dx in (-1, 0, 1):
        above, below = slice(max(-dx, 0), width - max(dx, 0)), slice(max(dx, 0), width - max(-dx, 0))
        same = inside[:-1, above] & (labels[:-1, above] == labels[1:, below])
        edges.append((run[:-1, above] * count + run[1:, below])[same].unique_consecutive())  # two runs touch repeatedly
    edges, first = torch.cat(edges), torch.arange(count, device=labels.device)
    low, high, root = edges // count, edges % count, first.clone()
    while low.numel():
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(above := root[root], root):
            root = above
        one, other = root[low], root[high]
        low, high = torch.minimum(one, other)[one != other], torch.maximum(one, other)[one != other]
    numbers = (root == first).cumsum(0)[root]  # a root has the first pixel of its component
    return torch.zeros_like(labels, dtype=torch.int64).masked_scatter_(inside, numbers[run[inside]])
>>>>>>> 0d4a4c9829019224e51387111f3433ca7ea51c50
