"""Pictures of images, masks and predictions, drawn with Pillow and numpy only.

A picture is a uint8 numpy array (H, W, 3); images, masks and probabilities come as torch tensors (any device) or
numpy arrays. The sheets are image files, written whole or not at all.
"""
import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import whole_file

INK, FAINT = (38, 42, 48), (118, 124, 134)  # text: main and secondary
# Colour of class 1, 2, ... 20 (class 0, the background, is never drawn). Cyan comes first because nothing in a
# false-colour Landsat picture is cyan, neither fire nor vegetation nor burnt ground.
PALETTE = np.array([tuple(bytes.fromhex(colour)) for colour in (
    "46f0f0 e6194b 3cb44b ffe119 4363d8 f58231 911eb4 f032e6 bcf60c fabebe "
    "008080 e6beff 9a6324 fffac8 800000 aaffc3 808000 0080ff 000075 a9a9a9").split()], np.uint8)
ERRORS = {"true positive": (0, 200, 80), "false positive": (235, 40, 40), "false negative": (50, 110, 255),
          "wrong class": (230, 60, 230)}
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])  # inferno, five points


font = functools.cache(lambda size: ImageFont.load_default(size=size))  # Pillow decodes it anew on every call


def text_line(draw, xy, text, *, size=13, anchor="lm", fill=INK, width=math.inf):
    """Draws one line of text, shortened to `width` pixels."""
    if draw.textlength(text, font(size)) > width:
        while text and draw.textlength(text + "...", font(size)) > width:
            text = text[:-1]
        text += "..."
    draw.text(xy, text, fill, font(size), anchor)


