"""data/cls.py: the layouts, what is wrong in tables, folds and subsets, and views against pixels."""
import csv
import shutil
import unicodedata

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image

from data import cls, images
from data.samples import dirty_mnist, glyphs
from data.loader import eval_loader, train_loader
from tests.conftest import DIRTY, Augmentation, write_dirty
from utils.ops import geometry
from utils.train import engine
from utils.errors import UserError


def to_input(batch, imgsz, scale, mean=(0.0,), std=(1.0,), turn=np.eye(3)):
    """What a net with this input sees of a batch."""
    bands = list(range(1, batch["image"].shape[1] + 1))
    return cls.Input(bands, scale, imgsz, mean=mean, std=std)(batch, turn)


def write_image(path, value=0, size=(8, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def answers(root, *, names=("00000", "00001", "00007"), keys=None, header="index,a,b,c", rows=None, end="\n",
            encoding="utf-8"):
    """resources/dirty_mnist_2nd and its answers; row i is i in binary."""
    for name in names:
        write_image(root / f"dirty_mnist_2nd/{name}.png")
    rows = rows or [f"{key},{i >> 2 & 1},{i >> 1 & 1},{i & 1}" for i, key in enumerate(keys or names)]
    table = root / "dirty_mnist_2nd_answer.csv"
    table.write_bytes(end.join([header, *rows, ""]).encode(encoding))
    return table


def refuses(root, *words, **where):
    with pytest.raises(UserError) as caught:
        cls.read(root, **where)
    text = str(caught.value)
    assert all(str(word) in text for word in words) and "\n" not in text and ";" in text, text


# ---- layouts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", [("00000", "00001", "00007"), (0, 1, 7), ("00000.png", "00001.png", "00007.png"),
                                  (" 00000", "1 ", "007"), ("7", "0", "00001")])
def test_answers_of_the_competition(tmp_path, keys):
    answers(tmp_path, keys=keys)
    table = cls.read(tmp_path)
    assert [int(path.stem) for path in table.files] == [int(str(key).strip().removesuffix(".png")) for key in keys]
    assert all(path.is_file() for path in table.files) and table.names == ["a", "b", "c"] and not table.single_label
    assert table.labels.dtype == np.float32 and table.labels.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("changes", [{"encoding": "utf-8-sig"}, {"end": "\r\n"}, {"end": "\n\n"},
                                     {"header": '"index","a", b ,"c"'},
                                     {"encoding": "utf-8-sig", "header": '"index, or name",a,b,c'},
                                     {"rows": ['"00000","0","0","0"', "00001, 0, 0.0,1.0", "00007,0,1,0"]}])
def test_tables_as_programs_write_them(tmp_path, changes):
    answers(tmp_path, **changes)
    table = cls.read(tmp_path)
    assert table.names == ["a", "b", "c"] and table.labels.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_one_class_an_image_by_a_table(tmp_path):
    for name in ("a", "b, or not", "12"):
        write_image(tmp_path / f"train/{name}.jpg")
    (tmp_path / "train.csv").write_text('name,label\na.jpg,dog\n"b, or not","a cat, black"\n12,dog\n')
    table = cls.read(tmp_path)
    assert table.single_label and table.names == ["a cat, black", "dog"]
    assert [path.stem for path in table.files] == ["a", "b, or not", "12"]
    assert table.labels.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_classes_that_are_numbers_are_sorted_as_such(tmp_path):
    (tmp_path / "train.csv").write_text("name,label\na,10\nb,9\nc,x\nd,100\n")
    rows, labels, names, _ = cls.read_table([tmp_path / "train.csv"])
    assert names == ["9", "10", "100", "x"] and labels.argmax(1).tolist() == [1, 0, 3, 2]
    assert [key for _, key, _ in rows] == list("abcd")


