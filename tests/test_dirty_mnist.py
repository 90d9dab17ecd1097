"""data/samples/dirty_mnist.py and letters.py: the recipe's statistics, a slow renderer, files."""
import csv
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torchvision.io import decode_image

from data.samples import dirty_mnist, glyphs
from data.samples import letters as sample_letters
from data.samples.dirty_mnist import HEADER, Synthesizer, Synthetic, write
from data.loader import eval_loader, train_loader
from utils.errors import UserError, cli


@pytest.fixture(scope="module")
def font():
    return glyphs.render(3)


@pytest.fixture(scope="module")
def plain(font):
    return Synthesizer(*font)


@pytest.fixture(scope="module")
def table(plain):
    return plain.draw(range(3000), 5)[0]


def uniform(values, low, high):
    """Whether the values look uniform on [low, high): the largest distance of their distribution from a straight line,
    times the root of their number, exceeds 2 once in 1500 times (Kolmogorov)."""
    values = np.sort((np.asarray(values, float) - low) / (high - low))
    assert values[0] >= 0 and values[-1] < 1
    line = (np.arange(len(values)) + .5) / len(values)
    return abs(values - line).max() * len(values) ** .5 < 2


def one(synthesizer, key, seed):
    """-> one image (1, size, size) and its label (26,)."""
    images, labels = synthesizer.batch([key], seed)
    return images[0], labels[0]


def flat(value):
    """26 glyphs of one grey."""
    return np.full((26, 28, 28), value, np.uint8), np.arange(26)


# ---- the recipe ----------------------------------------------------------------------------------------------------
def test_ten_to_fourteen_distinct_letters(table):
    per_image = np.bincount(table["image"])
    assert len(per_image) == 3000 and np.allclose(np.bincount(per_image, minlength=15)[10:], 600, atol=100)
    assert per_image.min() == 10 and per_image.max() == 14
    assert len(np.unique(table["image"] * 26 + table["letter"])) == len(table)
    assert np.allclose(np.bincount(table["letter"], minlength=26), len(table) / 26, rtol=.1)


def test_the_glyph_is_one_of_its_letter_and_any_of_them(font):
    rng = np.random.default_rng(0)
    letters = np.concatenate((np.arange(26), rng.integers(0, 26, 100)))  # not as many of each
    synthesizer = Synthesizer(np.arange(126, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2), letters)
    table, *_ = synthesizer.draw(range(2000), 0)
    which = synthesizer.pixels[table["glyph"], 0, 0, 0].numpy() // 2
    assert (letters[which] == table["letter"]).all()
    expected = len(table) / 26 / np.bincount(letters)[letters]
    assert np.allclose(np.bincount(which, minlength=126), expected, rtol=.3, atol=20)


def test_boxes_angles_scales_and_places(table):
    side = table["side"]
    turn = np.radians(table["angle"])
    assert (side == np.floor(28 * table["scale"] * (abs(np.cos(turn)) + abs(np.sin(turn))))).all()
    assert side.min() >= 28 and side.max() <= 79 and side.max() > 76 and side.min() < 31
    assert abs(side.mean() - 53) < .3
    assert uniform(table["angle"], 0, 360) and uniform(table["scale"], 1, 2)
    for name in ("x", "y"):
        assert table[name].min() >= 0 and (table[name] + side).max() == 256
        spread = np.random.default_rng(0).random(len(side))  # whole numbers, spread over their unit
        assert uniform((table[name] + spread) / (256 - side + 1), 0, 1)


def test_three_of_ten_are_dimmed(table):
    dim = table["factor"] != 1
    assert abs(dim.mean() - .3) < .01
    assert uniform(table["factor"][dim], .3, .7)


def test_nothing_hangs_together(table):
    columns = np.stack([table[name] for name in ("letter", "angle", "scale", "factor")]
                       + [table[name] / (257 - table["side"]) for name in ("x", "y")])
    assert abs(np.corrcoef(columns) - np.eye(6)).max() < .03


