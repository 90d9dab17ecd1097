"""Augmentation: draws matrices of `utils.geometry` from a random generator."""
import numpy as np

from utils import geometry


def crop_flip(rng, height, width, size):
    """The wildfire system's: pad to twice the crop, crop at random, flip; and quarter turns.

    -> (matrix onto a size x size canvas, border "reflect" or "wrap"). Tiles at least twice the crop are not
    padded. The pixels outside the tile, by reflection or by wrapping around, half of the time each.
    """
    border = ("reflect", "wrap")[rng.integers(2)]
    matrix = np.eye(3)
    for axis, side in enumerate((width, height)):
        padded = max(side, 2 * size)
        start = rng.integers(padded - size + 1) - (padded - side) // 2
        matrix[axis, 2] = -start
    if rng.integers(2):
        matrix = geometry.flip_h(size) @ matrix
    return geometry.rot90(rng.integers(4), size, size) @ matrix, border  # with the flip: all eight, equally often


def gain(rng, bands, spread):
    """Brightness factors (bands, 1, 1), float32: one for the tile, log-uniform within `spread` octaves either
    way, times a quarter as much for each band by itself."""
    octaves = rng.uniform(-spread, spread) + rng.uniform(-spread, spread, (bands, 1, 1)) / 4
    return np.exp2(octaves).astype(np.float32)
