"""Synthetic parking lots in the layout of the 2022 AI Challenge (parking-lot detection); see data/samples.

A pinhole camera high above the lot looks down on the things of data/samples/models.py; every one is drawn with its
alpha, so that a box is exact to half a pixel.
"""
import json
import os
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from data.samples.models import MODELS, lamp_post, rect, tree
from utils.files import whole_folder

# how often each is seen; category_id is the place in this table, from 1
CLASSES = {"sedan": 30, "SUV": 20, "van": 6, "bus": 2, "school bus": 1.5, "truck": 6, "taxi": 4, "adult": 15,
           "child": 4, "motorcycle": 3, "kickboard": 2, "bicycle": 3, "stroller": 1.5, "cart": 2}
LARGE, PARKED = ("bus", "school bus", "truck"), ("sedan", "SUV", "van", "taxi")
FINE = 2                                                  # subpixels a side, in drawing
SLOT, DEPTH, AISLE, ISLAND = 2.6, 5.2, 6.8, 1.6           # metres


class View(NamedTuple):
    """A pinhole camera: eye (3,) in metres, axes (3, 3) right, down and forward, focal length and size in pixels."""
    eye: np.ndarray
    axes: np.ndarray
    focal: float
    size: tuple

    def project(self, points):
        """Points (..., 3) in metres -> pixels (..., 2) and pixels per metre (...)."""
        x, y, z = np.moveaxis((points - self.eye) @ self.axes.T, -1, 0)
        scale = self.focal / z
        return np.stack((self.size[1] / 2 + x * scale, self.size[0] / 2 + y * scale), -1), scale

    def rays(self):
        """(3, 3): the direction in which the camera sees pixel (u, v) is rays @ (u, v, 1)."""
        height, width = self.size
        pixel = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, self.focal]])
        return self.axes.T @ pixel

    def ground(self, pixels):
        """Pixels (..., 2) -> where they lie on the ground (..., 2), in metres."""
        ray = np.concatenate((pixels, np.ones_like(pixels[..., :1])), -1) @ self.rays().T
        return self.eye[:2] - self.eye[2] * ray[..., :2] / ray[..., 2:]


class Light(NamedTuple):
    """Of the sky and of the sun: colours (3,), and the direction (3,) to the sun."""
    sky: np.ndarray
    sun: np.ndarray
    to_sun: np.ndarray

    def on(self, normal):
        """Light (..., 3) on faces with these unit normals (..., 3)."""
        return self.sky * (.8 + .2 * normal[..., 2:]) + self.sun * np.maximum(normal @ self.to_sun, 0)[..., None]


class Thing(NamedTuple):
    """Something on the lot: category 1..14, or 0 for what is not annotated; where it stands, (x, y, 0) and radians."""
    category: int
    parts: list
    at: np.ndarray
    heading: float

    def place(self, points):
        """Points (..., 3) of its own -> on the lot."""
        return points @ _turn(self.heading) + self.at

    def points(self):
        """All of its points (K, 3) on the lot."""
        return self.place(np.concatenate([face[0] for part in self.parts for face in part]))


def _turn(heading):
    c, s = np.cos(heading), np.sin(heading)
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


# ---- drawing -------------------------------------------------------------------------------------------------------
def _order(clouds, eye):
    """Farthest first: the order in which to paint clouds of points [(K, 3)], of which none is hidden by an earlier one.

    j cannot hide i when an axis separates their bounding boxes with the eye on the side of i.
    """
    low, high = np.array([c.min(0) for c in clouds]), np.array([c.max(0) for c in clouds])
    apart = (high[:, None] <= low + 1e-6) & (eye <= low) | (low[:, None] >= high - 1e-6) & (eye >= high)
    hidden_by = ~apart.any(-1) & ~np.eye(len(clouds), dtype=bool)
    rest = list(np.argsort(-np.linalg.norm((low + high) / 2 - eye, axis=1)))
    order = []
    while rest:
        first = next((k for k in rest if not hidden_by[rest, k].any()), rest[0])      # the latter: they interlock
        rest.remove(first)
        order.append(int(first))
    return order