def test_columns_of_classes_and_other_places(tmp_path):
    """train.csv of several classes; the table and the folder where the flags say, whatever lies in root."""
    for name in ("x", "y"):
        write_image(tmp_path / f"train/{name}.png"), write_image(tmp_path / f"else/{name}.png")
    (tmp_path / "train.csv").write_text("name,sun,sea\nx,1,0\ny,1,1\n")
    table = cls.read(tmp_path)
    assert (table.names, table.labels.tolist(), table.single_label) == (["sun", "sea"], [[1, 0], [1, 1]], False)
    (tmp_path / "more.csv").write_text("name,sky,sea\ny,1,0\nx,0,0\n")
    table = cls.read(tmp_path, table=tmp_path / "more.csv", folder=tmp_path / "else")
    assert [str(path.relative_to(tmp_path)) for path in table.files] == ["else/y.png", "else/x.png"]
    assert (table.names, table.labels.tolist()) == (["sky", "sea"], [[1, 0], [0, 0]])


@pytest.mark.parametrize("inside", ["train", "."])
def test_a_folder_for_each_class(tmp_path, inside):
    for name in ("dog/1.png", "cat/2.jpg", "dog/3.tif", "emu/1.png"):  # names may come again in another class
        write_image(tmp_path / inside / name)
    (tmp_path / inside / "notes.txt").write_text("not a class")
    table = cls.read(tmp_path)
    assert table.single_label and table.names == ["cat", "dog", "emu"]
    assert [f"{path.parent.name}/{path.name}" for path in table.files] == ["cat/2.jpg", "dog/1.png", "dog/3.tif",
                                                                           "emu/1.png"]
    assert table.labels.argmax(1).tolist() == [0, 1, 1, 2] and (table.labels.sum(1) == 1).all()


def test_answers_of_the_test_set_are_not_trained_on(tmp_path):
    """The sample data has them beside the others."""
    answers(tmp_path)
    (tmp_path / "test_dirty_mnist_2nd_answer.csv").write_text("index,a\n1,0\n")
    assert cls.read(tmp_path).names == ["a", "b", "c"]


# ---- what is wrong ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, words", [
    (["00000,0,0,0", "00001,0,0", "00007,0,1,0"], ["line 3", "columns", "3"]),
    (["00000,0,0,0,1", "00001,0,0,0", "00007,0,1,0"], ["line 2", "columns"]),
    (["00000,0,0,0", "00001,0,0,2", "00007,0,1,0"], ["line 3", "'2'", "0 or 1"]),
    (["00000,0,0,0", "00001,0,0,1", "00007,0,,0"], ["line 4", "''"]),
    (["00000,0,yes,0", "00001,0,0,1", "00007,0,1,0"], ["line 2", "'yes'"]),
    (["00000,0,nan,0", "00001,0,0,1", "00007,0,1,0"], ["line 2", "'nan'"]),
    (["", "", "00000,0,0.5,0", "00001,0,0,1", "00007,0,1,0"], ["line 4", "'0.5'"]),
    (["00000,0,0,0", "00001,0,0,1", "00000,0,1,0"], ["line 4", "00000", "line 2"]),
    (["00000,0,0,0", "00001,0,0,1", "7,0,1,0", "00007,0,1,0"], ["7 and 00007", "one image"]),
    (["00000,0,0,0", "00001,0,0,1", "7,0,1,0", "00007.png,0,1,0"], ["7 and 00007.png", "one image"]),
    (["00000,0,0,0", "00001,0,0,1", "00007,0,1,0", "8,0,0,0"], ["8 has no image", "dirty_mnist_2nd"]),
    (["00000,0,0,0", "00001,0,0,1", "00007,0,1,0", "9" * 5000 + ",0,0,0"], ["999 has no image"])])
def test_rows_that_are_wrong(tmp_path, rows, words):
    table = answers(tmp_path, rows=rows)
    refuses(tmp_path, table, *words)


@pytest.mark.parametrize("content, words", [
    (b"", ["no header"]), (b"\n\n", ["no header"]), (b"index,a\n", ["no header"]), (b"index\n00000\n", ["two columns"]),
    (b"00000,0,1,0\n00001,0,0,1\n00007,0,1,0\n", ["two columns of one name"]),
    (b"index,a,b,a\n0,0,0,0\n", ["one name"]),
    ("index,a,b\n0,0,é\n".encode("utf-16"), ["not a readable CSV"]),
    (b"index,\xff,b\n0,0,1\n", ["not a readable CSV"]), (b"index,a,b\n0,\0,1\n", ["line 2"]),
    (b"index;a;b\n0;1;1\n", ["two columns"]),
    (b"index,label\n0,x\n1,\n7,y\n", ["line 3 has no class"]), (b"index,label\n0,x\n1,x\n7,x\n", ["class x"])])
