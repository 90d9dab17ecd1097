"""Synthetic parking lots in the layout of the 2022 AI Challenge (parking-lot detection); see data/samples/__main__.py.

The lots are seen from above. Vehicles and people are made of rectangles. Bounding boxes are measured on the pixels that
are drawn.
"""
import os

import numpy as np
from PIL import Image, ImageDraw

from data.samples import numbered
from utils.files import whole_folder, write_json
from utils.pictures.sheets import save_image

GLASS = "#2c3642"
USUAL = ("white", "silver", "#222428", "gray", "navy", "firebrick")
BRIGHT = ("firebrick", "royalblue", "seagreen", "darkorange")
CAR = [(0, 4.7, 1.8, "own"), (-.4, 2.6, 1.6, GLASS), (-.5, 1.6, 1.6, "own")]
# A class: how often it is seen, its colours, and its parts from the ground up: rectangles (middle, length, width,
# colour) in metres. The middle lies on the object's axis, positive is forward. "own": the object's own colour.
CLASSES = {                                              # category_id is the place in this table, from 1
    "sedan": (30, USUAL, CAR),
    "SUV": (20, USUAL, [(0, 4.6, 1.95, "own"), (-.5, 3.3, 1.75, GLASS), (-.8, 2.6, 1.75, "own")]),
    "van": (6, USUAL, [(0, 5.2, 2, "own"), (1.7, .6, 1.8, GLASS)]),
    "bus": (2, BRIGHT, [(0, 10.4, 2.5, "own"), (0, 9.8, 2.1, "white")]),
    "school bus": (1.5, ("gold",), [(0, 8.4, 2.2, "own"), (2.5, .4, 2, GLASS)]),
    "truck": (6, BRIGHT, [(2.3, 1.7, 1.9, "own"), (-.9, 4.6, 2.1, "silver")]),
    "taxi": (4, ("gold", "darkorange"), [*CAR, (-.4, .4, .7, "white")]),
    "adult": (15, (*BRIGHT, "white", "black"), [(0, .4, .6, "own"), (0, .24, .24, "peachpuff")]),
    "child": (4, BRIGHT, [(0, .3, .4, "own"), (0, .24, .24, "peachpuff")]),
    "motorcycle": (3, USUAL, [(0, 2, .25, "black"), (0, 1.2, .45, "own")]),
    "kickboard": (2, BRIGHT, [(0, 1.1, .25, "own"), (.45, .12, .6, "black")]),
    "bicycle": (3, BRIGHT, [(0, 1.75, .1, "black"), (0, 1, .2, "own")]),
    "stroller": (1.5, BRIGHT, [(0, .9, .55, "black"), (-.1, .5, .52, "own")]),
    "cart": (2, BRIGHT, [(0, 1, .6, "silver"), (-.5, .12, .6, "own")])}

BAY, PERIOD = (2.6, 5.2), (2.6, 12)                      # a parking bay, and with the aisle behind it: width, depth, m
CORNERS = (-.5, -.5), (.5, -.5), (.5, .5), (-.5, .5)


def _place(rng, name, lot):
    """A random place on a lot (width, height) -> x, y, heading in radians. Most cars stand in the parking bays, the
    first of which has a corner at (0, 0); all in metres."""
    place = rng.random(2) * lot
    if name not in ("sedan", "SUV", "van", "taxi") or rng.random() < .15:
        return *place, rng.uniform(0, 2 * np.pi)
    middle = place // PERIOD * PERIOD + np.divide(BAY, 2)
    return *middle + rng.normal(0, .13, 2), np.pi * rng.choice((.5, 1.5)) + rng.normal(0, .03)


def outlines(name, x, y, heading):
    """The corners (parts, 4, 2) of the parts of an object of this class, from the ground up. Coordinates are in metres,
    x to the right and y down; the heading is in radians, clockwise from the x axis."""
    cos, sin = np.cos(heading), np.sin(heading)
    return np.array([(x, y) + ((middle, 0) + np.multiply(CORNERS, (length, width))) @ [[cos, sin], [-sin, cos]]
                     for middle, length, width, _ in CLASSES[name][2]])