def _faces(thing, view, light):
    """The faces that the camera sees, in painting order -> [(pixels (K, 2), shaded colour, width in pixels)]."""
    turn = _turn(thing.heading)
    eye = turn @ (view.eye - thing.at)
    order = _order([np.concatenate([f[0] for f in part]) for part in thing.parts], eye)
    faces = [face for k in order for face in thing.parts[k]]
    start = np.cumsum([0] + [len(p) for p, _, _ in faces])
    points = np.concatenate([p for p, _, _ in faces])
    first, line = points[start[:-1]], np.array([width > 0 for _, _, width in faces])
    normal = np.cross(points[start[:-1] + 1] - first, points[start[1:] - 1] - first)
    normal[line] = 0, 0, 1
    seen = line | ((normal * (eye - first)).sum(1) > 0)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9) @ turn
    colours = np.clip(light.on(normal) * np.array([c for _, c, _ in faces]), 0, 255).astype(int)
    pixels, scale = view.project(thing.place(points))
    return [(pixels[start[k]:start[k + 1]], tuple(colours[k].tolist()), faces[k][2] * scale[start[k]])
            for k in np.flatnonzero(seen)]


def _draw(pen, pixels, colour, width):
    flat = pixels.ravel().tolist()
    if width:
        pen.line(flat, colour, max(2, round(width)), joint="curve")
    else:
        pen.polygon(flat, colour)


def paint(ground, things, view, light):
    """Things on a ground (RGB image) -> the image and, per thing, (box, visible share).

    The box (x1, y1, x2, y2) in pixels, to 1 / FINE of one, is that of what is left visible, None if nothing is; the
    share is of the whole silhouette, what lies outside the image included.
    """
    height, width = view.size
    canvas = ground.resize((FINE * width, FINE * height), Image.Resampling.NEAREST)
    owner, drawn = Image.new("L", canvas.size), {}
    for k in _order([t.points() for t in things], view.eye) if things else ():
        faces = _faces(things[k], view, light)
        corners = np.concatenate([p for p, _, _ in faces]) * FINE
        pad = FINE * max(w for _, _, w in faces) + 2
        x, y = np.floor(corners.min(0) - pad).astype(int).tolist()
        x2, y2 = np.ceil(corners.max(0) + pad).astype(int).tolist()
        sprite = Image.new("RGBA", (x2 - x, y2 - y))
        pen = ImageDraw.Draw(sprite)
        for pixels, colour, thick in faces:
            _draw(pen, pixels * FINE - (x, y), (*colour, 255), FINE * thick)
        alpha = sprite.getchannel("A")
        canvas.paste(sprite, (x, y), alpha)
        owner.paste(k + 1, (x, y), alpha)
        drawn[k] = max(x, 0), max(y, 0), x2, y2, alpha.histogram()[255]
    owner, marks = np.asarray(owner), []
    for k in range(len(things)):
        x, y, x2, y2, whole = drawn[k]
        mine = owner[y:max(y2, 0), x:max(x2, 0)] == k + 1
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        box = None
        if len(rows):
            box = np.array((x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)) / FINE
        marks.append((box, mine.sum() / whole))
    return canvas.reduce(FINE), marks


def _shadows(things, view, light):
    """What each pixel of the ground does not see of the sun and of the sky: two masks, 255 for nothing."""
    sun, sky = (Image.new("L", view.size[::-1]) for _ in range(2))
    pen_sun, pen_sky = ImageDraw.Draw(sun), ImageDraw.Draw(sky)
    for thing in things:
        faces = [face for part in thing.parts for face in part]
        own = np.concatenate([points for points, _, _ in faces])
        low = own[own[:, 2] < .4]
        under = rect(low[:, 0].min() - .1, low[:, 0].max() + .1, np.ptp(low[:, 1]) / 2 + .1)
        _draw(pen_sky, view.project(thing.place(np.pad(under, ((0, 0), (0, 1)))))[0], 255, 0)
        flat = thing.place(own)
        pixels, scale = view.project(flat - flat[:, 2:] * light.to_sun / light.to_sun[2])
        start = np.cumsum([0] + [len(points) for points, _, _ in faces])
        for k, (_, _, width) in enumerate(faces):
            _draw(pen_sun, pixels[start[k]:start[k + 1]], 255, width * scale[start[k]])
    return sun.filter(ImageFilter.BoxBlur(1)), sky.filter(ImageFilter.BoxBlur(view.size[0] / 180))


def _shine(image, gain, mask=None):
    """Multiplies an RGB image by gain (3,), where the mask is 255, in place."""
    table = [min(255, round(v * g)) for g in np.asarray(gain).tolist() for v in range(256)]
    image.paste(image.point(table), (0, 0), mask)



# ---- one scene -----------------------------------------------------------------------------------------------------
def _view(rng, size):
    tilt, turn = np.radians(rng.uniform(25, 33)), np.radians(rng.uniform(-35, 35))
    ahead = np.array([np.sin(turn), np.cos(turn), 0])
    right, forward = np.array([ahead[1], -ahead[0], 0]), ahead * np.cos(tilt) - (0, 0, np.sin(tilt))
    eye = np.array([0, 0, np.exp(rng.uniform(np.log(16), np.log(27)))])
    return View(eye, np.stack((right, np.cross(forward, right), forward)), 1.78 * size[0], size)