def test_tables_that_are_wrong(tmp_path, content, words):
    table = answers(tmp_path)
    table.write_bytes(content)
    refuses(tmp_path, table, *words)


def test_images_without_a_row_are_left_out_and_counted(tmp_path, capsys):
    answers(tmp_path, rows=["00001,0,1,0", "00007,1,1,0"])
    assert [path.stem for path in cls.read(tmp_path).files] == ["00001", "00007"]
    assert "1 images have no row" in (said := capsys.readouterr().out) and "00000.png" in said


def test_what_is_not_there(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere: no such folder", "--data")
    refuses(tmp_path, "neither a table", "two folders of classes")
    write_image(tmp_path / "train/cat/1.png")
    refuses(tmp_path, tmp_path / "train", "two folders of classes")
    (tmp_path / "train/dog").mkdir()
    refuses(tmp_path, "train/dog: no images")
    (tmp_path / "train.csv").write_text("name,label\n1,cat\n2,dog\n")
    refuses(tmp_path, "train.csv: 2 has no image in", "(1 such)")  # 1 is train/cat/1.png
    refuses(tmp_path, "no.csv: not a readable CSV", table=tmp_path / "no.csv")
    refuses(tmp_path, "no: no such folder", folder=tmp_path / "no")
    refuses(tmp_path, f"{tmp_path}: not a readable CSV", table=tmp_path)


def test_two_images_of_one_name(tmp_path):
    answers(tmp_path)
    write_image(tmp_path / "dirty_mnist_2nd/00001.jpg")
    refuses(tmp_path, "00001.png: ", "00001.jpg has the same name")


def test_bands_are_checked_in_every_file(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", size=(8 + i, 9)) for i in range(3)]
    images.check_bands(files, [1])
    with pytest.raises(UserError, match="0.png: has 1 bands, band 3 is asked for; leave it out"):
        images.check_bands(files, [1, 3])


# ---- folds and subsets -----------------------------------------------------------------------------------------------
def test_strata():
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]], np.float32)
    assert cls.strata(labels) == [(1, 0), (2, 1), (3, 2), (0, 0), (1, 0)]
    assert cls.strata(np.eye(3, dtype=np.float32)[[2, 0, 2]]) == [(1, 2), (1, 0), (1, 2)]


def test_a_subset_keeps_every_class_share():
    """Against random subsets of the same size, and never another size than asked for by more than one in ten."""
    rng = np.random.default_rng(0)
    one = np.eye(6, dtype=np.float32)[rng.choice(6, 1200, p=[.5, .25, .15, .06, .03, .01])]
    several = (rng.random((1200, 8)) < np.linspace(0.02, 0.7, 8)).astype(np.float32)
    for labels, better in ((one, 0.35), (several, 0.75)):
        for count in (60, 240, 700):
            chosen = cls.subset(labels, count)
            assert len(set(chosen)) == len(chosen) and abs(len(chosen) - count) <= 0.1 * count
            assert set(chosen) <= set(range(1200)) and chosen == cls.subset(labels, count)
            change = [np.abs(labels[picked].mean(0) - labels.mean(0)).mean() for picked in (
                chosen, *(rng.choice(1200, len(chosen), replace=False) for _ in range(30)))]
            assert change[0] < better * np.mean(change[1:])
    assert cls.subset(one, 240, seed=1) != cls.subset(one, 240, seed=2)
    rare = np.flatnonzero(one[:, 5])
    assert any(i in rare for i in cls.subset(one, 240))