@pytest.mark.parametrize("largest", [254, 100, 255, 0])
def test_noise_is_uniform_whole_and_new_everywhere(largest):
    images, _ = Synthesizer(*flat(0), noise=largest).batch(range(8), 0)
    counts = np.bincount(images.numpy().ravel(), minlength=256)
    expected = images.numel() / (largest + 1)
    assert counts[largest + 1:].sum() == 0
    chi = ((counts[:largest + 1] - expected) ** 2 / expected).sum()
    assert abs(chi - largest) <= 5 * (2 * largest) ** .5  # mean and deviation of chi squared
    if largest:
        x = images.double().flatten(1) - images.double().mean()
        x = x / x.norm(dim=1, keepdim=True)
        assert (x @ x.T - torch.eye(8)).abs().max() < .02
        assert all((x * x.roll(shift, 1)).sum(1).abs().max() < .02 for shift in (1, 4, 256))


def test_the_picture_has_what_the_recipe_says():
    """Seen from outside: a white square in the dark, measured in the image."""
    synthesizer, sides, dim = Synthesizer(*flat(200), noise=0, counts=(1, 1)), [], []
    table, *_ = synthesizer.draw(range(300), 2)
    for row, image in zip(table, synthesizer.batch(range(300), 2)[0][:, 0].numpy()):
        y, x = np.nonzero(image)
        assert row["x"] <= x.min() and x.max() < row["x"] + row["side"]
        assert row["y"] <= y.min() and y.max() < row["y"] + row["side"]
        sides.append((x.max() - x.min() + y.max() - y.min()) / 2 + 1)
        assert abs((image / (255 * row["factor"])).sum() - (28 * row["scale"]) ** 2) < 120  # area: half a pixel around
        dim.append(image.max() / 255)
    assert abs(np.array(sides) - table["side"]).max() <= 2 and 51 < np.mean(sides) < 55
    dim = np.array(dim)
    assert .2 < (dim < 1).mean() < .4 and dim.min() >= .295 and dim[dim < 1].max() <= .705


def test_a_quarter_turn_and_a_pure_scale_are_exact(font):
    pixels, letters = font
    black, synthesizer = torch.zeros(96 * 96), Synthesizer(*font, size=96, noise=0)
    row = np.zeros(1, dirty_mnist.PLACED)
    bright = np.minimum(2 * pixels[letters == 6][0].astype(int), 255)
    for name, value in dict(glyph=6 * 3, side=28, x=40, y=5, scale=1, factor=1).items():
        row[name] = value
    for k in range(4):
        row["angle"], canvas = 90 * k, black.clone()
        synthesizer._add(canvas, row)
        expected = np.zeros((96, 96))
        expected[5:33, 40:68] = np.rot90(bright, k)
        assert np.allclose(canvas.view(96, 96).numpy(), expected, atol=1)
    row["angle"], row["scale"], row["side"], canvas = 0, 2, 56, black.clone()
    synthesizer._add(canvas, row)
    expected = torch.nn.functional.interpolate(torch.tensor(bright)[None, None].double(), scale_factor=2,
                                               mode="bilinear")[0, 0].numpy()
    inner = canvas.view(96, 96).numpy()[5:61, 40:96]
    assert abs(inner - expected)[1:-1, 1:-1].max() <= .51  # at the rim, black comes in