def _array(values):
    """Tensor (any device, bfloat16 included) or array -> numpy array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def to_rgb(image):
    """Image (C, H, W) of any number type -> picture, each band stretched between its 2nd and 98th percentile.

    1 or 2 bands: the first one, grey. 3 bands: as they are; uint8 is not stretched. More: false colour from the last
    three, reversed: of Landsat's seven that is SWIR2, SWIR1, NIR, where fire glows and water is black.
    NaN and constant bands become black.
    """
    image = _array(image)
    count = len(image)
    image = image[[0, 0, 0] if count < 3 else [0, 1, 2] if count == 3 else [-1, -2, -3]]
    if image.dtype == np.uint8 and count == 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    picture = np.zeros((*image.shape[1:], 3), np.uint8)
    for i, band in enumerate(image.astype(np.float32)):
        finite = band[np.isfinite(band)]
        low, high = np.percentile(finite, (2, 98)) if finite.size else (0, 0)
        if low == high and finite.size:  # a few fires on a flat ground: the percentiles see the ground only
            low, high = finite.min(), finite.max()
        scaled = (np.nan_to_num(band, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1)
        picture[..., i] = (scaled.clip(0, 1) * 255).round()
    return picture


def overlay(rgb, mask, *, colour=None, palette=PALETTE, alpha=0.45):
    """Blends a mask into a picture, (1 - alpha) rgb + alpha colour, and outlines it one pixel wide in full colour.

    mask: (H, W), bool or whole numbers; class k > 0 takes palette[k - 1] (cyclic), or `colour` if given; class 0 and
    negative numbers are not drawn. The outline is the mask's own pixels that touch another class above, below,
    left or right; the edge of the picture is not outlined.
    """
    mask = _array(mask).astype(np.int64)
    palette = np.asarray(palette if colour is None else [colour])
    colours = palette[(mask - 1) % len(palette)]
    blend = np.round((1 - alpha) * rgb + alpha * colours)
    padded = np.pad(mask, 1, mode="edge")
    sides = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    edge = np.any([side != mask for side in sides], axis=0)
    return np.where((mask > 0)[..., None], np.where(edge[..., None], colours, blend), rgb).astype(np.uint8)


def heat(values):
    """Probabilities (H, W) in 0..1 -> picture, black over violet and orange to pale yellow. NaN is black."""
    values = np.nan_to_num(_array(values).astype(np.float32)).clip(0, 1)
    points = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, points, HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def error_map(truth, prediction):
    """Class maps (H, W) -> (H, W): 0 both background, 1 right class, 2 false positive, 3 false negative, 4 wrong class.

    Code k takes the k-th colour of ERRORS.
    """
    truth, prediction = _array(truth), _array(prediction)
    conditions = [prediction == truth, truth == 0, prediction == 0]
    return np.where((truth == 0) & (prediction == 0), 0, np.select(conditions, [1, 2, 3], 4))


def contact_sheet(path, rows, **options):
    """Writes rows of pictures as one image file, see `draw_sheet`."""
    with whole_file(path) as temporary:
        draw_sheet(rows, **options).save(temporary)


def draw_sheet(rows, *, titles=None, captions=None, legend=None, max_side=256):
    """Rows of pictures -> one Image.

    Each picture is scaled so that its longer side fits max_side: down smoothly, up by a whole factor with visible
    pixels. titles: one text per column. captions: per row a text, or a list with one text per column.
    legend: {text: colour}, below. Rows may differ in length.
    """
    gap, line = 8, 22

    def scaled(picture):
        picture, side = Image.fromarray(picture), max(picture.shape[:2])
        if side > max_side:
            size = [max(1, round(n * max_side / side)) for n in picture.size]
            return picture.resize(size, Image.Resampling.LANCZOS)
        return picture.resize([n * (max_side // side) for n in picture.size], Image.Resampling.NEAREST)

    rows = [[scaled(picture) for picture in row] for row in rows]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(max(map(len, rows)))]
    lefts = [gap * (c + 1) + sum(widths[:c]) for c in range(len(widths))]
    heights = [max(picture.height for picture in row) + (line if captions else 0) for row in rows]
    top = line + gap if titles else gap
    total, width = top + sum(heights) + gap * len(rows), lefts[-1] + widths[-1] + gap
    spots, left, below = [], gap, total
    for text in legend or ():
        needed = 32 + font(12).getlength(text)
        if spots and left + needed > width:
            left, below = gap, below + line
        spots.append((left, below))
        left += needed
    sheet = Image.new("RGB", (width, below + (line if legend else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for text, left, width in zip(titles or (), lefts, widths):
        text_line(draw, (left + width / 2, top / 2), text, anchor="mm", size=14, width=width)
    for r, row in enumerate(rows):
        for picture, left in zip(row, lefts):
            sheet.paste(picture, (left, top))
        top += heights[r] + gap
        texts = captions[r] if captions else []
        texts, spans = ([texts], [sheet.width - 2 * gap]) if isinstance(texts, str) else (texts, widths)
        for text, left, width in zip(texts, lefts, spans):
            text_line(draw, (left, top - gap - line / 2), text, size=12, fill=FAINT, width=width)
    for (text, colour), (left, below) in zip((legend or {}).items(), spots):
        draw.rectangle([left, below + 3, left + 10, below + 13], tuple(map(int, colour)))
        text_line(draw, (left + 16, below + 8), text, size=12)
    return sheet


def segmentation_row(image, mask, prob=None, *, ignore=None):
    """-> pictures of one image, all of its size: image, label; with prob also prediction and errors. As in
    `segmentation_sheet`."""
    rgb = to_rgb(image)
    mask = _array(mask).reshape(rgb.shape[:2])
    truth = np.where(mask == ignore, 0, mask).astype(np.int64)
    row = [rgb, overlay(rgb, truth)]
    if prob is None:
        return row
    prob = _array(prob)
    if prob.ndim == 3 and len(prob) > 1:
        prediction = prob.argmax(0)
        shown = overlay(rgb, prediction)
    else:
        prediction = (prob.reshape(truth.shape) > 0.5).astype(np.int64)
        shown = overlay(heat(prob.reshape(truth.shape)), prediction, colour=PALETTE[0], alpha=0)
    errors = np.where(mask == ignore, 0, error_map(truth, prediction))
    grey = np.repeat(rgb.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    return [*row, shown, overlay(grey, errors, palette=list(ERRORS.values()), alpha=0.7)]


def segmentation_sheet(path, images, masks, probs=None, *, ignore=None, limit=16, max_side=256):
    """Writes image | label (the first training batch) or, with probs, image | truth | prediction | errors.

    images: B of (C, H, W). masks: B of (H, W) or (1, H, W), whole numbers, 0 background, `ignore` no label.
    probs: B of (H, W) or (1, H, W), the foreground's probability, drawn as heat with the outline at 0.5; or
    (K, H, W) with K > 1, one per class (logits do as well), drawn as the class map. At most `limit` images are drawn.
    """
    rows = [segmentation_row(image, masks[i], None if probs is None else probs[i], ignore=ignore)
            for i, image in enumerate(images[:limit])]
    if probs is None:  # several pairs abreast, for a sheet that is roughly square
        across = max(1, round((len(rows) / 2) ** 0.5))
        titles, legend = ["image", "label"] * across, None
        rows = [[picture for pair in rows[g:g + across] for picture in pair] for g in range(0, len(rows), across)]
    else:
        several = probs[0].ndim == 3 and len(probs[0]) > 1
        titles = ["image", "truth", "prediction" if several else "probability", "errors"]
        legend = {name: colour for name, colour in ERRORS.items() if several or name != "wrong class"}
    contact_sheet(path, rows, titles=titles, legend=legend, max_side=max_side)