# ---- images and views ------------------------------------------------------------------------------------------------
class Pictures(torch.utils.data.Dataset):
    """Tensors in the place of files."""
    def __init__(self, *pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return {"image": self.pictures[i], "label": torch.tensor([float(i)])}


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def shown(sample, imgsz, **options):
    """One sample as the net sees it, (C, imgsz, imgsz), 0..255."""
    return to_input(cls.collate([dict(sample)]), imgsz, 1.0, **options)[0]


def test_the_whole_view_is_the_image():
    picture = noise(2, 24, 24)
    sample = cls.AugmentedImages(Pictures(picture), 24)[0]
    assert sample["index"] == 0 and sample["hole"].tolist() == [0] * 4 and sample["matrix"].dtype == torch.float64
    torch.testing.assert_close(shown(sample, 24), picture.float(), atol=0.01, rtol=0)
    for size, imgsz in (((12, 40), 20), ((9, 13), 30)):  # another side ratio: both sides are scaled to imgsz
        picture = noise(1, *size)
        got = shown(cls.AugmentedImages(Pictures(picture), imgsz)[0], imgsz)
        centre = F.interpolate(picture[None].float(), (imgsz, imgsz), mode="bilinear")[0]  # repeats the edge instead
        torch.testing.assert_close(got[:, 3:-3, 3:-3], centre[:, 3:-3, 3:-3], atol=0.01, rtol=0)


def test_random_views_are_quarter_turns_and_flips():
    """Without the rest, each of the eight comes, and each is one of torch's."""
    picture = noise(3, 16, 16)
    views = cls.AugmentedImages(Pictures(picture), 16, **Augmentation(rot90=True, hflip=0.5, vflip=0.5).options)
    eight = [torch.rot90(p, k, (1, 2)) for k in range(4) for p in (picture, picture.flip(2))]
    seen = [[(shown(views[0, i], 16) - want.float()).abs().max() < 0.01 for want in eight].index(True)
            for i in range(80)]
    assert set(seen) == set(range(8))
    only = cls.AugmentedImages(Pictures(picture), 16)
    assert all((shown(only[0, i], 16) - picture.float()).abs().max() < 0.01 for i in range(8))
    turning = cls.AugmentedImages(Pictures(picture), 16, **DIRTY.but(p_affine=0.0).options)
    turned = [shown(turning[0, i], 16) for i in range(40)]
    kinds = {next(k for k in range(4) if (t - torch.rot90(picture, k, (1, 2)).float()).abs().max() < 0.01)
             for t in turned}
    assert kinds == {0, 1, 2, 3}


def test_affine_views_are_where_their_matrices_say():
    """A gradient tells at every pixel of the view from which place of the image it comes, outside by reflection."""
    height, width, imgsz = 40, 60, 32
    x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    changes = DIRTY.but(p_affine=1.0, degrees=30, translate=0.1, zoom=(0.9, 1.2))
    views = cls.AugmentedImages(Pictures(torch.stack((x, y))), imgsz, **changes.options)
    for i in range(6):
        sample = views[3, i]
        seen = shown(sample, imgsz).double().numpy()
        v, u = np.mgrid[:imgsz, :imgsz] + 0.5
        want = np.linalg.inv(sample["matrix"].numpy()) @ np.stack((u, v, np.ones_like(u))).reshape(3, -1)
        want = want[:2].reshape(2, imgsz, imgsz)
        inside = (want[0] > 1) & (want[0] < width - 1) & (want[1] > 1) & (want[1] < height - 1)
        assert 0.6 < inside.mean() < 1
        last = np.array([width, height])[:, None, None] - 1  # pixels' centres are 0 .. last, which are not repeated
        assert np.abs(seen - 0.5 - (last - abs((want - 0.5) % (2 * last) - last))).max() < 0.01


def test_affine_views_change_as_much_as_asked_for():
    rng, found = np.random.default_rng(0), []
    changes = Augmentation(degrees=20, translate=0.1, zoom=(0.7, 1.3), zoom_linear=True)
    for _ in range(400):
        matrix, _ = changes.view(rng, 100, 100, 100)
        zoom = np.linalg.det(matrix[:2, :2]) ** 0.5
        angle = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))
        found.append((angle, zoom, *(matrix @ (50, 50, 1))[:2] - 50))
        np.testing.assert_allclose(matrix[:2, :2] @ matrix[:2, :2].T, np.eye(2) * zoom ** 2, atol=1e-9)
    low, high = np.min(found, 0), np.max(found, 0)
    limits = np.array([(-20, 20), (0.7, 1.3), (-10, 10), (-10, 10)])
    assert (low >= limits[:, 0] - 1e-9).all() and (high <= limits[:, 1] + 1e-9).all()
    assert (high - low > 0.95 * np.ptp(limits, axis=1)).all()
    still = DIRTY.but(rot90=False)
    assert abs(np.mean([still.view(rng, 9, 9, 9)[0][0, 0] == 1 for _ in range(400)]) - 0.5) < 0.1


