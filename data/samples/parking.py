"""Synthetic parking lots in the layout of the 2022 AI Challenge (parking-lot detection); see data/samples/__main__.py.

Vehicles and people are made of upright boxes. An orthographic camera looks down on the lot at an angle. Bounding boxes
are measured on the pixels that are drawn, to half a pixel.
"""
import json
import os
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from data.samples import numbered
from utils.files import whole_folder

# A class: how often it is seen, its colours, and its parts: upright boxes (middle, length, width, lower end, upper end,
# colour) in metres. The middle is on the object's axis, positive is forward. "own": the object's own colour.
SEDAN = [(0, 4.7, 1.8, .2, .85, "own"), (-.3, 2.6, 1.7, .85, 1.35, "#2c3642"), (-.3, 1.9, 1.6, 1.35, 1.45, "own")]
CLASSES = {                                              # category_id is the place in this table, from 1
    "sedan": (30, ("white", "white", "silver", "#222428", "gray", "navy", "firebrick"), SEDAN),
    "SUV": (20, ("white", "silver", "#222428", "gray", "navy", "firebrick"), [
        (0, 4.6, 1.95, .3, 1.05, "own"), (-.5, 3.3, 1.85, 1.05, 1.55, "#2c3642"), (-.7, 2.9, 1.8, 1.55, 1.8, "own")]),
    "van": (6, ("white", "silver", "#222428"), [
        (0, 5.2, 2, .3, 1.2, "own"), (-.5, 4.2, 1.95, 1.2, 2.2, "own"), (1.9, .7, 1.8, 1.2, 1.8, "#2c3642")]),
    "bus": (2, ("royalblue", "seagreen", "firebrick"), [
        (0, 10.4, 2.5, .4, 1.4, "own"), (0, 10.4, 2.45, 1.4, 2.4, "#2c3642"), (0, 10.4, 2.5, 2.4, 3.1, "white")]),
    "school bus": (1.5, ("gold",), [
        (-.6, 6.8, 2.3, .4, 1.5, "own"), (-.6, 6.8, 2.25, 1.5, 2.2, "#2c3642"), (-.6, 6.8, 2.3, 2.2, 2.9, "own"),
        (3.4, 1.2, 1.9, .4, 1.4, "own"), (2, .3, 1.8, 2.9, 3.1, "red")]),
    "truck": (6, ("royalblue", "white", "seagreen", "firebrick"), [
        (2.3, 1.7, 1.9, .4, 1.3, "own"), (2.2, 1.5, 1.9, 1.3, 2.2, "#2c3642"), (-.9, 4.6, 2.1, .6, 2.6, "silver")]),
    "taxi": (4, ("gold", "darkorange"), [*SEDAN, (-.3, .4, .7, 1.45, 1.7, "white")]),
    "adult": (15, ("firebrick", "royalblue", "white", "black", "olive", "tan"), [
        (0, .2, .34, 0, .85, "gray"), (0, .28, .52, .85, 1.45, "own"), (0, .24, .24, 1.45, 1.75, "peachpuff")]),
    "child": (4, ("gold", "hotpink", "deepskyblue"), [
        (0, .2, .28, 0, .45, "navy"), (0, .26, .4, .45, .85, "own"), (0, .24, .24, .85, 1.15, "peachpuff")]),
    "motorcycle": (3, ("firebrick", "navy", "black", "darkorange"), [
        (0, 2, .2, 0, .6, "black"), (0, 1.2, .4, .3, .9, "own"), (.45, .1, .8, .9, 1.1, "silver")]),
    "kickboard": (2, ("limegreen", "gold", "hotpink"), [
        (0, 1.1, .22, .05, .2, "own"), (.45, .1, .1, .2, 1, "black"), (.45, .1, .6, 1, 1.1, "black")]),
    "bicycle": (3, ("firebrick", "royalblue", "white", "seagreen"), [
        (-.55, .65, .1, 0, .65, "black"), (.55, .65, .1, 0, .65, "black"), (0, 1, .12, .45, .75, "own"),
        (.4, .1, .6, .9, 1, "silver")]),
    "stroller": (1.5, ("firebrick", "royalblue", "seagreen"), [
        (0, .8, .5, 0, .2, "black"), (.1, .8, .5, .4, .7, "own"), (-.1, .45, .52, .7, 1.05, "own")]),
    "cart": (2, ("firebrick", "royalblue", "darkorange"), [
        (0, .8, .4, 0, .15, "black"), (0, 1, .6, .45, .9, "silver"), (-.5, .1, .6, .9, 1.05, "own")])}

