"""Synthetic wildfires in a satellite's seven useful bands, in the layout of AI SPARK 2024; see data/samples."""
import functools
import os

import numpy as np
import rasterio
from PIL import Image
from rasterio import Affine
from tqdm import tqdm

from utils.files import whole_folder

# ---- spectra ---------------------------------------------------------------------------------------------
# Reflectance of the seven useful bands:  coastal blue  green red   NIR  SWIR1 SWIR2   (plausible, not measured)
SPECTRA = {k: np.array(v, np.float32)[:, None, None] for k, v in dict(
    forest=(.020, .025, .045, .030, .26, .120, .055),
    grass=(.040, .050, .090, .085, .31, .230, .130),
    crop=(.035, .045, .085, .050, .43, .200, .100),
    soil=(.065, .075, .105, .165, .25, .360, .330),
    sand=(.160, .200, .280, .370, .47, .620, .570),      # bright in SWIR2, yet SWIR1 is brighter: not a fire
    water=(.060, .065, .060, .035, .015, .008, .005),
    urban=(.110, .120, .140, .150, .20, .220, .200),
    roof=(.300, .320, .350, .380, .48, .640, .720),      # sheet metal: SWIR2 above SWIR1, but NIR bright too
    glint=(.420, .440, .450, .460, .48, .500, .490),     # the sun in the water: flat
    scar=(.026, .028, .032, .042, .055, .140, .195),     # char: SWIR2 / NIR of a fire, but dark
    cloud=(.560, .560, .550, .560, .60, .420, .330),
    smoke=(.300, .280, .250, .220, .20, .160, .130),
    fire=(.000, .000, .008, .040, .13, .480, 1.00)).items()}     # emitted, per unit of heat: SWIR2 >> SWIR1 > NIR
SMOKE_OPACITY = np.array([1, .97, .92, .82, .45, .14, .07], np.float32)[:, None, None]   # long waves pass through


# ---- building blocks -------------------------------------------------------------------------------------
@functools.cache
def _frequency(n):
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)).astype(np.float32)
    f[0, 0] = np.inf                                      # no constant term
    return f


def _noise(rng, n, slope):
    """Multi-octave noise (n, n), mean 0, deviation 1; amplitude f ** -slope: 1 is rough, 2 is hills, 3 is smooth."""
    white = np.fft.rfft2(rng.standard_normal((n, n), dtype=np.float32))
    x = np.fft.irfft2(white * _frequency(n) ** -slope, s=(n, n))
    return ((x - x.mean()) / x.std()).astype(np.float32)


def _step(x, width):
    """0 below -width, 1 above +width, smooth between."""
    t = np.clip(x / (2 * width) + .5, 0, 1)
    return t * t * (3 - 2 * t)


