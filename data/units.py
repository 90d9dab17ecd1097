"""The numbers that pixels have: their scale for the net, and whether files to predict have the training's units."""
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch

from data import augment, bad, images
from data.cache import facts, in_threads
from data.folds import spread
from utils.errors import UserError, answers_for
from utils.files import folder_of
from utils.train import dist

LOOKED_AT = 500  # images, evenly spread, from which statistics are taken
SIDE = 256       # pixels: so many rows and columns of each of them at most
APART = 100      # a factor between magnitudes that cannot be right by chance


@dataclass
class Input:
    """How the pixels of a file become what a net sees; each task has a subclass that is called on a batch.

    The fields are plain values and stand in every checkpoint as "input", so training, validation and prediction share
    one definition. bands: the bands that the net sees, from 1; pixel_scale: pixel values are divided by it, a number or
    one per band; imgsz: side of the net's input in training, pixels; pixel_mean: one number per band, which are
    subtracted before, or empty; seen: what the trained pixels were like, see `look`; mean, std: what pretrained weights
    expect of scaled pixels, see `normalised`, one number per band or one for all.
    """
    bands: list
    pixel_scale: float
    imgsz: int
    _: KW_ONLY
    pixel_mean: list = ()
    seen: dict = field(default_factory=dict)
    mean: list = (0.0,)
    std: list = (1.0,)

    def __post_init__(self):
        """Raises ValueError or TypeError for values that do not fit, which a damaged checkpoint may hold."""
        count, names = len(self.bands), ("pixel_scale", "std", "mean", "pixel_mean")
        values = [np.ravel(getattr(self, name)).astype(float) for name in names]
        if min(self.bands) < 1 or self.imgsz < 1 or min(map(np.min, values[:2])) <= 0 or \
                any(len(v) not in (0, 1, count) or not np.isfinite(v).all() for v in values) or \
                self.seen and {count} != {len(self.seen[name]) for name in ("low", "high")}:
            raise ValueError("the values of its input do not belong together")

    @classmethod
    def of(cls, resumed, imgsz):
        """The input of the run that goes on from a checkpoint. Raises UserError for a damaged one."""
        with answers_for("--resume"):
            return replace(cls(**resumed["input"]), imgsz=imgsz)

    @property
    def channels(self):
        """How many channels the net's input has."""
        return len(self.bands)

    def scaled(self, images, bands=None, colour=None):
        """images (B, len(bands), H, W) in the files' numbers -> (B, len(self.bands), H, W) float32, the input's bands,
        scaled; pixels without data are 0. bands: what the channels of `images` are; None: the input's own bands.
        colour: matrices (B, C, C) of `augment.colour`, which change them."""
        if bands is not None and list(bands) != list(self.bands):
            images = images[:, [list(bands).index(band) for band in self.bands]]
        x = images.float() - per_band(self.pixel_mean, images.device) if self.pixel_mean else images
        x = x.float() / per_band(self.pixel_scale, x.device) if colour is None else \
            augment.recolour(x, colour, self.pixel_scale)
        return x.nan_to_num_(0.0) if images.is_floating_point() else x

    def normalised(self, x):
        """(B, C, H, W) of `scaled` -> (x - mean) / std."""
        return (x - per_band(self.mean, x.device)) / per_band(self.std, x.device)


def per_band(values, device):
    """A number, or a tensor (C, 1, 1) of a list of numbers."""
    return torch.tensor(values, device=device)[:, None, None] if isinstance(values, (list, tuple)) else values


def default_scale(files):
    """The number that pixel values are divided by to lie in 0..1: 65535 for uint16 (as in the wildfire system), 255 for
    uint8, else 1. UserError where the files differ in it."""
    file_of = {{"uint8": 255.0, "uint16": 65535.0}.get(images.header(file).dtype, 1.0): file for file in files}
    if len(file_of) > 1:
        one, other = list(file_of.values())[:2]
        raise UserError(f"{other}: has {images.header(other).dtype} pixels, {one} {images.header(one).dtype}, and one "
                        f"scale is for all; convert them")
    return next(iter(file_of))


