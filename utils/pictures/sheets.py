"""Pictures of images, masks and predictions, drawn with Pillow and numpy only.

A picture is a uint8 numpy array (H, W, 3); images, masks and probabilities come as torch tensors (any device) or
numpy arrays. The sheets are image files, written whole or not at all.
"""
import functools
import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.files import whole_file
from utils.train import dist

INK, FAINT = (38, 42, 48), (118, 124, 134)  # text: main and secondary
GAP, LINE = 8, 22  # between pictures; the height of a line of text
# Colour of class 1, 2, ... 20 (class 0, the background, is never drawn). Cyan comes first because nothing in a
# false-colour Landsat picture is cyan, neither fire nor vegetation nor burnt ground.
PALETTE = np.array([tuple(bytes.fromhex(colour)) for colour in (
    "46f0f0 e6194b 3cb44b ffe119 4363d8 f58231 911eb4 f032e6 bcf60c fabebe "
    "008080 e6beff 9a6324 fffac8 800000 aaffc3 808000 0080ff 000075 a9a9a9").split()], np.uint8)
ERRORS = {"true positive": (0, 200, 80), "false positive": (235, 40, 40), "false negative": (50, 110, 255),
          "wrong class": (230, 60, 230)}


font = functools.cache(lambda size: ImageFont.load_default(size=size))  # Pillow decodes it anew on every call


def text_line(draw, xy, text, *, size=13, anchor="lm", fill=INK, width=math.inf):
    """Draws one line of text, shortened to `width` pixels."""
    while len(text) > 3 and draw.textlength(text, font(size)) > width:
        text = text[:-4] + "..."
    draw.text(xy, text, fill, font(size), anchor)


def label(text, width=None, *, size=12, fill=INK, right=False):
    """A Pillow image of one line of text, on the left or on the right of `width` pixels (None: as many as it needs), of
    which the last GAP stay free."""
    image = Image.new("RGB", (width or math.ceil(font(size).getlength(text)) + GAP, LINE), "white")
    room = image.width - GAP
    text_line(ImageDraw.Draw(image), (room * right, LINE / 2), text, size=size, anchor="rm" if right else "lm",
              fill=fill, width=room)
    return image


def swatch(colour):
    """A Pillow image of a small square, to stand before a `label`."""
    image = Image.new("RGB", (16, LINE), "white")
    ImageDraw.Draw(image).rectangle([0, 6, 10, 16], colour)
    return image


def join(images, axis):
    """Pillow images side by side (axis 0) or one below the other (axis 1) -> one image, white where they leave room."""
    sizes = np.array([image.size for image in images])
    size, place = sizes.max(0), [0, 0]
    size[axis] = sizes[:, axis].sum()
    joined = Image.new("RGB", tuple(size.tolist()), "white")
    for image in images:
        joined.paste(image, tuple(place))
        place[axis] += image.size[axis]
    return joined


def save_image(path, image, **options):
    """Writes a Pillow image, whole or not at all. options: keyword arguments of its method `save`. Raises UserError if
    the file cannot be written."""
    with whole_file(path) as temporary:
        image.save(temporary, **options)


def to_numpy(values):
    """Tensor (any device, bfloat16 included), list or array -> numpy array."""
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
    image = to_numpy(image)
    count = len(image)
    image = image[[0, 0, 0] if count < 3 else [0, 1, 2] if count == 3 else [-1, -2, -3]]
    if image.dtype == np.uint8 and count == 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    picture = np.zeros((*image.shape[1:], 3), np.uint8)
    for i, band in enumerate(image):
        finite = band[np.isfinite(band)]
        if not finite.size:
            continue
        low, high = np.percentile(finite, (2, 98))
        if low == high:  # a few fires on a flat ground: the percentiles see the ground only
            low, high = finite.min(), finite.max()
        if low < high:
            picture[..., i] = np.nan_to_num(np.interp(band, (low, high), (0, 255))).round()
    return picture


def overlay(rgb, mask, *, palette=PALETTE, alpha=0.45):
    """Blends a mask into a picture, (1 - alpha) rgb + alpha colour, and outlines it one pixel wide in full colour.

    mask: (H, W), bool or integers; class k > 0 takes palette[k - 1] (cyclic); class 0 and negative numbers are not
    drawn. The outline is the mask's own pixels that touch another class above, below, left or right; the edge of the
    picture is not outlined.
    """
    mask = to_numpy(mask).astype(np.int64)
    colours = np.asarray(palette)[(mask - 1) % len(palette)]
    blend = np.round((1 - alpha) * rgb + alpha * colours)
    edge = np.zeros(mask.shape, bool)
    for lines, outline in ((mask, edge), (mask.T, edge.T)):
        change = lines[1:] != lines[:-1]
        outline[1:] |= change
        outline[:-1] |= change
    return np.where((mask > 0)[..., None], np.where(edge[..., None], colours, blend), rgb).astype(np.uint8)


def shade(values, colour):
    """Numbers (...) in 0..1 -> uint8 (..., 3), from white to the colour. NaN is white."""
    values = np.nan_to_num(to_numpy(values).astype(np.float32)).clip(0, 1)
    return np.round(255 + values[..., None] * (np.array(colour) - 255)).astype(np.uint8)


