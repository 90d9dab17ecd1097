"""Connected components of label maps, on any device."""
import torch


def components(labels):
    """labels (H, W), integers -> int64 (H, W): 0 where labels <= 0, else the number 1, 2, ... of the pixel's component,
    in the order of their first pixels.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). Each
    row's runs of one label are joined with those that they touch in the next row: every run hooks itself under the
    first one that it touches, then paths are halved (Shiloach and Vishkin 1982); a handful of passes, however winding
    a component is.
    """
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
