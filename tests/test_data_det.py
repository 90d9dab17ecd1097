"""data/det.py and its augmentation against pixel truth: boxes are drawn, moved, and found again in the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import augment, det, images
from data.det import DetData, Sample, TiledImages, collate, rect
from tests.conftest import PARKING, Augmentation, warp_points
from tests.test_images import png
from utils.errors import UserError
from utils.ops import geometry

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [250, 10, 250], [10, 250, 250]])
PLAIN = dict(**PARKING.but(hue=0, saturation=0, value=0).options, mosaic=0.0)


def colourless(**changes):
    return PARKING.but(hue=0, saturation=0, value=0, **changes).options


def write_images(folder, sizes, *, bands=3):
    """One filled rectangle per image, of a colour of its own on grey. -> list of Sample"""
    rng, samples = np.random.default_rng(0), []
    for i, (h, w) in enumerate(sizes):
        image = np.full((h, w, 3), 114, np.uint8)
        bh, bw = rng.integers(h // 3, h // 2), rng.integers(w // 3, w // 2)
        y, x = rng.integers(0, h - bh), rng.integers(0, w - bw)
        image[y:y + bh, x:x + bw] = COLOURS[i % 6]
        Image.fromarray(image).save(folder / f"{i}.png")
        samples.append(Sample(folder / f"{i}.png", np.array([[i % 6, x, y, x + bw, y + bh]], np.float64), (h, w)))
    return samples


def seen(image, k):
    """The pixels (H, W) in which rectangle k's colour is the nearest: weight of it against grey, 0..1."""
    pixels = image.float().numpy()
    direction = COLOURS[k] - 114.0
    along = ((pixels - 114) * direction).sum(-1) / (direction ** 2).sum()
    across = np.linalg.norm(pixels - 114 - along[..., None] * direction, axis=-1)
    return np.where(across < 30, along, 0)


def check(sample, tolerance=0.75):
    """Every box that the sample claims is where the pixels say, within `tolerance` pixels; returns their number."""
    for label, *box in sample["boxes"].tolist():
        strength = seen(sample["image"], int(label))
        inside = np.zeros(strength.shape, bool)
        x1, y1, x2, y2 = (int(np.floor(v)) if i < 2 else int(np.ceil(v)) for i, v in enumerate(box))
        inside[max(y1 - 1, 0):y2 + 1, max(x1 - 1, 0):x2 + 1] = True
        part = np.where(inside, strength, 0)
        columns, rows = part.max(0), part.max(1)
        xs, ys = np.flatnonzero(columns > .5), np.flatnonzero(rows > .5)
        found = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
        assert np.abs(np.array(found) - box).max() <= tolerance, (label, box, found)
    return len(sample["boxes"])


SIZES = [(60, 80), (80, 60), (64, 64), (48, 120), (100, 70), (90, 90)]


def test_boxes_in_mosaics_are_where_the_pixels_are(tmp_path):
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, **colourless(zoom=(0.7, 1.3), vflip=0.5))
    counts = [check(data[0, i]) for i in range(40)]
    assert np.mean(counts) > 1.5 and max(counts) >= 4


def test_pictures_out_of_sight_are_not_read(tmp_path):
    """The mosaic without them is the one with all of them, by the same random numbers."""
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, **colourless(vflip=0.5))
    read, kept = [], data.pictures.cache.read
    data.pictures.cache.read, count = lambda i: read.append(i) or kept(i), 0
    for i in range(30):
        rng = np.random.default_rng((0, 0, i))
        rng.random()  # mosaic or not
        chosen = [i % 6, *rng.integers(6, size=3)]
        side, matrices, cells = augment.layout(rng, [data.pictures.sizes[k] for k in chosen], 96)
        view, _ = augment.view(rng, side, side, 96, **data.view)
        image, rows = data.compose(chosen, view @ np.array(matrices), geometry.warp_boxes(cells, view).tolist())
        read.clear()
        sample = data[0, i]
        count += len(read)
        assert torch.equal(sample["image"], image.permute(1, 2, 0)) and np.array_equal(sample["boxes"], rows)
    assert 60 < count < 115  # of 120


def test_boxes_of_single_images(tmp_path):
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, mosaic=0, **colourless(vflip=0.5))
    counts = [check(data[0, i]) for i in range(40)]
    assert set(counts) <= {0, 1} and np.mean(counts) > 0.8