def _blur(x):
    """The sensor's point spread: a 3x3 binomial kernel over the last two axes."""
    p = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    p = (p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]) / 4
    return (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4


def _parcels(rng, n, cell, *, warp=0.):
    """Fields or city blocks about `cell` pixels wide -> (value in 0..1 per parcel, distance to its edge in pixels)."""
    y, x = np.mgrid[:n, :n].astype(np.float32)
    a = rng.uniform(0, np.pi / 2)
    u, v = x * np.cos(a) + y * np.sin(a) + 2 * n, y * np.cos(a) - x * np.sin(a) + 2 * n
    if warp:
        u, v = u + warp * _noise(rng, n, 2.5), v + warp * _noise(rng, n, 2.5)
    wide = cell * rng.uniform(1., 1.8)
    row = (v / cell).astype(int)
    u = u / wide + rng.random(row.max() + 1, dtype=np.float32)[row]            # rows shifted as bricks are
    edge = np.minimum(np.minimum(u % 1, 1 - u % 1) * wide, np.minimum(v % cell, cell - v % cell))
    return rng.random(8191, dtype=np.float32)[(row * 911 + u.astype(int) * 37) % 8191], edge


def _lay(image, cover, spectrum):
    """Cover `image` (7, n, n) with `spectrum` where `cover` (n, n) or (7, n, n) in 0..1 says so, in place."""
    image += cover * (spectrum - image)


# ---- one scene -------------------------------------------------------------------------------------------
def _ground(rng, n):
    """The land without fire -> reflectance (7, n, n), elevation (n, n), water cover (n, n)."""
    height = _noise(rng, n, 2.6) - .6 * np.abs(_noise(rng, n, 2.)) + .06 * _noise(rng, n, 1.3)     # | |: the ridges
    height = (height - height.mean()) / height.std()
    dry, rough = rng.uniform(-1.2, 1.), rng.uniform(.2, 1.)
    flat = _step(-height - rng.uniform(-.2, .9), .25)                         # valley floors: farms, towns, water

    image = np.repeat(SPECTRA["forest"], n, 1).repeat(n, 2)
    _lay(image, _step(_noise(rng, n, 1.5) + dry, .8), SPECTRA["grass"])
    _lay(image, _step(_noise(rng, n, 1.7) + .4 * height + dry - .6, .5), SPECTRA["soil"])
    green, edge = _parcels(rng, n, n / rng.uniform(14, 30), warp=n / 64)
    field = SPECTRA["soil"] + _step(green - .45, .35) * (SPECTRA["crop"] - SPECTRA["soil"])
    _lay(image, flat * (.35 + .6 * _step(edge - .8, .6)), field)
    _lay(image, flat * (green > rng.uniform(.93, 1)) * _step(edge - 1, .5), SPECTRA["sand"] * rng.uniform(1, 1.6))
    if rng.random() < .6:                                                     # sand bars, quarries, dry lake beds
        _lay(image, _step(_noise(rng, n, 1.8) - rng.uniform(1.3, 2.1), .1), SPECTRA["sand"] * rng.uniform(.9, 1.8))
    if rng.random() < .6:                                                     # an older burn, cold
        _lay(image, .9 * _step(_noise(rng, n, 1.9) - rng.uniform(1.2, 1.9), .12), SPECTRA["scar"])

    light = np.gradient(height, axis=0) + np.gradient(height, axis=1)         # sun in the upper left
    image *= np.clip(1 + rough * (1 - .7 * flat) * light / (3 * light.std()), .35, 1.8)
    image *= np.exp(.10 * _noise(rng, n, .7))                                 # canopy and soil texture

    river = _step(rng.uniform(.01, .035) - np.abs(_noise(rng, n, 2.6) + .15 * height), .012) * (rng.random() < .6)
    water = np.maximum(river, _step(-height - rng.uniform(1.0, 2.6), .04))
    town = flat * _step(_noise(rng, n, 2.) - rng.uniform(.2, 1.6), .25)
    tone, edge = _parcels(rng, n, n / 36)
    _lay(image, town * _step(edge - .7, .5) * .85, SPECTRA["urban"] * (.6 + 1. * tone))
    _lay(image, town * _step(.7 - edge, .5) * .7, SPECTRA["urban"] * .6)      # streets
    _lay(image, (town > .3) * (tone > rng.uniform(.8, 1)) * _step(edge - 1, .5), SPECTRA["roof"] * (5 * tone - 3.6))
    _lay(image, water, SPECTRA["water"] * (1 + .2 * _noise(rng, n, 2.)))
    if rng.random() < .5:
        _lay(image, _step(.5 * _noise(rng, n, 1.) + _noise(rng, n, 2.5) - 1.5, .7) * water, SPECTRA["glint"] * 1.3)
    return image, height, water


def _burn(rng, n, land, fraction, wind):
    """Fires at the edge of what they have burnt -> heat (n, n), 1 at the border of the mask; burnt cover (n, n)."""
    y, x = np.mgrid[:n, :n].astype(np.float32) / n
    front, burnt = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32)
    count = rng.integers(1, 4)
    for _ in range(count):
        dy, dx = y - rng.uniform(.15, .85), x - rng.uniform(.15, .85)
        along, across = dx * np.cos(wind) + dy * np.sin(wind), dy * np.cos(wind) - dx * np.sin(wind)
        radius = (.03 + .8 * np.sqrt(fraction / count)) * rng.uniform(.7, 1.5)
        rim = np.hypot(along / 1.5, across) / radius - 1 + .35 * _noise(rng, n, 1.7)      # < 0: already burnt
        head = 1 + .6 * along / (np.hypot(along, across) + .02)                           # burns best downwind
        fuel = np.exp(.9 * _noise(rng, n, 1.7))
        front = np.maximum(front, head * fuel * np.exp(-(rim / rng.uniform(.25, .6)) ** 2))
        burnt = np.maximum(burnt, _step(-rim, .2))
    front *= land
    border = np.partition(front.ravel(), -max(3, round(fraction * n * n)))[-max(3, round(fraction * n * n))]
    return (front / border) ** rng.uniform(2.2, 4.), burnt * land


def _plume(rng, heat, wind):
    """Smoke carried downwind from `heat` (n, n) -> opacity (n, n) in 0..1."""
    n, k = len(heat), len(heat) // 4                     # smoke is smooth: a quarter of the resolution will do
    source = np.minimum(heat, 2)[:4 * k, :4 * k].reshape(k, 4, k, 4).mean((1, 3))
    y, x = (np.mgrid[:2 * k, :2 * k] + k) % (2 * k) - k  # twice the size: no smoke comes back on the other side
    along, across = x * np.cos(wind) + y * np.sin(wind), y * np.cos(wind) - x * np.sin(wind)
    width = 1 + .14 * np.maximum(along, 0)
    kernel = (along > -.5) * np.exp(-(across / width) ** 2 - along / (k * rng.uniform(.2, .6))) / width
    smoke = np.fft.irfft2(np.fft.rfft2(source, s=(2 * k, 2 * k)) * np.fft.rfft2(kernel), s=(2 * k, 2 * k))[:k, :k]
    smoke = np.asarray(Image.fromarray(smoke.astype(np.float32)).resize((n, n), Image.Resampling.BICUBIC))
    smoke = np.maximum(smoke / (smoke.max() + 1e-6), 0) ** .8 * np.exp(.8 * _noise(rng, n, 1.7))
    return 1 - np.exp(-rng.uniform(.4, 2.5) * smoke)