FINE = 2                                                 # subpixels a side
SLOT, DEPTH, AISLE = 2.6, 5.2, 6.8                       # width and depth of a parking bay, and between rows; in metres
PERIOD = 2 * DEPTH + AISLE                               # two rows of bays, back to back, and an aisle
FACES = [(0, 1, 5, 4), (1, 3, 7, 5), (3, 2, 6, 7), (2, 0, 4, 6), (4, 5, 7, 6)]    # of a box: its sides and its roof


class Lot(NamedTuple):
    """A lot as the camera sees it. The origin is in the middle of the image; x points right, y away, z up, in metres.

    camera (3, 3): metres -> subpixels to the right, down, and towards the camera. size: (height, width) in subpixels.
    bay: (x, y) of a corner of a parking bay. sun: (x, y, 1), the direction to it.
    """
    camera: np.ndarray
    size: tuple
    bay: np.ndarray
    sun: np.ndarray

    def fill(self, image, points, colour):
        """Fills the polygon of the points (N, 3) in an image in subpixels."""
        pixels = (points @ self.camera.T)[:, :2] + (self.size[1] / 2, self.size[0] / 2)
        ImageDraw.Draw(image).polygon(pixels.ravel().tolist(), colour)


class Thing(NamedTuple):
    """An object on the lot: its category, from 1; the corners (parts, 8, 3) of its boxes in metres; their colours.
    """
    category: int
    corners: np.ndarray
    colours: np.ndarray


def make_lot(rng, size):
    """A lot seen from 30 to 45 degrees above the horizon; the image of `size` (height, width) is 18 to 30 m high."""
    tilt, scale = np.radians(rng.uniform(30, 45)), FINE * size[0] / rng.uniform(18, 30)
    camera = scale * np.array([(1, 0, 0), (0, -np.sin(tilt), -np.cos(tilt)), (0, -np.cos(tilt), np.sin(tilt))])
    return Lot(camera, (FINE * size[0], FINE * size[1]), rng.uniform(0, (SLOT, PERIOD)),
               np.array([*rng.uniform(-1, 1, 2), 1]))


def make_thing(rng, name, x, y, heading):
    """An object of a class with its middle at (x, y); its heading is in radians, counter-clockwise from the x axis."""
    _, colours, parts = CLASSES[name]
    own, cos, sin = rng.choice(colours), np.cos(heading), np.sin(heading)
    corners = np.array([
        [(middle + u * length, v * width, z) for z in (low, high) for u in (-.5, .5) for v in (-.5, .5)]
        for middle, length, width, low, high, _ in parts])
    corners = corners @ [[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]] + (x, y, 0)
    colours = [ImageColor.getrgb(own if colour == "own" else colour) for *_, colour in parts]
    return Thing(1 + list(CLASSES).index(name), corners, np.array(colours))


def _place(rng, lot, name):
    """A random place for an object of this class -> x, y, heading. Most cars stand in parking bays."""
    x, y = (rng.random(2) - .5) / abs(lot.camera[(0, 1), (0, 1)]) * lot.size[::-1]
    if name not in ("sedan", "SUV", "van", "taxi") or rng.random() < .15:
        return x, y, rng.uniform(0, 2 * np.pi)
    bay = ((x, y) - lot.bay) // (SLOT, PERIOD) * (SLOT, PERIOD) + (SLOT / 2, DEPTH * rng.choice((.5, 1.5)))
    return *(lot.bay + bay + rng.normal(0, .13, 2)), np.pi * rng.choice((.5, 1.5)) + rng.normal(0, .03)


def populate(rng, lot, first):
    """-> up to 15 things, the nearest to the camera first; one is of the class `first`. They do not overlap, and their
    middles are in the image.
    """
    shares, things, bounds = np.array([share for share, _, _ in CLASSES.values()]), [], []
    for name in [first, *rng.choice(list(CLASSES), rng.integers(4, 15), p=shares / shares.sum())]:
        for _ in range(60):                              # attempts to find a free place
            thing = make_thing(rng, name, *_place(rng, lot, name))
            low, high = thing.corners.min((0, 1))[:2], thing.corners.max((0, 1))[:2]
            inside = abs(lot.camera[:2] @ thing.corners.mean((0, 1))) < np.array(lot.size[::-1]) / 2
            if inside.all() and not any((low < b).all() and (a < high).all() for a, b in bounds):
                things.append(thing)
                bounds.append((low, high))
                break
    return sorted(things, key=lambda thing: thing.corners[..., 1].min())