def test_quarter_turns_keep_boxes_tight(tmp_path):
    """A rotation by 90 degrees moves corners to corners; smaller ones give the box around the moved one."""
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, mosaic=0, **colourless(degrees=1e-9))
    side, (place,), _ = augment.layout(None, data.pictures.sizes[:1], 96)
    matrix = geometry.rot90(1, 96, 96) @ geometry.rotate(0.0) @ place
    image, rows = data.compose([0], [matrix], [(0, 0, 96, 96)])
    assert check({"image": image.permute(1, 2, 0), "boxes": torch.from_numpy(rows)}) == 1


def test_rotated_boxes_contain_their_pixels(tmp_path):
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, mosaic=0,
                   **colourless(degrees=30, shear=8, zoom=(0.8, 1.2)))
    for i in range(30):
        sample = data[0, i]
        for label, x1, y1, x2, y2 in sample["boxes"].tolist():
            ys, xs = np.nonzero(seen(sample["image"], int(label)) > .6)
            assert xs.min() >= x1 - 1 and xs.max() + 1 <= x2 + 1 and ys.min() >= y1 - 1 and ys.max() + 1 <= y2 + 1
            assert xs.max() + 1 - xs.min() >= .5 * (x2 - x1)


def test_a_sample_depends_on_seed_epoch_and_index_only(tmp_path):
    made = write_images(tmp_path, SIZES)
    one, two = (DetData(made, **PARKING.options, imgsz=64, seed=3, mixup=0.5, cache=cache) for cache in (None, "ram"))
    for i in (0, 5, 7, 3, 0):
        a, b = one[2, i], two[2, i]
        assert all(torch.equal(a[k], b[k]) for k in ("image", "boxes", "colour")) and a["index"] == i % 6
    assert not torch.equal(one[2, 0]["image"], one[3, 0]["image"])
    assert not torch.equal(one[2, 0]["image"], one[2, 6]["image"])  # the same image, drawn a second time
    assert not torch.equal(one[2, 0]["image"], DetData(made, **PARKING.options, imgsz=64, seed=4)[2, 0]["image"])


def test_close_mosaic(tmp_path):
    data = DetData(write_images(tmp_path, SIZES), imgsz=96, close_mosaic=5)
    assert {int(label) for i in range(6) for label in data[4, i]["boxes"][:, 0] if int(label) != i}  # others' boxes
    for epoch in (5, 9):
        for i in range(6):
            assert data[epoch, i]["boxes"][:, 0].tolist() == [i]


def views(samples, **options):
    """The samples' files for validation, with their boxes."""
    return TiledImages([sample.file for sample in samples], [torch.from_numpy(s.boxes).float() for s in samples],
                       **{"bands": [1, 2, 3], "imgsz": 96, "stride": 32} | options)


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_letterbox_and_back(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    made = write_images(tmp_path, SIZES)
    data = views(made, cache=cache)
    assert data.shapes == [rect(size, 96, 32) for size in SIZES]
    for i, sample in enumerate(made):
        view = data[i]
        assert tuple(view["image"].shape[:2]) == data.shapes[i] and view["index"] == i
        assert check(view) == 1
        restored = det.move(view["boxes"][:, 1:], np.linalg.inv(view["matrix"]))
        np.testing.assert_allclose(restored, sample.boxes[:, 1:], rtol=0, atol=1e-3)  # pixels of the file


def test_views_of_large_images_come_back_together(tmp_path):
    """The whole image and its windows, by two checkpoints; what a window's border cuts is left to its neighbours."""
    image = np.full((100, 170, 3), 114, np.uint8)
    truths = np.array([[10, 20, 40, 60], [100, 30, 160, 90], [60, 70, 75, 95]])
    for k, (x1, y1, x2, y2) in enumerate(truths):
        image[y1:y2, x1:x2] = COLOURS[k]
    Image.fromarray(image).save(tmp_path / "large.png")
    small = write_images(tmp_path, SIZES[:2])
    data = TiledImages([small[0].file, tmp_path / "large.png", small[1].file], bands=[1, 2, 3], imgsz=128, stride=32,
                       tile=90, overlap=0.3)
    assert [i for i, _ in data.views] == [0] + [1] * 7 + [2]

    def found(picture, k, score):  # (n, 6): the box around a colour
        ys, xs = np.nonzero(seen(picture.permute(1, 2, 0), k) > 0.5)
        corners = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, score, k]] if len(xs) else np.zeros((0, 6))
        return torch.tensor(np.array(corners), dtype=torch.float32)

    def predict(batch):
        for score in (0.8, 0.4):
            yield [torch.cat([found(picture, k, score) for k in range(3)]) for picture in batch["image"]]

    loader = [collate([data[k]]) for k in torch.randperm(len(data)).tolist()]
    results = data.detect(loader, predict, iou=0.6, max_det=300, weights=[1, 3])
    for rows, want in zip(results, (small[0].boxes, np.column_stack((range(3), truths)), small[1].boxes)):
        rows = rows[rows[:, 5].argsort()]
        assert np.abs(rows[:, :4].numpy() - want[:, 1:]).max() <= 1 and rows[:, 5].tolist() == want[:, 0].tolist()
        assert rows[:, 4].tolist() == pytest.approx([(0.8 + 3 * 0.4) / 4] * len(want))
    assert [len(rows) for rows in data.detect(loader, predict, iou=0.6, max_det=2, weights=[1, 3])] == [1, 2, 1]