def scene(rng, size, *, fraction):
    """One tile: image (10, size, size) uint16 and mask (size, size) uint8 in {0, 1}.

    `fraction` of the pixels burn (0: none); a cloud may hide some of them, and what is hidden is not in the mask.
    Bands 1-7 are those of SPECTRA; 8-10 (quality bits, elevation, sensor temperature) tell nothing about fire.
    """
    image, height, water = _ground(rng, size)
    heat, wind = np.zeros((size, size), np.float32), rng.uniform(0, 2 * np.pi)
    if fraction:
        heat, burnt = _burn(rng, size, 1 - water, fraction, wind)
        _lay(image, .85 * burnt, SPECTRA["scar"])
        image += _step(heat - .9, .6) * np.minimum(heat, 4) * SPECTRA["fire"] * rng.uniform(.3, .6)
        _lay(image, SMOKE_OPACITY * _plume(rng, heat, wind), SPECTRA["smoke"])
    cloud = _step(_noise(rng, size, 1.6) - rng.uniform(.6, 2.4), .6) * (rng.random() < .5)
    away = size // 20
    image *= 1 - .55 * np.roll(cloud, (away, away), (0, 1))                   # shadows fall away from the sun
    _lay(image, .95 * cloud, SPECTRA["cloud"])
    image = _blur(image)

    # The sensor: what differs from tile to tile far more than from pixel to pixel is the scale.
    gain = np.exp(rng.uniform(np.log(.1), 0)) * np.exp(rng.normal(0, .35, (7, 1, 1)))
    haze = rng.uniform(0, .12) * SMOKE_OPACITY + rng.uniform(0, .03, (7, 1, 1))
    image = image * (1 + .04 * rng.standard_normal(image.shape, dtype=np.float32)) + haze
    image += .006 * rng.standard_normal(image.shape, dtype=np.float32)
    quality = 2720 + 4 * (water > .5) + 4080 * (cloud > .4) + 32 * (rng.random((size, size)) < .02)
    stripes = np.repeat(rng.normal(0, 40, (1, size)), size, 0)
    thermal = 22000 + 900 * _noise(rng, size, .5) + stripes - 500 * height
    image = np.concatenate([image * gain * 45000, [quality, 900 + 250 * height, thermal]])
    return np.clip(np.rint(image), 0, 65535).astype(np.uint16), ((heat >= 1) & (cloud < .4)).astype(np.uint8)


# ---- the files -----------------------------------------------------------------------------------------------------
def _write_tif(path, bands, corner):
    """Writes `bands` (C, H, W) with the upper left `corner` (east, north) in metres, UTM zone 52N, 30 m pixels."""
    with rasterio.open(path, "w", driver="GTiff", height=bands.shape[1], width=bands.shape[2], count=len(bands),
                       dtype=bands.dtype, crs="EPSG:32652", transform=Affine(30, 0, corner[0], 0, -30, corner[1]),
                       compress="deflate", zlevel=1) as f:
        f.write(bands)


def wildfire(out, *, train=48, test=12, size=256, seed=0):
    """AI SPARK 2024 wildfire -> `out`/Wildfire/{train_img,train_mask,test_img,test_mask}. Returns the folder.

    Images are 10-band uint16 GeoTIFF, masks one-band uint8 in {0, 1}. The competition keeps the masks of its test set
    back; here they lie in test_mask, so that a demonstration can score itself. Every eighth tile has no fire.
    Raises UserError when the folder is there already. It appears whole or not at all.
    """
    target = os.path.join(out, "Wildfire")
    with whole_folder(target) as root:
        for folder in ("train_img", "train_mask", "test_img", "test_mask"):
            os.mkdir(os.path.join(root, folder))
        tiles = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
        for split, i in tqdm(tiles, desc=target, unit="tile", disable=None):
            rng = np.random.default_rng((seed, ("train", "test").index(split), i))
            fraction = np.exp(rng.uniform(np.log(4e-4), np.log(.13))) if i % 8 != 5 else 0.      # 26 to 8520 pixels
            image, mask = scene(rng, size, fraction=fraction)
            row = i // 16 + 1 if split == "train" else -(i // 16)                               # no two tiles overlap
            corner = 300_000 + 30 * size * (i % 16), 4_000_000 + 30 * size * row
            _write_tif(os.path.join(root, f"{split}_img", f"{split}_img_{i:04d}.tif"), image, corner)
            _write_tif(os.path.join(root, f"{split}_mask", f"{split}_mask_{i:04d}.tif"), mask[None], corner)
    return target
