"""Connected components of label maps, on any device."""
import torch


def components(labels):
    """labels (H, W) or (B, H, W), integers -> int64, the same shape: 0 where labels <= 0, else the number 1, 2, ... of
    the pixel's component, in the order of their first pixels, through the whole batch.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). Each
    row's runs of one label are joined with those that they touch in the next row: every run hooks itself under the
    first one that it touches, then paths are halved (Shiloach and Vishkin 1982); a handful of passes, however winding
    a component is.
    """
    batch = labels if labels.ndim == 3 else labels[None]
    inside, width = batch > 0, batch.shape[2]
    starts = inside.clone()
    starts[..., 1:] &= batch[..., 1:] != batch[..., :-1]
    run = starts.flatten().cumsum(0).view(batch.shape) - 1  # of a pixel inside, in reading order
    pairs = []
    for dx in (-1, 0, 1):
        above, below = slice(max(-dx, 0), width - max(dx, 0)), slice(max(dx, 0), width - max(-dx, 0))
        same = inside[:, :-1, above] & (batch[:, :-1, above] == batch[:, 1:, below])
        pair = torch.stack((run[:, :-1, above][same], run[:, 1:, below][same]))
        new = torch.ones_like(pair[0], dtype=torch.bool)
        new[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)  # two runs touch along many pixels
        pairs.append(pair[:, new])
    low, high = torch.cat(pairs, 1)
    start = torch.arange(int(starts.sum()), device=labels.device)
    root = start.clone()
    while low.numel():
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(above := root[root], root):
            root = above
        one, other = root[low], root[high]
        low, high = torch.minimum(one, other)[one != other], torch.maximum(one, other)[one != other]
    numbers = (root == start).cumsum(0)[root]  # a root has the first pixel of its component
    return torch.zeros_like(batch, dtype=torch.int64).masked_scatter_(inside, numbers[run[inside]]).view(labels.shape)