def _ground(rng, size, scale):
    """Asphalt with the lines of the bays -> RGB image of `size` (height, width) in pixels, `scale` a metre."""
    y, x = np.ogrid[:size[0], :size[1]]
    x, y = x / scale % PERIOD[0], y / scale % PERIOD[1]
    lines = (y < BAY[1]) & (x < .14) | (abs(y - BAY[1]) < .07)
    return Image.fromarray(np.where(lines, 205, rng.uniform(90, 140)).astype(np.uint8)).convert("RGB")


def scene(rng, size, *, first=None):
    """One picture, 18 to 30 m high -> RGB image of `size` (height, width), [(category, (x1, y1, x2, y2) in pixels)].

    first: a class that certainly occurs; None leaves the lot empty. There are up to 15 objects. They do not overlap,
    and their middles are in the image.
    """
    scale, sides = size[0] / rng.uniform(18, 30), np.array(size[::-1])  # pixels per metre; width, height
    image, found, taken = _ground(rng, size, scale), [], []
    shares = np.array([share for share, _, _ in CLASSES.values()])
    others = rng.choice(list(CLASSES), rng.integers(4, 15), p=shares / shares.sum())
    for name in [first, *others] if first else []:
        for _ in range(60):                              # attempts to find a free place
            corners = outlines(name, *_place(rng, name, sides / scale)) * scale
            low, high = corners.min((0, 1)), corners.max((0, 1))
            inside = (abs(low + high - sides) < sides).all()
            if inside and not any((low < b).all() and (a < high).all() for a, b in taken):
                taken.append((low, high))
                found.append((1 + list(CLASSES).index(name), _draw(rng, image, name, corners)))
                break
    pixels = image * rng.normal(rng.uniform(.5, 1.15), .04, 3) + rng.normal(0, 4, (*size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), found


def _draw(rng, image, name, corners):
    """Draws an object of this class on an image, in place -> the box (x1, y1, x2, y2) of what of it is in the image.
    """
    _, colours, parts = CLASSES[name]
    own, silhouette = rng.choice(colours), Image.new("L", image.size)
    for (*_, colour), points in zip(parts, corners.reshape(len(corners), -1).tolist()):
        ImageDraw.Draw(image).polygon(points, own if colour == "own" else colour)
        ImageDraw.Draw(silhouette).polygon(points, 255)
    return silhouette.getbbox()


# ---- the files -------------------------------------------------------------------------------------------------------
def parking(out, *, train=48, test=12, size=(720, 1280), seed=0):
    """2022 AI Challenge, parking lots -> `out`/DATA/{train,test}/{images,label}, Test_Images_Information.json.

    Returns the folder. Images are JPEG of `size` (height, width); label/{Train,Test}.json has "images" {id, file_name},
    "annotations" {image_id, category_id 1..14, bbox [x, y, width, height] in pixels} and "categories". The competition
    does not publish the labels of its test set; here they lie in test/label, so that a demonstration can be scored.
    Every twelfth lot is empty. Raises UserError if the folder exists already. It appears whole or not at all.
    """
    target, classes = os.path.join(out, "DATA"), list(CLASSES)
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    labels = {split: {"images": [], "annotations": [], "categories": categories} for split in ("train", "test")}
    with whole_folder(target) as root:
        for split, i, rng in numbered(target, train=train, test=test, seed=seed):
            image, found = scene(rng, size, first=classes[i % 14] if i % 12 != 7 else None)
            name = f"{split}_{i:04d}.jpg"
            save_image(f"{root}/{split}/images/{name}", image, quality=90)
            labels[split]["images"].append({"id": i + 1, "file_name": name})
            labels[split]["annotations"] += [
                {"image_id": i + 1, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for category, (x1, y1, x2, y2) in found]
        for split, content in labels.items():
            write_json(f"{root}/{split}/label/{split.title()}.json", content, indent=None)
        write_json(f"{root}/Test_Images_Information.json", {"images": labels["test"]["images"]}, indent=None)
    return target