# ---- drawing ---------------------------------------------------------------------------------------------------------
def _ground(rng, lot, things):
    """Asphalt, the lines of the bays and the shadows of the things -> RGB image in subpixels."""
    height, width = lot.size
    asphalt = np.full(lot.size, rng.uniform(90, 140), np.uint8)
    x = ((np.arange(width) - width / 2) / lot.camera[0, 0] - lot.bay[0]) % SLOT
    y = ((np.arange(height)[:, None] - height / 2) / lot.camera[1, 1] - lot.bay[1]) % PERIOD
    asphalt[(y < 2 * DEPTH) & (x < .14) | (abs(y - DEPTH) < .07)] = 205
    ground, shadow = Image.fromarray(asphalt).convert("RGB"), Image.new("L", (width, height))
    for thing in things:
        fallen = thing.corners - thing.corners[..., 2:] * lot.sun          # along the light to the ground
        for face in fallen[:, FACES].reshape(-1, 4, 3):
            lot.fill(shadow, face, 255)
    dark = rng.uniform(.4, .9)
    ground.paste(ground.point(lambda value: int(dark * value)), mask=shadow.filter(ImageFilter.BoxBlur(FINE)))
    return ground


def _faces(thing, lot):
    """Yields (corners (4, 3) in metres, colour) in the order of drawing: the farthest first."""
    for part in np.argsort(thing.corners.mean(1) @ lot.camera[2]):
        faces = thing.corners[part][FACES]               # (5, 4, 3)
        outward = faces.mean(1) - thing.corners[part].mean(0)
        cosine = outward @ lot.sun / np.linalg.norm(outward, axis=1) / np.linalg.norm(lot.sun)
        for k in np.argsort(outward @ lot.camera[2]):
            yield faces[k], tuple((thing.colours[part] * (.6 + .4 * max(cosine[k], 0))).astype(int).tolist())


def paint(image, things, lot):
    """Draws things on an RGB image in subpixels, in place -> [(box, visible share)], one for each thing.

    things: the nearest to the camera first. As no two of them overlap in both x and y and the camera looks along y, a
    farther one never hides a nearer one. The box (x1, y1, x2, y2) in pixels is that of the visible part, None if
    nothing is visible; the share is that of the silhouette within the image.
    """
    covered, marks = Image.new("L", image.size), []
    for thing in things:
        sprite, silhouette = Image.new("RGB", image.size), Image.new("L", image.size)
        for corners, colour in _faces(thing, lot):
            lot.fill(sprite, corners, colour)
            lot.fill(silhouette, corners, 255)
        visible = ImageChops.subtract(silhouette, covered)
        image.paste(sprite, mask=visible)
        covered = ImageChops.lighter(covered, silhouette)
        box, areas = visible.getbbox(), [mask.histogram()[255] for mask in (visible, silhouette)]
        marks.append((box and [side / FINE for side in box], areas[0] / max(areas[1], 1)))
    return marks


def scene(rng, size, *, first=None):
    """One picture -> RGB image, [(category, (x1, y1, x2, y2) in pixels)].

    first: a class that certainly occurs; None leaves the lot empty. A thing of which less than a fifth is visible has
    no box.
    """
    lot = make_lot(rng, size)
    things = populate(rng, lot, first) if first else []
    image = _ground(rng, lot, things)
    found = [(thing.category, box) for thing, (box, share) in zip(things, paint(image, things, lot)) if share >= .2]
    pixels = np.asarray(image.reduce(FINE)) * rng.uniform(.5, 1.15) * rng.normal(1, .04, 3)
    pixels += rng.normal(0, rng.uniform(1.5, 5), (*size, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), found


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
        for folder in ("train/images", "train/label", "test/images", "test/label"):
            os.makedirs(os.path.join(root, folder))
        for split, i, rng in numbered(target, train=train, test=test, seed=seed):
            image, found = scene(rng, size, first=classes[i % 14] if i % 12 != 7 else None)
            name = f"{split}_{i:04d}.jpg"
            image.save(os.path.join(root, split, "images", name), quality=90)
            labels[split]["images"].append({"id": i + 1, "file_name": name})
            labels[split]["annotations"] += [
                {"image_id": i + 1, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for category, (x1, y1, x2, y2) in found]
        for path, content in {"train/label/Train.json": labels["train"], "test/label/Test.json": labels["test"],
                              "Test_Images_Information.json": {"images": labels["test"]["images"]}}.items():
            with open(os.path.join(root, path), "w") as file:
                json.dump(content, file)
    return target