def _sample(file, bands):
    """Pixels of a file (bands, n) in float64, of a large one those of its middle; NaN where there is no data."""
    height, width = images.size(file)[1:]
    h, w = min(height, 4 * SIDE), min(width, 4 * SIDE)
    window = ((height - h) // 2, (width - w) // 2, h, w) if images.in_windows(images.header(file)) else None
    shape = min(h, SIDE), min(w, SIDE)
    return images.read_picture(file, bands, window=window, shape=shape).double().flatten(1).numpy()


def photographs(root):
    """Whether the images in a folder, or beside a file, are photographs, by what 20 of them say of themselves: three
    bands of 8 bits and no place on Earth. Files of one band may be masks; what cannot be read does not count."""
    files, _ = bad.attempt(images.find, folder_of(root), True)
    found = [header for file in spread(files or [], 20) if (header := bad.attempt(images.header, file)[0])]
    return {(header.dtype, bool(header.place)) for header in found} == {("uint8", False)} and max(
        header.size[0] - header.opacity for header in found) == 3


def look(files, bands):
    """What the pixels of files are like -> {"dtype": of the first file, "low", "high", "mean", "std": numbers per
    band}, over the valid pixels of at most LOOKED_AT files. Raises UserError where none holds data."""
    def measure(file):
        pixels = _sample(file, bands)
        valid = np.isfinite(pixels)
        return np.stack((valid.sum(1), pixels.sum(1, where=valid), (pixels ** 2).sum(1, where=valid),
                         pixels.min(1, initial=np.inf, where=valid),
                         pixels.max(1, initial=-np.inf, where=valid))).tolist()

    looked = [(file,) for file in spread(list(files), LOOKED_AT)]
    found = np.array(facts("units", measure, looked, variant=(bands, SIDE), bar="units"))
    sums, low, high = sum(found[:, :3]), found[:, 3].min(0), found[:, 4].max(0)
    if not sums[0].all():
        raise UserError(f"{files[0]}: band {bands[sums[0].argmin()]} holds no data in any image; choose other --bands")
    mean = sums[1] / sums[0]
    std = np.sqrt((sums[2] / sums[0] - mean ** 2).clip(0))
    return {"dtype": images.header(files[0]).dtype} | {
        name: values.tolist() for name, values in dict(low=low, high=high, mean=mean, std=std).items()}


def choose(files, bands, scale, *, clamped=False):
    """--pixel-scale -> the fields pixel_scale, pixel_mean and seen of an Input, and prints what was understood.

    scale: None means `default_scale`; one number, or a list with one per band; "standard": the mean of each band is
    subtracted, and the rest divided by the standard deviation, over the training images `files`. clamped: the net's
    input is clamped to 0..1. UserError where that would hide pixels, and where the numbers are not one per band.
    """
    seen, mean = look(files, bands), []
    largest = np.maximum(np.abs(seen["low"]), np.abs(seen["high"]))
    if scale == "standard":
        scale, mean = [std or 1.0 for std in seen["std"]], seen["mean"]
    elif scale is None:
        scale = default_scale(files)
        if clamped and (min(seen["low"]) < 0 or max(seen["high"]) > scale):
            raise UserError(f"{files[0]}: {seen['dtype']} pixels lie between {min(seen['low']):g} and "
                            f"{max(seen['high']):g}, and nothing says which value is white; give it with "
                            f"--pixel-scale, or --pixel-scale standard")
    if isinstance(scale, list) and len(scale) != len(bands):
        raise UserError(f"--pixel-scale: {len(scale)} numbers for the {len(bands)} bands {bands}; give one, or one per "
                        f"band")
    shown = ", ".join(f"{low:g} to {high:g}" for low, high in zip(seen["low"], seen["high"]))
    opacity = images.header(files[0]).opacity and images.size(files[0])[0]
    dist.print0(f"input: bands {', '.join(map(str, bands))} of {seen['dtype']}, {shown}; "
                + (f"minus {_show(mean)}, " if mean else "") + f"divided by {_show(scale)}"
                + (f"; band {opacity} is declared as opacity" if opacity and opacity not in bands else ""))
    scaled = largest / np.array(scale)
    low, high = scaled.argmin(), scaled.argmax()
    if not mean and scaled[high] > APART * scaled[low]:
        dist.print0(f"warning: after scaling, band {bands[high]} reaches {scaled[high]:g} and band {bands[low]} "
                    f"{scaled[low]:g}, so the net will hardly see the latter; give --pixel-scale standard, or one "
                    f"number per band")
    return dict(pixel_scale=scale, pixel_mean=mean, seen=seen)


def _show(values):
    return ", ".join(f"{value:.6g}" for value in np.ravel(values))


def check(files, inputs):
    """Compares the units of files to predict with those of the training: prints a warning per file of another type, or
    of another magnitude; UserError for a file in which both differ, since the result could mean nothing.

    Files of bytes are not read for this, if the training had bytes too.
    """
    seen = inputs.seen
    if not seen:  # a checkpoint of an earlier edition
        return

    def compare(file):
        dtype = images.header(file).dtype
        if dtype == seen["dtype"] == "uint8":
            return ""
        pixels, damaged = bad.attempt(_sample, file, inputs.bands)
        if damaged or np.isnan(pixels).all():  # told where it is read as a whole
            return ""
        reached, trained = np.nanmax(np.abs(pixels)), np.abs([seen["low"], seen["high"]]).max()
        factor = max(reached, 1e-30) / max(trained, 1e-30)
        unlike = dtype != seen["dtype"], not 1 / APART <= factor <= APART
        what = f"{file}: has {dtype} pixels up to {reached:g}, and the training had {seen['dtype']} up to " \
            f"{trained:g}; convert it"
        if all(unlike) and reached:
            raise UserError(what)
        return f"{what} unless that is right" if any(unlike) else ""

    for line in filter(None, in_threads(compare, files)):
        dist.print0(f"warning: {line}")
