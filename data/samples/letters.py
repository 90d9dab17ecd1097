"""A small Dirty-MNIST, second edition (DACON 2021), of letters drawn with a font; see data/samples/__main__.py."""
import os

from data.samples import glyphs
from data.samples.dirty_mnist import HEADER, Synthesizer, write
from utils.files import whole_folder, write_csv


def write_glyphs(path, pixels, letters):
    """The competition's CSV: id, letter, 0 ... 783 (its train.csv also has the digit that the faint pixels show)."""
    write_csv(path, ["id", "letter", *glyphs.COLUMNS],
              [[i, glyphs.LETTERS[letter], *glyph.ravel().tolist()]
               for i, (letter, glyph) in enumerate(zip(letters, pixels), 1)])


def letters(out, *, train=48, test=12, seed=0):
    """DACON 2021 -> `out`/resources/ with mnist_data/{train,test}.csv, dirty_mnist_2nd/00000.png ..., their labels
    dirty_mnist_2nd_answer.csv, test_dirty_mnist_2nd/50000.png ... and sample_submission.csv. Returns the folder.

    Images are grey PNG, 256x256. The competition does not publish the labels of its test set; here they lie in
    test_dirty_mnist_2nd_answer.csv, so that a demonstration can be scored. The test images show the glyphs of test.csv,
    which are in no training image. Raises UserError if the folder exists already. It appears whole or not at all.
    """
    target, first = os.path.join(out, "resources"), max(train, 50_000)
    with whole_folder(target) as root:
        known, unknown = glyphs.render(20, seed=2 * seed), glyphs.render(10, seed=2 * seed + 1)
        write_glyphs(f"{root}/mnist_data/train.csv", *known)
        write_glyphs(f"{root}/mnist_data/test.csv", *unknown)
        write(Synthesizer(*known), f"{root}/dirty_mnist_2nd", train, start=0, seed=seed, digits=5)
        write(Synthesizer(*unknown), f"{root}/test_dirty_mnist_2nd", test, start=first, seed=seed, digits=5)
        rows = [[index] + [0] * 26 for index in range(first, first + test)]
        write_csv(f"{root}/sample_submission.csv", HEADER, rows)
    return target
