"""Synthetic parking lots in the layout of the 2022 AI Challenge (parking-lot detection); see data/samples/__main__.py.

The lots are seen from above. Vehicles and people are rectangles with a smaller one on top: a window, a load, a head.
Bounding boxes are measured on the pixels that are drawn.
"""
import os

import numpy as np
from PIL import Image, ImageDraw

from data.samples import numbered
from utils.files import whole_folder, write_json
from utils.pictures.sheets import save_image

GLASS, SKIN = "#2c3642", "peachpuff"
USUAL = ("white", "silver", "#222428", "navy", "firebrick")
BRIGHT = ("firebrick", "royalblue", "seagreen", "darkorange")
# A class: how often it is seen, its colours, its length and width in metres, length and colour of what is on top
CLASSES = {                                              # category_id is the place in this table, from 1
    "sedan": (30, USUAL, 4.5, 1.7, 1.6, GLASS),
    "SUV": (20, USUAL, 4.9, 2, 3.6, GLASS),
    "van": (6, USUAL, 5.3, 2.1, .6, GLASS),
    "bus": (2, BRIGHT, 10.4, 2.5, 9, "white"),
    "school bus": (1.5, ("gold",), 8.4, 2.2, .4, GLASS),
    "truck": (6, BRIGHT, 6.5, 2.2, 4.6, "silver"),
    "taxi": (4, ("gold", "darkorange"), 4.5, 1.7, 1.6, GLASS),
    "adult": (15, BRIGHT, .4, .6, .24, SKIN),
    "child": (4, BRIGHT, .3, .4, .2, SKIN),
    "motorcycle": (3, USUAL, 2, .45, .8, "black"),
    "kickboard": (2, BRIGHT, 1.1, .25, .3, "black"),
    "bicycle": (3, BRIGHT, 1.75, .2, 1, "black"),
    "stroller": (1.5, BRIGHT, .9, .55, .5, "black"),
    "cart": (2, ("silver",), 1, .6, .2, "firebrick")}
PARKED = ("sedan", "SUV", "van", "taxi")                 # most of these stand in the bays
BAY = (2.7, 5.6)                                         # width and depth of a parking bay, in metres


def draw(rng, name, scale, degrees):
    """An object of this class, turned counter-clockwise -> RGBA image, `scale` pixels a metre, else transparent."""
    _, colours, length, width, top, colour = CLASSES[name]
    length, width, top = (int(scale * side) + 1 for side in (length, width, top))
    image = Image.new("RGBA", (length, width), str(rng.choice(colours)))
    image.paste(colour, ((length - top) // 2, width // 8, (length + top) // 2, width - width // 8))
    return image.rotate(degrees, expand=True)


def scene(rng, size, *, first=None):
    """One picture, 18 to 30 m high -> RGB image of `size` (height, width), [(category, (x1, y1, x2, y2) in pixels)].

    first: a class that certainly occurs; None leaves the lot empty. There are up to 20 objects. They do not overlap,
    and their middles are in the image.
    """
    scale, sides, found = size[0] / rng.uniform(18, 30), np.array(size[::-1]), []  # pixels per metre; width, height
    bay, image = np.multiply(BAY, scale), Image.new("RGBA", size[::-1], f"hsl(0, 0%, {rng.uniform(35, 55):.0f}%)")
    for x in np.arange(0, size[1], bay[0]):
        ImageDraw.Draw(image).line((x, 0, x, size[0]), "lightgray", int(.12 * scale) + 1)
    shares = np.array([share for share, *_ in CLASSES.values()])
    others = rng.choice(list(CLASSES), rng.integers(5, 20), p=shares / shares.sum())
    for name in [first, *others] if first else []:
        place, degrees = rng.random(2) * sides, rng.uniform(0, 360)
        if name in PARKED and rng.random() < .85:
            place, degrees = (place // bay + .5) * bay, rng.normal(90, 2)
        vehicle, layer = draw(rng, name, scale, degrees), Image.new("RGBA", image.size)
        layer.paste(vehicle, tuple((np.clip(place, 2, sides - 3) - np.divide(vehicle.size, 2)).astype(int)))
        x1, y1, x2, y2 = layer.getbbox()                 # of what of it is in the image
        if all(x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1 for _, (a1, b1, a2, b2) in found):
            found.append((1 + list(CLASSES).index(name), (x1, y1, x2, y2)))
            image.alpha_composite(layer)
    pixels = image.convert("RGB") * rng.normal(rng.uniform(.5, 1.15), .04, 3) + rng.normal(0, 4, (*size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), found


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
            key, name, content = i + 1, f"{split}_{i:04d}.jpg", labels[split]
            save_image(f"{root}/{split}/images/{name}", image, quality=90)
            content["images"].append({"id": key, "file_name": name})
            content["annotations"] += [
                {"image_id": key, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for category, (x1, y1, x2, y2) in found]
        for split, content in labels.items():
            write_json(f"{root}/{split}/label/{split.title()}.json", content, indent=None)
        write_json(f"{root}/Test_Images_Information.json", {"images": labels["test"]["images"]}, indent=None)
    return target