def slow(synthesizer, table, noise, glyph_pixels):
    """One image, in float64, pixel by pixel of every box; each letter is rounded as in eight bits."""
    canvas = noise.astype(int).copy()
    for row in table:
        side, turn = row["side"], np.radians(row["angle"])
        glyph = np.zeros((30, 30))
        glyph[1:-1, 1:-1] = np.minimum(2.0 * glyph_pixels[row["glyph"]], 255)
        for i in range(side):
            for j in range(side):
                right, down = j + .5 - side / 2, i + .5 - side / 2
                # the same point, seen from a glyph that was turned counter-clockwise
                x = (right * np.cos(turn) - down * np.sin(turn)) / row["scale"] + 14 + .5
                y = (right * np.sin(turn) + down * np.cos(turn)) / row["scale"] + 14 + .5
                if not (0 <= x < 29 and 0 <= y < 29):
                    continue
                c, r = int(x), int(y)
                u, v = x - c, y - r
                value = ((1 - u) * (1 - v) * glyph[r, c] + u * (1 - v) * glyph[r, c + 1]
                         + (1 - u) * v * glyph[r + 1, c] + u * v * glyph[r + 1, c + 1])
                canvas[row["y"] + i, row["x"] + j] += round(value * row["factor"])
    return canvas.clip(0, 255)


@pytest.mark.parametrize("size, counts", [(256, (10, 14)), (80, (3, 5))])
def test_against_a_slow_renderer(size, counts):
    rng = np.random.default_rng(0)
    pixels = (rng.integers(0, 256, (52, 28, 28)) * (rng.random((52, 28, 28)) < .5)).astype(np.uint8)  # up to the edge
    letters = np.repeat(np.arange(26), 2)
    synthesizer = Synthesizer(pixels, letters, size=size, counts=counts)
    empty = Synthesizer(np.zeros_like(pixels), letters, size=size, counts=counts)
    keys = [3, 70]
    table, *_ = synthesizer.draw(keys, 1)
    noise, images = (s.batch(keys, 1)[0][:, 0].numpy() for s in (empty, synthesizer))
    assert noise.max() == 254
    for k in range(2):
        expected = slow(synthesizer, table[table["image"] == k], noise[k], pixels)
        off = abs(expected - images[k])
        assert off.max() <= 1 and (off > 0).mean() < 1e-3  # float32 rounds a tie the other way
        assert (expected == 255).mean() > .01 and (expected != noise[k]).mean() > .2


