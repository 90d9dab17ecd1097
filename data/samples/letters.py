"""A small Dirty-MNIST, second edition (DACON 2021), of letters drawn with a font; see data/samples."""
import csv
import os
import string

import numpy as np

from data.samples import glyphs
from data.samples.dirty_mnist import HEADER, Synthesizer, write
from utils.files import whole_folder


def _write_glyphs(path, pixels, letters, digits=None):
    """The competition's CSV: id, digit (what its faint pixels show; train.csv only), letter, 0 ... 783."""
    columns = ["id"] + ["digit"] * (digits is not None) + ["letter", *glyphs.COLUMNS]
    fields = [np.arange(1, len(letters) + 1), *([] if digits is None else [digits])]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for *front, letter, values in zip(*fields, letters, pixels.reshape(len(pixels), -1).tolist()):
            writer.writerow([*front, string.ascii_uppercase[letter], *values])


def letters(out, *, train=48, test=12, seed=0):
    """DACON 2021 -> `out`/resources/ with mnist_data/{train,test}.csv, dirty_mnist_2nd/00000.png ..., their labels
    dirty_mnist_2nd_answer.csv, test_dirty_mnist_2nd/50000.png ... and sample_submission.csv. Returns the folder.

    Images are grey PNG, 256x256. The competition keeps the labels of its test set back; here they lie in
    test_dirty_mnist_2nd_answer.csv, so that a demonstration can score itself. The test set's letters are those of
    test.csv, which no training image shows. Raises UserError when the folder is there. It appears whole or not at all.
    """
    target = os.path.join(out, "resources")
    with whole_folder(target) as root:
        for folder in ("mnist_data", "dirty_mnist_2nd", "test_dirty_mnist_2nd"):
            os.mkdir(os.path.join(root, folder))
        known, unknown = (glyphs.render(count, seed=2 * seed + k) for k, count in enumerate((20, 10)))
        digits = np.random.default_rng(seed).integers(10, size=len(known[1]))
        _write_glyphs(os.path.join(root, "mnist_data", "train.csv"), *known, digits)
        _write_glyphs(os.path.join(root, "mnist_data", "test.csv"), *unknown)
        write(Synthesizer(*known), os.path.join(root, "dirty_mnist_2nd"), train, start=0, seed=seed, digits=5)
        first = max(train, 50_000)
        write(Synthesizer(*unknown), os.path.join(root, "test_dirty_mnist_2nd"), test, start=first, seed=seed, digits=5)
        with open(os.path.join(root, "sample_submission.csv"), "w", newline="") as file:
            rows = [[index] + [0] * 26 for index in range(first, first + test)]
            csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    return target
