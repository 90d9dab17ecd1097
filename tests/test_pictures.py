"""utils/pictures/sheets.py: colours by their formulas, and the sheets pixel by pixel."""
import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from utils.pictures.sheets import (ERRORS, INK, PALETTE, contact_sheet, error_map, overlay, segmentation_sheet, shade,
                                   to_rgb)
from utils.pictures import sheets


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image)


def near(picture, colour, tolerance=40):
    """(H, W) bool: pixels within `tolerance` of the colour in every channel."""
    return (np.abs(picture.astype(int) - colour) <= tolerance).all(-1)


def scene(count=2, side=32):
    """Seven-band images, masks that are the upper left quarter, and probabilities of 0.9 in the upper quarter."""
    images = torch.rand(count, 7, side, side, generator=torch.Generator().manual_seed(0)) * 1000
    masks = torch.zeros(count, side, side, dtype=torch.long)
    masks[:, :side // 2, :side // 2] = 1
    probs = torch.zeros(count, 1, side, side)
    probs[:, :, :side // 4] = 0.9
    return images, masks, probs


@pytest.fixture
def small(monkeypatch):
    """Sheets show pictures of 32 pixels as they are."""
    monkeypatch.setattr(sheets, "contact_sheet", functools.partial(contact_sheet, max_side=32))


# ---- pictures --------------------------------------------------------------------------------------------------------
def ramps(count):
    """Bands that differ in direction, so that each can be recognised after any stretch: (count, 16, 16)."""
    y, x = np.mgrid[:16, :16]
    return np.stack([x * math.cos(k) + y * math.sin(k) for k in range(count)]).astype(np.float32)


def test_to_rgb_takes_the_last_three_bands_reversed():
    image = ramps(7)
    picture = to_rgb(torch.from_numpy(image))
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    for channel, band in enumerate((6, 5, 4)):
        assert np.corrcoef(picture[..., channel].ravel(), image[band].ravel())[0, 1] > 0.99
    np.testing.assert_array_equal(to_rgb(image[4:]), picture[..., ::-1])


def test_to_rgb_grey_and_colour():
    image = ramps(3)
    for count in (1, 2):
        picture = to_rgb(image[:count])
        assert (picture == picture[..., :1]).all()
        assert np.corrcoef(picture[..., 0].ravel(), image[0].ravel())[0, 1] > 0.99
    np.testing.assert_array_equal(to_rgb(image)[..., 2], to_rgb(image[2:])[..., 0])
    photo = np.random.default_rng(0).integers(100, 120, (3, 5, 4), np.uint8)
    np.testing.assert_array_equal(to_rgb(torch.from_numpy(photo)), photo.transpose(1, 2, 0))
    assert to_rgb(photo.astype(np.int16)).max() == 255  # not uint8, or not three bands: stretched
    assert to_rgb(photo[[0, 0, 1, 2]]).max() == 255


def test_to_rgb_stretches_between_the_percentiles():
    band = np.arange(101, dtype=np.float32)[None, None]  # percentiles 2 and 98 are the values 2 and 98
    expected = np.round((band[0].clip(2, 98) - 2) / 96 * 255)
    np.testing.assert_allclose(to_rgb(band)[..., 0], expected, atol=0)
    np.testing.assert_allclose(to_rgb(torch.from_numpy(band).bfloat16())[..., 0], expected, atol=0)


def test_to_rgb_survives_nan_constants_and_rare_fires():
    band = np.arange(101, dtype=np.float32)
    image = np.stack([band, np.full(101, 7.0), np.full(101, np.nan)]).reshape(3, 1, 101)
    image[0, 0, 50] = np.nan
    image[0, 0, 0], image[0, 0, 100] = -np.inf, np.inf
    picture = to_rgb(image)
    assert picture[0, 50, 0] == 0 and picture[0, 0, 0] == 0 and picture[0, 100, 0] == 255 and picture[0, 60, 0] > 100
    assert (picture[..., 1:] == 0).all()
    fires = np.zeros((1, 10, 100))
    fires[0, 3, 3:5] = 0.5, 0.25
    assert to_rgb(fires)[3, 3:5, 0].tolist() == [255, 128] and to_rgb(fires).sum() == 3 * (255 + 128)


def test_overlay_blends_by_the_formula_and_outlines():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    mask = np.zeros((9, 9), bool)
    mask[2:7, 0:5] = True  # touches the picture's left edge
    drawn = overlay(rgb, mask, palette=[(10, 200, 30)], alpha=0.3)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[~mask], rgb[~mask])
    inside = np.zeros_like(mask)
    inside[3:6, 0:4] = True
    np.testing.assert_array_equal(drawn[inside], np.round(0.7 * rgb[inside] + 0.3 * np.array([10, 200, 30])))
    assert (drawn[mask & ~inside] == (10, 200, 30)).all()
    assert (overlay(rgb, mask, alpha=1)[mask] == PALETTE[0]).all()


def test_overlay_of_classes_uses_the_palette():
    rgb = np.full((4, 12, 3), 100, np.uint8)
    mask = torch.tensor([-1, 0, 1, 2, 20, 21]).repeat_interleave(2).expand(4, 12)
    drawn = overlay(rgb, mask, alpha=1)
    assert (drawn[:, :4] == 100).all()
    for first, index in ((4, 0), (6, 1), (8, 19), (10, 0)):
        assert (drawn[:, first:first + 2] == PALETTE[index]).all()


def test_palette_colours_differ():
    apart = np.abs(PALETTE[:, None].astype(int) - PALETTE[None]).sum(-1) + 999 * np.eye(len(PALETTE), dtype=int)
    assert len(PALETTE) == 20 and apart.min() > 60


def test_shades_go_from_white_to_the_colour():
    picture = shade(torch.tensor([[0.0, 0.5, 1.0, math.nan, 2.0, -1.0]]), (55, 155, 255))[0]
    assert picture.dtype == np.uint8 and picture.tolist() == [
        [255, 255, 255], [155, 205, 255], [55, 155, 255], [255, 255, 255], [55, 155, 255], [255, 255, 255]]


def test_error_map_codes():
    truth, prediction = np.array([[0, 2, 0, 2, 1]]), np.array([[0, 2, 1, 0, 3]])
    assert error_map(truth, prediction).tolist() == [[0, 1, 2, 3, 4]]
    colours = list(ERRORS.values())
    assert [int(np.argmax(colour)) for colour in colours[:3]] == [1, 0, 2]  # green, red, blue


# ---- sheets ----------------------------------------------------------------------------------------------------------
def test_contact_sheet_geometry(tmp_path):
    red, blue = np.zeros((10, 20, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    red[0, 0] = (0, 255, 0)
    contact_sheet(tmp_path / "a.png", [[red, blue], [red]], max_side=50)
    sheet = read(tmp_path / "a.png")
    # red 20x10 is doubled to 40x20, blue 100x200 shrinks to 25x50; gaps of 8
    assert sheet.shape == (8 + 50 + 8 + 20 + 8, 8 + 40 + 8 + 25 + 8, 3)
    expected = np.full_like(sheet, 255)
    for top in (8, 66):
        expected[top:top + 20, 8:48] = (255, 0, 0)
        expected[top:top + 2, 8:10] = (0, 255, 0)  # one pixel, visible as a square
    expected[8:58, 56:81] = (0, 0, 255)
    np.testing.assert_array_equal(sheet, expected)


def test_contact_sheet_titles_captions_and_legend(tmp_path):
    tile = np.full((64, 64, 3), 200, np.uint8)
    rows = [[tile, tile], [tile, tile]]
    contact_sheet(tmp_path / "plain.png", rows, max_side=64)
    contact_sheet(tmp_path / "full.png", rows, titles=["image", "a title that is far too long for its column"],
                  captions=[["first"], ["", "second"]], legend={"fire": (255, 0, 0), "x" * 20: (0, 0, 255)}, max_side=64)
    plain, full = read(tmp_path / "plain.png"), read(tmp_path / "full.png")
    assert full.shape == (plain.shape[0] + 5 * 22, plain.shape[1], 3)  # title, two captions, a legend of two lines
    dark = (full < 160).all(-1)
    assert dark[:30, 8:72].any() and dark[:30, 80:144].any() and not dark[:, :8].any() and not dark[:, 144:].any()
    first, second = dark[30 + 64:30 + 64 + 22], dark[-2 * 22 - 8 - 22:-2 * 22 - 8]
    assert first[:, 8:72].any() and not first[:, 80:].any()
    assert second[:, 80:].any() and not second[:, 8:72].any()
    assert near(full, (255, 0, 0), 0).sum() == 121 and near(full[-22:], (0, 0, 255), 0).sum() == 121


def test_training_sheet_is_image_and_label(tmp_path, small):
    images, masks, _ = scene()
    segmentation_sheet(tmp_path / "a.png", images, masks)
    sheet = read(tmp_path / "a.png")
    assert sheet.shape == (30 + 2 * 40, 8 + 2 * 40, 3)
    for i in range(2):
        top, rgb = 30 + i * 40, to_rgb(images[i])
        np.testing.assert_array_equal(sheet[top:top + 32, 8:40], rgb)
        np.testing.assert_array_equal(sheet[top:top + 32, 48:80], overlay(rgb, masks[i]))
    segmentation_sheet(tmp_path / "b.png", *([v[0]] * 9 for v in (images, masks)))
    assert read(tmp_path / "b.png").shape == (30 + 5 * 40, 8 + 4 * 40, 3)  # nine pairs: two abreast, five rows


def test_validation_sheet_binary(tmp_path, small):
    images, masks, probs = scene()
    masks[0, 0, :] = 255  # no label in the first line: neither truth nor error
    segmentation_sheet(tmp_path / "a.png", images[:1], masks, probs, ignore=255)
    sheet = read(tmp_path / "a.png")
    assert sheet.shape == (30 + 40 + 4 * 22, 8 + 4 * 40, 3)  # a title, one row, and a legend as narrow as this
    _, truth, shown, errors = (sheet[30:62, left:left + 32] for left in (8, 48, 88, 128))
    np.testing.assert_array_equal(truth[0], to_rgb(images[0])[0])
    np.testing.assert_array_equal(shown[:7], np.broadcast_to(shade(0.9, INK), (7, 32, 3)))
    assert (shown[7] == PALETTE[0]).all() and (shown[8:] == 255).all()
    # the outlines are pure colour: prediction rows 0-7, truth rows 0-15 of columns 0-15
    colours = dict(zip(("tp", "fp", "fn"), map(np.array, ERRORS.values())))
    assert (errors[2, 15] == colours["tp"]).all() and (errors[2, 16] == colours["fp"]).all()
    assert (errors[8, 3] == colours["fn"]).all() and (errors[15, 3] == colours["fn"]).all()
    grey = to_rgb(images[0]).mean(-1).astype(np.uint8)
    expected = np.round(0.3 * grey[4, 5] + 0.7 * colours["tp"])
    assert (errors[4, 5] == expected).all()
    assert (errors[20:, :] == grey[20:, :, None]).all() and (errors[0] == grey[0][:, None]).all()


def test_validation_sheet_of_classes(tmp_path, small):
    images, masks, _ = scene(1)
    masks[0, 20:, 20:] = 2
    wrong = torch.where(masks == 1, 3, masks)
    logits = torch.nn.functional.one_hot(wrong, 4).permute(0, 3, 1, 2) * 5.0
    segmentation_sheet(tmp_path / "a.png", images[:, 4:], masks, logits)
    sheet = read(tmp_path / "a.png")
    shown, errors = sheet[30:62, 88:120], sheet[30:62, 128:160]
    np.testing.assert_array_equal(shown, overlay(to_rgb(images[0, 4:]), wrong[0]))
    assert (errors[15, 5] == ERRORS["wrong class"]).all() and (errors[20, 25] == ERRORS["true positive"]).all()
    for colour in ERRORS.values():
        assert near(sheet[62:], colour, 0).sum() == 121  # its swatch in the legend