def test_the_input_is_one_for_training_and_validation():
    """Scaled, its own bands chosen, clamped; with colours, the same after the matrix."""
    inputs = det.Input(bands=[5, 1], pixel_scale=100.0, imgsz=64)
    x = torch.randint(-20, 150, (2, 3, 4, 5))
    want = (x[:, [2, 0]] / 100).clamp(0, 1)
    assert torch.equal(inputs(x, bands=[1, 2, 5]), want) and torch.equal(inputs(x[:, [2, 0]]), want)
    identity = torch.eye(2).expand(2, 2, 2)
    torch.testing.assert_close(inputs(x[:, [2, 0]], colour=identity), want)
    torch.testing.assert_close(inputs(x[:, [2, 0]], colour=identity * 0.5), (x[:, [2, 0]] / 200).clamp(0, 1))


@pytest.mark.parametrize("size,imgsz,want", [((480, 640), 320, (256, 352)), ((640, 640), 640, (672, 672)),
                                             ((1080, 1920), 1280, (736, 1312)), ((10, 1000), 640, (32, 672))])
def test_rect(size, imgsz, want):  # ceil(side * imgsz / long side / 32 + 0.5) * 32
    assert rect(size, imgsz, 32) == want


def test_letterbox_is_centred_and_in_whole_pixels():
    for h, w in ((480, 640), (333, 517), (1, 999), (50, 20)):
        m = augment.letterbox(h, w, 320, (352, 352))
        corners = geometry.warp_boxes([[0, 0, w, h]], m)[0]
        assert np.abs(corners - np.rint(corners)).max() < 1e-9
        assert max(corners[2] - corners[0], corners[3] - corners[1]) == pytest.approx(320)
        assert abs(corners[0] - (352 - corners[2])) <= 1 and abs(corners[1] - (352 - corners[3])) <= 1


def test_mixup_is_the_mean_and_keeps_all_boxes(tmp_path):
    made = write_images(tmp_path, SIZES)
    sample = DetData(made, imgsz=96, mixup=1.0, **Augmentation(hflip=0.5).options)[0, 1]
    alone = DetData(made, imgsz=96, mixup=0.0, **Augmentation(hflip=0.5).options)[0, 1]
    own = len(alone["boxes"])
    assert torch.equal(sample["boxes"][:own], alone["boxes"]) and len(sample["boxes"]) > own
    share = (sample["image"].float() - 114) / (alone["image"].float() - 114)
    share = share[(alone["image"].float() - 114).abs() > 90]
    assert 0.3 < share.median() < 0.7


def test_images_of_other_kinds(tmp_path):
    """16 bits, five bands: float, unscaled, no data around; boxes as ever."""
    import rasterio
    file = tmp_path / "a.tif"
    pixels = np.full((5, 40, 60), 1000, np.uint16)
    pixels[:, 10:30, 20:50] = 60000
    with rasterio.open(file, "w", driver="GTiff", count=5, height=40, width=60, dtype="uint16") as out:
        out.write(pixels)
    data = DetData([Sample(file, np.array([[0, 20.0, 10, 50, 30]]), (40, 60))], bands=[1, 5], imgsz=96, **PLAIN)
    sample = data[0, 0]
    assert sample["image"].dtype == torch.float32 and sample["image"].shape == (96, 96, 2)
    shown = sample["image"][~sample["image"].isnan()]
    assert shown.max() == 60000 and shown.min() == 1000 and sample["colour"].shape == (2, 2)
    (_, x1, y1, x2, y2), = sample["boxes"].tolist()
    ys, xs = np.nonzero(sample["image"][..., 0].numpy() > 30000)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - (x1, y1, x2, y2)).max() <= 1


