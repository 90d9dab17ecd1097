"""Synthetic data sets in the layouts of the competitions, the Dirty-MNIST synthesis, and pictures of single letters."""
import numpy as np
from tqdm import tqdm


def numbered(title, *, train, test, seed):
    """Yields (split, i, rng) for every picture of "train" and of "test", with a progress bar named `title`.

    The random generator depends on (seed, split, i) alone, so that more pictures leave the first ones as they are.
    """
    pictures = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
    for split, i in tqdm(pictures, desc=title, unit="picture", disable=None):
        yield split, i, np.random.default_rng((seed, split == "test", i))