def test_labels_are_what_is_drawn():
    """Each letter has a grey of its own, so that the picture itself tells which ones are there."""
    pixels = np.zeros((26, 28, 28), np.uint8)
    pixels[:, 10:18, 10:18] = 2 + 4 * np.arange(26)[:, None, None]
    synthesizer = Synthesizer(pixels, np.arange(26), noise=0, counts=(1, 26))
    images, labels = synthesizer.batch(range(40), 0)
    table, *_ = synthesizer.draw(range(40), 0)
    assert images.dtype == torch.uint8 and images.shape == (40, 1, 256, 256)
    assert labels.dtype == torch.float32 and labels.shape == (40, 26)
    for k in range(40):
        rows = table[table["image"] == k]
        assert set(rows["letter"]) == set(labels[k].nonzero()[:, 0].tolist()) and labels[k].sum() == len(rows)
        if len(rows) == 1 and rows["factor"] == 1:
            assert images[k].max() == 2 * (2 + 4 * rows["letter"][0])
    single = Synthesizer(pixels, np.arange(26), noise=0, counts=(1, 1))
    images, labels = single.batch(range(60), 0)
    full = single.draw(range(60), 0)[0]["factor"] == 1
    assert ((images.flatten(1).amax(1) // 2 - 2) // 4)[full].tolist() == labels.argmax(1)[full].tolist()
    assert torch.equal(labels, single.draw(range(60), 0)[1])


# ---- the same whenever and wherever ----------------------------------------------------------------------------------
def test_an_image_depends_on_its_key_alone(plain):
    images, labels = plain.batch([5, 6, 7, 100_000], 0)
    for k, key in enumerate([5, 6, 7, 100_000]):
        image, label = one(plain, key, 0)
        assert torch.equal(image, images[k]) and torch.equal(label, labels[k])
    many, _ = plain.batch(list(range(40)), 0)
    assert torch.equal(many[5:8], images[:3])
    seen = {one(plain, key, seed)[0].numpy().tobytes() for seed in (0, 1)
            for key in (0, 1, (0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 0))}
    assert len(seen) == 14


def test_data_set(tmp_path, font):
    sample_letters.write_glyphs(tmp_path / "letters.csv", *font)
    data = Synthetic(tmp_path / "letters.csv", 6, seed=3)
    assert len(data) == 6 and set(data[(0, 0)]) == {"image", "label"}
    image, label = one(Synthesizer(*font), (1, 4), 3)
    assert torch.equal(data[(1, 4)]["image"], image) and torch.equal(data[(1, 4)]["label"], label)
    assert torch.equal(data[2]["image"], one(Synthesizer(*font), 2, 3)[0])
    seen = {sample["image"].numpy().tobytes() for sample in (data[(e, i)] for e in range(3) for i in range(8))}
    assert len(seen) == 24
    small = Synthetic(tmp_path / "letters.csv", 6, seed=3, size=96, noise=10, counts=(2, 2))
    batches = {}
    for workers in (0, 2):
        loader = train_loader(small, 4, workers=workers)
        loader.batch_sampler.set_epoch(1)
        batches[workers] = list(loader)
    assert [batch["image"].shape for batch in batches[0]] == 2 * [(4, 1, 96, 96)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*batches.values()) for key in a)
    assert len({image.numpy().tobytes() for batch in batches[0] for image in batch["image"]}) == 8
    assert len(torch.cat([batch["label"] for batch in eval_loader(small, 4)])) == 6


def test_numbers_of_letters_the_wrong_way_round(font):
    with pytest.raises(UserError, match="--letters-per-image 5 4: the smaller number comes first"):
        Synthesizer(*font, counts=(5, 4))


def test_missing_letters(font):
    kept = (font[1] != 3) & (font[1] != 25)
    with pytest.raises(UserError, match="no glyph of DZ;"):
        Synthesizer(font[0][kept], font[1][kept])


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(font):
    return Synthesizer(*font, size=80, counts=(1, 3))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_files_are_the_images_made_on_the_fly(tmp_path, plain):
    answers = write(plain, tmp_path / "out", 3, seed=9)
    assert answers == str(tmp_path / "out_answer.csv")
    images, labels = plain.batch(range(100_000, 100_003), 9)
    assert list(content(tmp_path / "out")) == ["100000.png", "100001.png", "100002.png"]
    for i, image in enumerate(images):
        path = str(tmp_path / "out" / f"{100_000 + i}.png")
        assert torch.equal(decode_image(path), image)
        picture = Image.open(path)
        assert picture.mode == "L" and np.array_equal(np.array(picture), image[0].numpy())
        with rasterio.open(path) as file:
            assert np.array_equal(file.read(), image.numpy())
    header, *rows = table_of(answers)
    assert header == ["index", *"abcdefghijklmnopqrstuvwxyz"] and [r[0] for r in rows] == ["100000", "100001", "100002"]
    assert np.array_equal(np.array(rows)[:, 1:].astype(float), labels.numpy())


def test_the_names_and_the_number_of_images(tmp_path, small):
    for num in (50, 20, 0):
        write(small, tmp_path / str(num), num, start=7)
    assert list(content(tmp_path / "50"))[::49] == ["000007.png", "000056.png"]
    assert content(tmp_path / "20").items() < content(tmp_path / "50").items() and not content(tmp_path / "0")
    assert table_of(tmp_path / "20_answer.csv") == table_of(tmp_path / "50_answer.csv")[:21]


def test_what_exists_is_left_alone(tmp_path, small):
    (tmp_path / "a").mkdir()
    (tmp_path / "b_answer.csv").write_text("theirs")
    for name, says in (("a", "a: exists already"), ("b", "b_answer.csv: exists already")):
        with pytest.raises(UserError, match=says):
            write(small, tmp_path / name, 2)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b_answer.csv"]


def test_what_cannot_be_written(tmp_path, small, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        write(small, tmp_path / "file/out", 2)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="out: cannot be written .No space"):
        write(small, tmp_path / "out", 2)
    assert os.listdir(tmp_path) == ["file"]


def command(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["dirty_mnist", *map(str, flags)])
    dirty_mnist.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    pixels, letters = glyphs.render(4)
    sample_letters.write_glyphs(tmp_path / "train.csv", pixels, letters)
    out = tmp_path / "out"
    flags = ["--letters", tmp_path / "train.csv", "--out", out]
    command(monkeypatch, *flags, "--num", 3, "--size", 80, "--letters-per-image", 1, 3, "--noise", 9, "--seed", 4,
            "--start-index", 5)
    assert capsys.readouterr().out == f"{out}_answer.csv\n"
    synthesizer = Synthesizer(pixels, letters, size=80, counts=(1, 3), noise=9)
    write(synthesizer, tmp_path / "b", 3, start=5, seed=4)
    assert content(out) == content(tmp_path / "b")
    with pytest.raises(UserError, match="out_answer.csv: exists already"):
        command(monkeypatch, *flags)


@pytest.mark.parametrize("flags", [["--num", 0], ["--size", 78], ["--letters-per-image", 10], ["--noise", 256],
                                   ["--letters-per-image", 0, 3], ["--seed", -1]])
def test_bad_flags(tmp_path, monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, "--out", tmp_path / "out", *flags)
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_stopped_command_leaves_nothing(tmp_path):
    def child():
        os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["dirty_mnist", "--out", str(tmp_path / "images/out"), "--num", "20000", "--size", "80"]
        cli(dirty_mnist.main)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while process.is_alive() and not list(tmp_path.rglob("100040.png")):
        time.sleep(.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143 and not os.listdir(tmp_path / "images")
    assert "Traceback" not in (tmp_path / "log").read_text() and "error" not in (tmp_path / "log").read_text()


# ---- the sample ------------------------------------------------------------------------------------------------------
def test_sample(tmp_path):
    root = Path(sample_letters.letters(tmp_path, train=3, test=2, seed=1))
    assert root == tmp_path / "resources"
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*")) == [
        "dirty_mnist_2nd/00000.png", "dirty_mnist_2nd/00001.png", "dirty_mnist_2nd/00002.png",
        "dirty_mnist_2nd_answer.csv", "mnist_data/test.csv", "mnist_data/train.csv", "sample_submission.csv",
        "test_dirty_mnist_2nd/50000.png", "test_dirty_mnist_2nd/50001.png", "test_dirty_mnist_2nd_answer.csv"]
    for split, name, first in (("", "train", 0), ("test_", "test", 50_000)):
        source = glyphs.read(root / "mnist_data" / f"{name}.csv")
        answers = table_of(root / f"{split}dirty_mnist_2nd_answer.csv")
        for row in answers[1:]:
            image, label = one(Synthesizer(*source), int(row[0]), 1)
            assert torch.equal(decode_image(str(root / f"{split}dirty_mnist_2nd" / f"{int(row[0]):05d}.png")), image)
            assert [int(v) for v in row[1:]] == label.tolist()
    submission = table_of(root / "sample_submission.csv")
    assert submission == [HEADER, ["50000", *"0" * 26], ["50001", *"0" * 26]]
    a, b = (set(g.tobytes() for g in glyphs.read(root / "mnist_data" / f"{k}.csv")[0]) for k in ("train", "test"))
    assert len(a) == 520 and len(b) == 260 and not a & b
    names = (root / "mnist_data" / "train.csv").read_text().split(",", 4)[:4]
    assert names == ["id", "letter", "0", "1"]


def test_sample_says_no(tmp_path):
    (tmp_path / "resources").mkdir()
    with pytest.raises(UserError, match="resources: exists already"):
        sample_letters.letters(tmp_path)
    root = sample_letters.letters(tmp_path / "b", train=1, test=0)
    assert os.listdir(os.path.join(root, "test_dirty_mnist_2nd")) == []