def test_bytes_and_16_bits_in_one_mosaic(tmp_path):
    """In a canvas of bytes 1000 would be 232."""
    Image.fromarray(np.full((64, 64), 200, np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.full((64, 64), 1000, np.uint16)).save(tmp_path / "16.png")
    data = DetData([Sample(tmp_path / name, np.zeros((0, 5)), (64, 64)) for name in ("8.png", "16.png")], imgsz=64,
                   **colourless(), mixup=0.5)
    values = {float(v) for epoch in range(6) for v in data[epoch, 0]["image"].unique()}
    assert 1000 in values and 232 not in values


def test_palettes_become_rgb(tmp_path):
    pixels = np.kron(np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [250, 250, 10]]], np.uint8),
                     np.ones((8, 8, 1), np.uint8))
    picture = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    picture.save(tmp_path / "a.png"), picture.save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        assert images.default_bands([tmp_path / name]) == [1, 2, 3]
        found = images.read_picture(tmp_path / name, [1, 2, 3])
        assert found.dtype == torch.uint8 and np.abs(found.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 1
        assert torch.equal(images.read_picture(tmp_path / name, [1, 2, 3], window=(8, 0, 8, 16)), found[:, 8:])


def test_scanned_pages_reach_white(tmp_path):
    """Grey of one and four bits a pixel is 0..255, as Pillow reads it; masks keep their numbers."""
    page = np.zeros((16, 16), bool)
    page[4:8] = True
    Image.fromarray(page).save(tmp_path / "1.png")
    png(tmp_path / "4.png", 4, 0, [bytes([0x0F, 0x37] * 4)] * 16, width=16)
    for name in ("1.png", "4.png"):
        wanted = torch.from_numpy(np.asarray(Image.open(tmp_path / name).convert("L")).copy())
        assert wanted.max() == 255 and images.default_bands([tmp_path / name]) == [1]
        assert torch.equal(images.read_picture(tmp_path / name, [1]), wanted[None])
        assert torch.equal(images.read_picture(tmp_path / name, [1, 2, 3]), wanted.expand(3, -1, -1))
        assert images.read(tmp_path / name).max() == (1 if name == "1.png" else 15)


def test_opacity_is_no_band_unless_asked_for(tmp_path):
    rgba = np.random.default_rng(0).integers(1, 255, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., :2].copy(), "LA").save(tmp_path / "la.png")
    rgba, la = tmp_path / "rgba.png", tmp_path / "la.png"
    assert images.default_bands([rgba, la]) == images.default_bands([la, rgba]) == [1, 2, 3]
    assert images.default_bands([la]) == [1]
    images.check_bands([la, rgba], [1, 2, 3])
    with pytest.raises(UserError, match="la.png: has 2 bands, band 3 is asked for"):
        images.check_bands([rgba, la], [3])
    assert torch.equal(images.read_picture(rgba, [1, 2, 3]), images.read(rgba)[:3])
    assert torch.equal(images.read_picture(rgba, [1, 2, 3, 4]), images.read(rgba))
    assert torch.equal(images.read_picture(la, [1, 2, 3]), images.read(la)[:1].expand(3, -1, -1))


def test_images_without_boxes(tmp_path):
    made = write_images(tmp_path, SIZES[:2])
    data = DetData([sample._replace(boxes=np.zeros((0, 5))) for sample in made], **PARKING.options, imgsz=64)
    batch = collate([data[0, 0], data[0, 1]])
    assert batch["boxes"].shape == (0, 6) and batch["image"].shape == (2, 3, 64, 64)


def test_collate(tmp_path):
    data = DetData(write_images(tmp_path, SIZES), **PARKING.options, imgsz=64)
    samples = [data[0, i] for i in range(3)]
    batch = collate(samples)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last) and batch["colour"].shape == (3, 3, 3)
    for i, sample in enumerate(samples):
        assert torch.equal(batch["image"][i].permute(1, 2, 0), sample["image"])
        assert torch.equal(batch["boxes"][batch["boxes"][:, 0] == i, 1:], sample["boxes"])


# ---- augment ----

def test_visible():
    before = np.array([[0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 900, 8], [0, 0, 5, 5.0]])
    after = np.array([[0, 0, 20, 20], [0, 0, 2, 20], [0, 0, 19, 2.2], [0, 0, 900, 8], [0, 0, 5, 5.0]])
    assert augment.visible(before, after).tolist() == [True, False, True, False, True]
    assert augment.visible(before[:1] * 40, after[:1]).tolist() == [False]  # less than a tenth is left