def test_the_blank_square():
    imgsz, cutout = 40, 0.3
    views = cls.AugmentedImages(Pictures(torch.full((2, 40, 40), 200, dtype=torch.uint8)), imgsz, p_cutout=1.0,
                                cutout_size=cutout)
    corners = []
    for i in range(60):
        sample = views[0, i]
        x1, y1, x2, y2 = sample["hole"].tolist()
        assert x2 - x1 == pytest.approx(12, abs=1e-4) and y2 - y1 == pytest.approx(12, abs=1e-4)
        assert 0 <= min(x1, y1) and max(x2, y2) <= imgsz + 1e-4
        seen = shown(sample, imgsz)
        centres = np.arange(imgsz) + 0.5
        want = np.outer((centres > y1) & (centres < y2), (centres > x1) & (centres < x2))
        assert (seen.numpy() < 100)[0].tolist() == (seen.numpy() < 100)[1].tolist() == want.tolist()
        assert seen.numpy()[:, want].max() == 0 and want.sum() in (121, 132, 144, 156, 169)
        corners.append((x1, y1))
    assert np.ptp(corners, axis=0).min() > 0.8 * 28 and abs(np.corrcoef(np.transpose(corners))[0, 1]) < 0.4
    normal = shown(sample, imgsz, mean=(50.0,), std=(10.0, 20.0))  # 0 before normalisation, as the recipe has it
    assert normal[0].min() == -5 and normal[1].min() == -2.5 and normal[1].max() == pytest.approx(7.5, abs=1e-3)
    half = cls.AugmentedImages(views.source, imgsz, p_cutout=0.5)
    assert abs(np.mean([half[0, i]["hole"].sum() > 0 for i in range(300)]) - 0.5) < 0.1