def _light(rng):
    """Sun, clouds or dusk -> Light, and whether the lamps are on."""
    up, turn = np.radians(rng.uniform(30, 65)), rng.uniform(0, 2 * np.pi)
    to_sun = np.array([np.cos(up) * np.cos(turn), np.cos(up) * np.sin(turn), np.sin(up)])
    weather = rng.choice(3, p=(.55, .25, .2))
    sky, sun = (((.56, .60, .67), (.82, .77, .68)), ((.98, 1.0, 1.03), (.10, .10, .10)),
                ((.50, .51, .60), (.10, .07, .05)))[weather]
    gain = np.exp(rng.normal(0, .08)) * np.exp(rng.normal(0, .02, 3))
    return Light(np.array(sky) * gain, np.array(sun) * gain, to_sun), weather == 2


def _smooth(rng, shape, cell):
    """Smooth noise (H, W) float32, mean 0, deviation about 1, with features about `cell` pixels wide."""
    small = rng.standard_normal([n // cell + 3 for n in shape], dtype=np.float32)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BILINEAR)) * 1.5


def _inside(view, points, margin):
    """Which points (N, 2) of the ground lie in the image, or up to `margin` (a share of its size) outside of it."""
    pixels, scale = view.project(np.pad(points, ((0, 0), (0, 1))))
    pixels = pixels / view.size[::-1]
    return ((pixels > -margin) & (pixels < 1 + margin)).all(1) & (scale > 0)


def _layout(rng, view):
    """-> bays (N, 3): centre and heading; the middles of the aisles (M,); lower and upper bounds of the ground seen."""
    height, width = view.size
    seen = view.ground(np.array([(0, 0), (width, 0), (width, height), (0, height)], float))
    low, high = seen.min(0), seen.max(0)
    island = ISLAND * (rng.random() < .6)
    period = 2 * DEPTH + island + AISLE                   # two rows back to back, and the aisle
    rows = np.arange(low[1] - rng.uniform(0, period), high[1] + period, period)
    x = np.arange(low[0] - rng.uniform(0, SLOT), high[0], SLOT)
    bays = [np.stack(np.broadcast_arrays(x, y, heading), 1) for row in rows
            for y, heading in ((row + DEPTH / 2, -np.pi / 2), (row + 1.5 * DEPTH + island, np.pi / 2))]
    bays = np.concatenate(bays)
    return bays[_inside(view, bays[:, :2], .15)], rows - AISLE / 2, low, high


def _asphalt(rng, view, bays, green, low, high):
    """A map of the ground with oil stains, repairs and the beds of `green` bays, as the camera sees it -> RGB image."""
    n = max(view.size) * 3 // 5
    fine = (n - 1) / (high - low).max()                                       # texels per metre
    tone = 1 + .05 * _smooth(rng, (n, n), 48) + .03 * _smooth(rng, (n, n), 7)
    tone += np.float32(.04) * rng.standard_normal((n, n), dtype=np.float32)
    tone = Image.fromarray(np.clip(rng.uniform(92, 142) * tone, 0, 255).astype(np.uint8))
    stain = Image.new("L", (n, n))
    pen = ImageDraw.Draw(stain)

    def patch(draw, centre, half, colour):
        centre, half = (centre - low) * fine, np.multiply(half, fine)
        draw((*(centre - half), *(centre + half)), colour)

    for x, y, _ in bays[rng.random(len(bays)) < .5]:
        patch(pen.ellipse, (x, y) + rng.normal(0, .6, 2), rng.uniform(.15, .8, 2), int(rng.integers(30, 110)))
    for _ in range(6):
        patch(pen.rectangle, rng.uniform(low, high), rng.uniform(.5, 3.5, 2), int(rng.integers(20, 60)))
    tone.paste(52, (0, 0), stain)
    chart = Image.merge("RGB", [tone.point(lambda v, k=k: int(v * k)) for k in rng.normal(1, .03, 3)])
    pen = ImageDraw.Draw(chart)
    for x, y, _ in green:
        patch(pen.rectangle, (x, y), (SLOT / 2, DEPTH / 2), (176, 174, 168))
        patch(pen.rectangle, (x, y), (SLOT / 2 - .3, DEPTH / 2 - .3), (84, 112, 62))
    rays = view.rays()
    to_chart = fine * ((view.eye[:2] - low)[:, None] * rays[2] - view.eye[2] * rays[:2])
    coefficients = np.concatenate((to_chart.ravel(), rays[2, :2])) / rays[2, 2]
    return chart.transform(view.size[::-1], Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)


def _ground(rng, view, bays, green, low, high):
    """Asphalt and painted lines, before the light falls on them -> RGB image."""
    lines = Image.new("L", (FINE * view.size[1], FINE * view.size[0]))
    pen = ImageDraw.Draw(lines)
    inward = np.stack((np.ones(len(bays)), -np.sign(bays[:, 2])), 1)[:, None]
    for x, y, w, h in ((-SLOT / 2, 0, .07, DEPTH / 2), (SLOT / 2, 0, .07, DEPTH / 2), (0, DEPTH / 2, SLOT / 2, .07)):
        corners = bays[:, None, :2] + rect(x - w, x + w, h, y) * inward
        for quad in view.project(np.pad(corners, ((0, 0), (0, 0), (0, 1))))[0] * FINE:
            _draw(pen, quad, 255, 0)
    worn = np.clip(180 + 50 * _smooth(rng, view.size, 20), 0, 255).astype(np.uint8)
    ground = _asphalt(rng, view, bays, green, low, high)
    ground.paste((222, 222, 216), (0, 0), ImageChops.multiply(lines.reduce(FINE), Image.fromarray(worn)))
    return ground


def _spot(rng, view, name, bays, aisles, focus):
    """Where a thing of this class may stand: (x, y, heading). Cars park in bays, the large ones drive in the aisles."""
    if name in PARKED and rng.random() < .85:
        near = np.exp(-np.linalg.norm(bays[:, :2] - focus, axis=1) / 12) + .01
        x, y, heading = bays[rng.choice(len(bays), p=near / near.sum())] + rng.normal(0, (.12, .15, .025))
        return x, y, heading + np.pi * rng.integers(2)
    if name in PARKED or name in LARGE:
        x, y = view.ground(rng.uniform(.04, .96, 2) * view.size[::-1])
        back = rng.integers(2)
        return x, aisles[abs(aisles - y).argmin()] + (1.6 if back else -1.6), np.pi * back + rng.normal(0, .03)
    return *(focus + rng.normal(0, 8, 2)), rng.uniform(-np.pi, np.pi)


def _populate(rng, view, names, bays, aisles, scenery):
    """Things of these classes, clear of one another and of the scenery, none tiny or huge -> [Thing]."""
    things, taken = [], [(t.at[:2] - (1.3, 2.6), t.at[:2] + (1.3, 2.6)) for t in scenery]
    focus = view.ground(rng.uniform((.2, .15), (.8, .85)) * view.size[::-1])
    for name in names:
        category = 1 + list(CLASSES).index(name)
        parts = MODELS[category - 1](rng)
        for _ in range(60):
            x, y, heading = _spot(rng, view, name, bays, aisles, focus)
            thing = Thing(category, parts, np.array((x, y, 0)), heading)
            points = thing.points()
            low, high = points.min(0)[:2] - .15, points.max(0)[:2] + .15
            size = np.ptp(points, axis=0).max() * view.project(thing.at)[1] / view.size[0]
            clear = not any((low < t[1]).all() and (t[0] < high).all() for t in taken)
            if clear and .017 < size < .45 and _inside(view, thing.at[None, :2], -.02)[0]:
                taken.append((low, high))
                things.append(thing)
                break
    return things


def _across(rng, view, light, lamps):
    """Light that changes across the lot -> gain (3,) and the mask of where it holds."""
    at = view.ground(np.stack(np.meshgrid(*(np.arange(0, n + 16, 16.) for n in view.size[::-1])), -1))
    if lamps:
        places = view.ground(rng.uniform(.05, .95, (4, 2)) * view.size[::-1])
        gain, amount = (2.1, 1.95, 1.6), sum(np.exp(-((at - place) ** 2).sum(-1) / 150) for place in places)
    else:                                                 # the shadow of a building, if any
        turn, middle = rng.uniform(0, 2 * np.pi), view.ground(rng.uniform(.2, .8, 2) * view.size[::-1])
        amount = ((at - middle) @ (np.cos(turn), np.sin(turn)) / .8 + .5) * (rng.random() < .35)
        gain = light.sky / (light.sky + .75 * light.sun * light.to_sun[2])
    coarse = Image.fromarray((255 * np.clip(amount, 0, 1)).astype(np.uint8))
    box = 0.5, 0.5, view.size[1] / 16 + .5, view.size[0] / 16 + .5            # node k lies at pixel 16 k
    return gain, coarse.resize(view.size[::-1], Image.Resampling.BILINEAR, box)


def plan(rng, size, *, first=None):
    """A lot before things are drawn -> its ground with their shadows (RGB image), [Thing], View, Light, _across().

    first: the class that certainly occurs, among about 3 to 15 things; None leaves the lot empty but for trees.
    """
    view, (light, lamps) = _view(rng, size), _light(rng)
    bays, aisles, low, high = _layout(rng, view)
    planted = rng.random(len(bays)) < .06
    bays, green = bays[~planted], bays[planted]
    ground = _ground(rng, view, bays, green, low, high)
    scenery = [Thing(0, (tree if rng.random() < .8 else lamp_post)(rng), np.array((x, y, 0)), heading)
               for x, y, heading in green if rng.random() < .7]
    things = []
    if first:
        weights = np.array(list(CLASSES.values())) / sum(CLASSES.values())
        names = [first, *rng.choice(list(CLASSES), rng.integers(3, 15), p=weights)]
        things = _populate(rng, view, names, bays, aisles, scenery)
    things += scenery
    no_sun, no_sky = _shadows(things, view, light)
    _shine(ground, light.on(np.array((0, 0, 1))))
    _shine(ground, light.sky / light.on(np.array((0, 0, 1))), no_sun)
    _shine(ground, (.5, .5, .5), no_sky)
    return ground, things, view, light, _across(rng, view, light, lamps)


def scene(rng, size, *, first=None):
    """One picture (RGB image), its boxes (N, 4) x1 y1 x2 y2 in pixels, and their categories (N,), from 1.

    first: see plan(). A box surrounds what is visible; things more than 80 % hidden have none.
    """
    ground, things, view, light, across = plan(rng, size, first=first)
    image, marks = paint(ground, things, view, light)
    _shine(image, *across)
    if rng.random() < .5:                                 # a soft lens
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(.2, .6) * size[0] / 720))
    noise = 128 + np.float32(rng.uniform(1.5, 5)) * rng.standard_normal(size, dtype=np.float32)
    noise = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    image = ImageChops.add(image, Image.merge("RGB", [noise] * 3), 1, -128)
    kept = [(box, thing.category) for thing, (box, share) in zip(things, marks) if thing.category and share >= .2]
    boxes, categories = np.array([b for b, _ in kept]).reshape(-1, 4), np.array([c for _, c in kept], int)
    return image, boxes, categories