def test_layout_of_four_meets_in_a_point():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = [tuple(rng.integers(20, 200, 2)) for _ in range(4)]
        side, matrices, cells = augment.layout(rng, sizes, 100)
        centre = cells[0][2:]
        assert side == 200 and all(50 <= c <= 150 for c in centre)
        corners = [geometry.warp_boxes([[0, 0, w, h]], m)[0] for m, (h, w) in zip(matrices, sizes)]
        assert [tuple(np.round(c[list(k)], 6)) for c, k in zip(corners, ((2, 3), (0, 3), (2, 1), (0, 1)))] == \
            [tuple(np.round(centre, 6))] * 4


def test_colour():
    rng = np.random.default_rng(0)
    grey = np.full(3, 0.4)
    for _ in range(20):
        m = Augmentation(hue=0.1).colour(rng, 3)
        np.testing.assert_allclose(m @ grey, grey, atol=1e-6)  # turning hues leaves grey alone
        np.testing.assert_allclose(m @ m.T, np.eye(3), atol=1e-5)
    m = Augmentation(saturation=0.9).colour(rng, 3)
    assert np.ptp(m @ (0.9, 0.3, 0.3)) != pytest.approx(0.6, abs=1e-3) and (m @ grey) == pytest.approx(grey, abs=1e-6)
    gains = [Augmentation(value=0.4).colour(rng, 3)[0, 0] for _ in range(200)]
    assert 0.6 <= min(gains) < 0.65 and 1.35 < max(gains) <= 1.4
    assert np.array_equal(Augmentation(hue=0.5, saturation=0.5).colour(rng, 5), np.eye(5, dtype=np.float32))
    turned = [Augmentation(hue=1 / 3).colour(np.random.default_rng(s), 3) @ (1.0, 0, 0) for s in range(60)]
    assert max(t[1] for t in turned) > 0.9 and max(t[2] for t in turned) > 0.9  # red to green, red to blue


def test_recolour_is_a_matrix_on_every_pixel():
    images, matrices = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 3) * .5
    want = torch.einsum("bij,bjhw->bihw", matrices, images)
    torch.testing.assert_close(augment.recolour(images.clone(), matrices), want)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(augment.recolour(last, matrices), want)


def test_affine_stays_in_its_limits():
    rng = np.random.default_rng(0)
    for _ in range(100):
        m, _ = PARKING.view(rng, 200, 200, 100)
        assert 0.5 <= abs(m[0, 0]) <= 1.5 and m[1, 1] == pytest.approx(abs(m[0, 0])) and abs(m[0, 1]) < 1e-12
        middle = m @ (100, 100, 1)
        assert (abs(middle[:2] - 50) <= 10 + 1e-9).all()


def test_large_images_are_reduced_as_they_are_read(tmp_path):
    """To what a view can show: the boxes still fit."""
    made = write_images(tmp_path, [(h * 4, w * 4) for h, w in SIZES])
    data = DetData(made, imgsz=96, **colourless(zoom=(0.7, 1.3)))
    assert all(max(data.pictures[i].shape[1:]) == 125 for i in range(6))  # 96 * 1.3, up
    assert sum(check(data[0, i], 1.0) for i in range(20)) > 20


def test_validation_resizes_once(tmp_path):
    """What is read is reduced to the letterbox at once, to the pixels that torch gives for the whole file."""
    made = write_images(tmp_path, [(h * 4, w * 4) for h, w in SIZES])
    for view, sample in zip(views(made), made):
        (x, y), (right, bottom) = warp_points([(0, 0), sample.size[::-1]], view["matrix"]).round().astype(int)
        whole = torch.from_numpy(np.asarray(Image.open(sample.file)).copy()).permute(2, 0, 1)[None]
        want = torch.nn.functional.interpolate(whole, (bottom - y, right - x), mode="bilinear", antialias=True)[0]
        assert torch.equal(view["image"][y:bottom, x:right].permute(2, 0, 1), want)
        assert max(bottom - y, right - x) == 96


def test_recolour_takes_the_files_numbers():
    images, matrices = torch.randint(0, 255, (2, 3, 4, 5), dtype=torch.uint8), torch.randn(2, 3, 3) * .5
    torch.testing.assert_close(augment.recolour(images, matrices, 255.0), augment.recolour(images / 255, matrices))


@pytest.mark.parametrize("mode,value,rgb", [
    ("L", 80, (80, 80, 80)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("RGB", (9, 80, 200), (9, 80, 200))])
def test_grey_and_cmyk_become_rgb(tmp_path, mode, value, rgb):
    Image.new(mode, (32, 32), value).save(tmp_path / "a.jpg", quality=100)
    image = images.read_picture(tmp_path / "a.jpg", [1, 2, 3])
    assert image.shape == (3, 32, 32) and (image[:, 16, 16].int() - torch.tensor(rgb)).abs().max() <= 3