def test_scale_mean_and_std():
    picture = noise(3, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    batch = cls.collate([cls.AugmentedImages(Pictures(picture), 8)[0]])
    got = to_input(batch, 8, 255.0, mean, std)[0]
    want = (picture / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(batch["image"][0], picture)  # the batch, and a cache behind it, are as before


def test_turns_of_test_time_augmentation():
    """A turn shows what rot90 makes of the view without it, and the four undo each other."""
    pictures = Pictures(noise(1, 20, 20), noise(1, 20, 20, seed=1), noise(1, 31, 17, seed=2))
    for keys in ([0, 1], [0, 2], [(0, 0), (0, 4)]):
        batch = cls.collate([cls.AugmentedImages(pictures, 20, **DIRTY.options)[key] for key in keys])
        plain = to_input(batch, 20, 1.0)
        for k in range(4):
            seen = to_input(batch, 20, 1.0, turn=geometry.rot90(k, 20, 20))
            torch.testing.assert_close(seen, torch.rot90(plain, k, (2, 3)), atol=0.02, rtol=0)


@pytest.mark.parametrize("imgsz", [16, 37])
def test_images_of_several_sizes_in_one_batch_are_each_seen_whole(imgsz):
    pictures = Pictures(noise(1, 30, 10), noise(1, 16, 16, seed=1), noise(1, 12, 50, seed=2))
    for keys in ([0, 1, 2], [(0, 0), (0, 1), (1, 2)]):
        samples = [cls.AugmentedImages(pictures, imgsz, **DIRTY.options, p_cutout=0.5)[key] for key in keys]
        alone = [shown(sample, imgsz) for sample in samples]
        together = to_input(cls.collate(samples), imgsz, 1.0)
        assert together.shape == (3, 1, imgsz, imgsz)
        torch.testing.assert_close(together, torch.stack(alone), atol=0.05, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mixed", [False, True])
def test_8_and_16_bits(tmp_path, workers, mixed):
    """Files of 16 bits come as they are, also beside those of 8 bits and beside reduced ones, which are float."""
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 16))
    files = []
    for i, (dtype, side) in enumerate((("uint16", 16), ("uint8" if mixed else "uint16", 16), ("uint16", 64))):
        files.append(tmp_path / f"{i}.tif")
        with rasterio.open(files[-1], "w", driver="GTiff", count=2, height=side, width=side, dtype=dtype) as file:
            file.write((values.repeat(side // 16, 1).repeat(side // 16, 2) * (1 if mixed else 200)).astype(dtype))
    views = cls.AugmentedImages(cls.Images(files, np.zeros((3, 1), np.float32), limit=16), 16)
    batch = next(iter(eval_loader(views, 3, workers=workers, collate=cls.collate)))
    seen = to_input(batch, 16, 1.0) / (1 if mixed else 200)
    torch.testing.assert_close(seen[:2], torch.from_numpy(np.stack([values] * 2)).float(), atol=0.02, rtol=0)
    large = torch.from_numpy(values.repeat(4, 1).repeat(4, 2))[None].float()
    reduced = F.interpolate(large, (16, 16), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(seen[2], reduced, atol=0.02, rtol=0)


def test_bands_and_limits(tmp_path):
    file = tmp_path / "1.png"
    picture = np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)
    Image.fromarray(picture).save(file)
    label = np.array([[0, 1, 0]], np.float32)
    sample = cls.Images([file], label, bands=[3, 1])[0]
    assert np.array_equal(sample["image"].numpy(), picture[..., [2, 0]].transpose(2, 0, 1))
    assert sample["label"].tolist() == [0, 1, 0] and sample["label"].dtype == torch.float32
    for limit, size in ((50, (50, 80)), (25, (25, 40)), (10, (10, 16)), (1, (1, 2)), (200, (50, 80))):
        image = cls.Images([file], label, limit=limit)[0]["image"]
        assert image.shape == (3, *size) and image.dtype == torch.uint8
    means = picture.reshape(10, 5, 16, 5, 3).mean((1, 3)).transpose(2, 0, 1)
    fifth = cls.Images([file], label, limit=10)[0]["image"].numpy()
    assert np.abs(fifth - means).mean() < 12 and fifth.std() < 35 < picture.std()  # averaged, not picked


def test_a_view_depends_on_seed_epoch_and_index_alone(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", 20 * i + 10, size=(12 + i, 16)) for i in range(6)]
    labels = np.eye(6, dtype=np.float32)

    def batches(epoch, seed=0, cache=None, workers=0, bs=2):
        views = cls.AugmentedImages(cls.Images(files, labels, cache=cache), 16, **DIRTY.options, seed=seed, p_cutout=0.5)
        loader = train_loader(views, bs, seed=5, workers=workers, collate=cls.collate)
        loader.batch_sampler.set_epoch(epoch)
        seen = {}
        for batch in loader:
            images = to_input(batch, 16, 255.0)
            for n, i in enumerate(batch["index"].tolist()):
                assert batch["label"][n].argmax() == i and images[n].max() == pytest.approx((20 * i + 10) / 255, 1e-3)
                seen[i] = (torch.from_numpy(batch["matrix"][n]), batch["hole"][n])
        assert set(seen) == set(range(6))
        return torch.cat([torch.cat([part.double().flatten() for part in seen[i]]) for i in range(6)])

    want = batches(1)
    for options in ({"cache": "ram"}, {"workers": 2}, {"bs": 3}, {"cache": "ram", "workers": 1}):
        assert torch.equal(batches(1, **options), want)
    assert not torch.equal(batches(1, seed=1), want) and not torch.equal(batches(2), want)
    views = cls.AugmentedImages(cls.Images(files, labels), 16, **DIRTY.options, p_cutout=0.5)
    samples = [views[0, 2], views[0, 8], views[1, 2]]  # the same image, counted on: another view
    assert {int(sample["index"]) for sample in samples} == {2}
    assert len({str(sample["matrix"]) + str(sample["hole"]) for sample in samples}) == 3


def test_a_disk_cache_knows_bands_and_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(picture).save("1.png")
    for options in ({}, {"limit": 16}, {"limit": 16, "bands": [2]}, {"bands": [2]}, {}):
        cached, fresh = (cls.Images(["1.png"], np.ones((1, 1)), cache=cache, **options)[0]["image"]
                         for cache in ("disk", None))
        assert torch.equal(cached, fresh)


def write_letters(path):
    pixels, letters = glyphs.render(1)
    with open(path, "w", newline="") as file:
        rows = [[chr(65 + letter), *row] for letter, row in zip(letters, pixels.reshape(26, -1).tolist())]
        csv.writer(file).writerows([["letter", *map(str, range(784))], *rows])
    return path


def test_images_made_on_the_fly(tmp_path):
    """Synthetic through Views: new images each epoch, and views drawn from other numbers than the images."""
    path = write_letters(tmp_path / "letters.csv")
    source = dirty_mnist.Synthetic(path, 5, seed=3, size=96)
    views = cls.AugmentedImages(source, 96, **DIRTY.but(p_affine=0.0).options, seed=3)
    assert len(views) == 5
    loader = train_loader(views, 2, seed=3, collate=cls.collate)
    first = [batch for batch in loader]
    assert [len(batch["image"]) for batch in first] == [2, 2, 2]
    keys = [key for batch in loader.batch_sampler for key in batch]
    for key, image, label, index, matrix in zip(
            keys, *(np.concatenate([b[name] for b in first]) for name in ("image", "label", "index", "matrix"))):
        (wanted,), (letters,) = source.synthesizer.batch([key], 3)
        assert np.array_equal(image, wanted) and np.array_equal(label, letters) and index == key[1] % 5
        assert 10 <= label.sum() <= 14
        turn, _ = DIRTY.but(p_affine=0.0).view(np.random.default_rng((3, *key)), 96, 96, 96)
        assert np.allclose(matrix, turn)
    assert not torch.equal(views[0, 1]["image"], views[1, 1]["image"])
    assert torch.equal(views[4]["image"], source[4]["image"]) and np.allclose(views[4]["matrix"], np.eye(3))


def test_matrices_stay_on_the_cpu():
    """`see` takes them from there: fetched back from a GPU, they would make it wait for all that is queued."""
    sample = {"image": torch.zeros(1, 8, 8, dtype=torch.uint8), "matrix": torch.eye(3, dtype=torch.float64), "index": 0}
    batch = engine.to_device(cls.collate([dict(sample), dict(sample)]), torch.device("meta"))
    assert np.array_equal(batch["matrix"], np.stack([np.eye(3)] * 2)) and batch["image"].device.type == "meta"


def test_images_made_on_the_fly_are_reduced_like_files(tmp_path):
    """A canvas far larger than the net's input: what trains looks like what validates, noise averaged."""
    path = write_letters(tmp_path / "letters.csv")
    source = dirty_mnist.Synthetic(path, 4, size=128)
    pictures = [source[i]["image"] for i in range(4)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture[0].numpy()).save(tmp_path / f"{i}.png")
    files = cls.Images([tmp_path / f"{i}.png" for i in range(4)], np.zeros((4, 26), np.float32), limit=2 * 24)
    made, read = (to_input(cls.collate([cls.AugmentedImages(kind, 24)[i] for i in range(4)]), 24, 255.0)
                  for kind in (source, files))
    assert torch.equal(made, read) and pictures[0].shape == (1, 128, 128)


def test_classes_that_are_numbers_stand_in_their_order(tmp_path):
    names = ["10", "9", "b", "007", "9" * 5000, "a"]
    (tmp_path / "train.csv").write_text("name,class\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    assert cls.read_table([tmp_path / "train.csv"])[2] == ["007", "9", "10", "9" * 5000, "a", "b"]


def folders(root, *names):
    """A folder per class with one picture each."""
    for i, name in enumerate(names):
        (root / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(root / "train" / name / f"{i}.png")
    return root


def test_folders_of_classes(tmp_path):
    table = cls.read(folders(tmp_path / "two", "cat", "dog", ".ipynb_checkpoints"))
    assert table.names == ["cat", "dog"] and len(table.files) == 2 and table.single_label
    one = folders(tmp_path / "one", "dog")
    assert cls.with_names(cls.read(one, least=1), table, one).labels.tolist() == [[0, 1]]
    with pytest.raises(UserError, match="nor two folders of classes"):
        cls.read(one)
    with pytest.raises(UserError, match="--images elsewhere: is for a table"):
        cls.read(tmp_path / "two", folder="elsewhere")


def test_names_in_another_unicode_form(tmp_path):
    """A Mac's archive holds accents apart from their letters."""
    (tmp_path / "train").mkdir()
    for i, name in enumerate(("e\u0301.png", "\u00fc.png")):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "train" / name)
    (tmp_path / "train.csv").write_text("name,class\n\u00e9,a\nu\u0308.png,b\n", encoding="utf-8")
    table = cls.read(tmp_path)
    assert [unicodedata.normalize("NFC", file.name) for file in table.files] == ["\u00e9.png", "\u00fc.png"]


def test_pictures_of_all_kinds_are_rgb(tmp_path):
    """As in detection: a palette's colours, a grey picture among others, inks."""
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(rgb).quantize(16).save(tmp_path / "palette.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "inks.jpg", quality=100)
    files = [tmp_path / name for name in ("grey.png", "rgb.png", "palette.png", "inks.jpg")]
    bands = images.default_bands(files)
    images.check_bands(files, bands)
    assert bands == [1, 2, 3]
    data = cls.Images(files, np.zeros((4, 2), np.float32), bands=bands)
    grey, full, palette, inks = (data[i]["image"].permute(1, 2, 0).numpy() for i in range(4))
    assert (grey == rgb[..., :1]).all() and (full == rgb).all()
    assert (palette == np.asarray(Image.open(files[2]).convert("RGB"))).all()
    assert np.abs(inks.astype(int) - (255, 0, 0)).max() < 4
    assert images.default_bands(files[:1]) == [1]


# ---- tables and folders as people have them --------------------------------------------------------------------------
def test_tables_of_true_and_false(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("A_0.jpg", "A_1.jpg", "a_2.PNG"):
        Image.new("L", (8, 8)).save(tmp_path / "train" / name, "JPEG" if "jpg" in name else "PNG")
    (tmp_path / "train.csv").write_text("file,x,y\ntrain/A_0.JPG,True,1.00\nimages\\a_1,FALSE,0\nA_2.png,1.0,0.00\n")
    table = cls.read(tmp_path)
    assert [p.name for p in table.files] == ["A_0.jpg", "A_1.jpg", "a_2.PNG"] and not table.single_label
    assert table.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    (tmp_path / "train.csv").write_text("file,x,y\nA_0,1,0\nA_1,0,1\na_2,0,1\n")  # one class an image, as columns
    assert cls.read(tmp_path).single_label
    for value in ("2", "0.5", "yes", "nan", ""):
        (tmp_path / "train.csv").write_text(f"file,x,y\nA_0,1,0\nA_1,0,{value}\na_2,0,1\n")
        with pytest.raises(UserError, match="line 3 has the value"):
            cls.read(tmp_path)


def test_of_several_tables_one_is_to_be_told(tmp_path):
    write_dirty(tmp_path)
    table = cls.read(tmp_path)
    for name in ("big", "zoo"):
        shutil.copytree(tmp_path / "dirty_mnist_2nd", tmp_path / name)
        shutil.copy(tmp_path / "dirty_mnist_2nd_answer.csv", tmp_path / f"{name}_answer.csv")
    assert cls.read(tmp_path).files == table.files  # the competition's
    (tmp_path / "dirty_mnist_2nd_answer.csv").unlink()
    with pytest.raises(UserError, match="big_answer.csv and zoo_answer.csv; tell by --labels"):
        cls.read(tmp_path)
    assert len(cls.read(tmp_path, table=tmp_path / "zoo_answer.csv").files) == len(table.files)


def test_folders_of_classes_with_folders_and_validation(tmp_path, capsys):
    for name in ("train/cat/0.jpg", "train/cat/deep/er/1.JPG", "train/dog/0.png", "train/dog/.2.png", "val/dog/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path, "JPEG" if path.suffix.lower() == ".jpg" else "PNG")
    (tmp_path / "train/cat/4.heic").write_bytes(b"RIFF")
    table = cls.read(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in table.files] == [
        "train/cat/0.jpg", "train/cat/deep/er/1.JPG", "train/dog/0.png", "val/dog/3.png"]
    assert table.labels.argmax(1).tolist() == [0, 0, 1, 1] and table.held_out == [False, False, False, True]
    assert "1 files are no TIFF, PNG or JPEG and left out, such as" in capsys.readouterr().out
    (tmp_path / "val/dog").rename(tmp_path / "val/cow")
    with pytest.raises(UserError, match="val/cow: no such class in .*train"):
        cls.read(tmp_path)