def error_map(truth, prediction):
    """Arrays of classes (H, W) -> (H, W): 0 both background, 1 right class, 2 false positive, 3 false negative, 4 wrong
    class.

    Code k takes the k-th colour of ERRORS.
    """
    conditions = [(truth == 0) & (prediction == 0), prediction == truth, truth == 0, prediction == 0]
    return np.select(conditions, [0, 1, 2, 3], 4)


# ---- sheets ----------------------------------------------------------------------------------------------------------
def fit(picture, max_side):
    """A picture scaled so that its longer side fits max_side: down smoothly, up by a whole factor (pixels are seen)."""
    height, width = picture.shape[:2]
    zoom = max_side / max(height, width)
    zoom, how = (int(zoom), Image.Resampling.NEAREST) if zoom >= 1 else (zoom, Image.Resampling.LANCZOS)
    size = [max(1, round(side * zoom)) for side in (width, height)]
    return np.array(Image.fromarray(picture).resize(size, how))


def in_rows(items, across):
    """Divides a list into lists of `across` items; the last one may be shorter."""
    return [items[i:i + across] for i in range(0, len(items), across)]


def abreast(groups):
    """Equally long lists of pictures, one per image -> rows of pictures, as many images side by side as make the sheet
    roughly square."""
    across = max(1, round((len(groups) / len(groups[0])) ** 0.5))
    return [sum(row, []) for row in in_rows(groups, across)]


def contact_sheet(path, rows, **options):
    """Writes rows of pictures as one image file, see `draw_sheet`."""
    save_image(path, draw_sheet(rows, **options))


def draw_sheet(rows, *, titles=(), captions=(), legend=None, max_side=256):
    """Rows of pictures, scaled by `fit` -> one Pillow image. Rows may differ in length.

    titles: a text per column, repeated where there are more columns. captions: per row a list of texts, each below an
    equal share of the row's pictures. legend: {text: colour}, below.
    """
    rows = [[Image.fromarray(fit(picture, max_side)) for picture in row] for row in rows]
    widths = [max(picture.width for picture in column if picture) + GAP for column in itertools.zip_longest(*rows)]
    strips = [[label(text, width, size=14) for text, width in zip(itertools.cycle(titles), widths)]] if titles else []
    for row, texts in itertools.zip_longest(rows, captions):
        strips.append([ImageOps.expand(picture, (0, 0, width - picture.width, GAP), "white")
                       for picture, width in zip(row, widths)])
        if texts:
            shares = in_rows(widths, len(row) // len(texts))
            strips.append([label(text, sum(share), fill=FAINT) for text, share in zip(texts, shares)])
    if legend:
        entries = [join([swatch(colour), label(text)], 0) for text, colour in legend.items()]
        across = max(1, sum(widths) // max(entry.width for entry in entries))
        strips += in_rows(entries, across)
    return ImageOps.expand(join([join(strip, 0) for strip in strips], 1), (GAP, GAP, 0, 0), "white")


def augmentation_sheet(folder, draw, changes):
    """Writes augment.png, what is trained on: a row per sample, its original and then a column per epoch; prints the
    ranges. Rank 0 alone. draw: a function of the epoch (None: the original) that returns the pictures, and a text for
    each of them. changes: of data.augment.of_flags."""
    if dist.rank():
        return
    columns, captions = zip(*map(draw, (None, *range(5))))
    contact_sheet(folder / "augment.png", list(zip(*columns)), captions=list(zip(*captions)),
                  titles=["original", *(f"epoch {k}" for k in range(1, 6))])
    print(f"drawn at random: {changes['view'] | changes['colour']}\n{folder / 'augment.png'}")


def segmentation_row(image, mask, prob=None, *, ignore=None):
    """-> pictures of one image, all of its size: image, label; with prob also prediction and errors. As in
    `segmentation_sheet`."""
    rgb, mask = to_rgb(image), to_numpy(mask)
    truth = np.where(mask == ignore, 0, mask)
    row = [rgb, overlay(rgb, truth)]
    if prob is None:
        return row
    prob = to_numpy(prob)
    prediction = prob.argmax(0) if len(prob) > 1 else prob[0] > 0.5
    shown = overlay(rgb, prediction) if len(prob) > 1 else overlay(shade(prob[0], INK), prediction, alpha=0)
    errors = np.where(mask == ignore, 0, error_map(truth, prediction))
    grey = np.repeat(rgb.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    return [*row, shown, overlay(grey, errors, palette=list(ERRORS.values()), alpha=0.7)]


def segmentation_sheet(path, images, masks, probs=None, *, ignore=None):
    """Writes image | label (the first training batch) or, with probs, image | truth | prediction | errors.

    images: B of (C, H, W). masks: B of (H, W), integers, 0 background, `ignore` no label. probs: B of (K, H, W); the
    foreground's probability (K = 1) is drawn white to black with the outline at 0.5, several classes (logits do as
    well) as the class map. At most 16 images are drawn.
    """
    rows = [segmentation_row(image, masks[i], None if probs is None else probs[i], ignore=ignore)
            for i, image in enumerate(images[:16])]
    if probs is None:
        contact_sheet(path, abreast(rows), titles=["image", "label"])
    else:
        contact_sheet(path, rows, titles=["image", "truth", "prediction", "errors"], legend=ERRORS)