# ---- the files -----------------------------------------------------------------------------------------------------
def parking(out, *, train=48, test=12, size=(720, 1280), seed=0):
    """2022 AI Challenge, parking lots -> `out`/DATA/{train,test}/{images,label}, Test_Images_Information.json.

    Returns the folder. Images are JPEG of `size` (height, width); label/{Train,Test}.json lists "images" {id,
    file_name}, "annotations" {image_id, category_id 1..14, bbox [x, y, width, height] in pixels} and "categories".
    The competition keeps the labels of its test set back; here they lie in test/label, so that a demonstration can
    score itself. Every twelfth lot is empty. Scene i of a split depends on (seed, split, i) and the size alone.
    Raises UserError when the folder is there already. It appears whole or not at all.
    """
    target, classes = os.path.join(out, "DATA"), list(CLASSES)
    with whole_folder(target) as root:
        labels = {split: {"images": [], "annotations": []} for split in ("train", "test")}
        for split in labels:
            os.makedirs(os.path.join(root, split, "images"))
            os.makedirs(os.path.join(root, split, "label"))
        scenes = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
        for split, i in tqdm(scenes, desc=target, unit="scene", disable=None):
            rng = np.random.default_rng((seed, ("train", "test").index(split), i))
            image, boxes, categories = scene(rng, size, first=classes[i % 14] if i % 12 != 7 else None)
            image.save(os.path.join(root, split, "images", f"{split}_{i:04d}.jpg"), quality=90)
            labels[split]["images"].append({"id": i + 1, "file_name": f"{split}_{i:04d}.jpg"})
            labels[split]["annotations"] += [
                {"image_id": i + 1, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for c, (x1, y1, x2, y2) in zip(categories.tolist(), boxes.tolist())]
        names = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
        _write_json(os.path.join(root, "train", "label", "Train.json"), {**labels["train"], "categories": names})
        _write_json(os.path.join(root, "test", "label", "Test.json"), {**labels["test"], "categories": names})
        _write_json(os.path.join(root, "Test_Images_Information.json"), {"images": labels["test"]["images"]})
    return target


def _write_json(path, content):
    with open(path, "w") as file:
        json.dump(content, file)
