"""Synthetic wildfires in the bands of a satellite, in the layout of AI SPARK 2024; see data/samples/__main__.py."""
import os

import numpy as np
import rasterio

from data.samples import numbered
from utils.files import whole_folder

# Reflectance in the seven useful bands: coastal blue green red   NIR  SWIR1 SWIR2   (plausible, not measured)
SPECTRA = {name: np.array(values, np.float32)[:, None, None] for name, values in dict(
    forest=(.020, .025, .045, .030, .26, .120, .055),
    grass=(.040, .050, .090, .085, .31, .230, .130),
    crop=(.035, .045, .085, .050, .43, .200, .100),
    soil=(.065, .075, .105, .165, .25, .360, .330),
    sand=(.160, .200, .280, .370, .47, .620, .570),      # bright in SWIR2, yet SWIR1 is brighter: not a fire
    roof=(.300, .320, .350, .380, .48, .640, .720),      # SWIR2 above SWIR1, but NIR is bright too: not a fire
    scar=(.026, .028, .032, .042, .055, .140, .195),     # SWIR2 / NIR as in a fire, but dark: an old burn
    water=(.060, .065, .060, .035, .015, .008, .005),
    fire=(.000, .000, .008, .040, .13, .480, 1.00)).items()}     # emitted per unit of heat: SWIR2 >> SWIR1 > NIR
COVERS = {  # what lies on the forest: the lowest and highest level of noise above which it lies, the width of its border
    "grass": (-1., 1., .8), "soil": (-.4, 1.8, .5), "crop": (0., 2., .2), "sand": (1.3, 3., .1), "roof": (1.6, 3., .1),
    "scar": (.6, 2.2, .12), "water": (.9, 3., .1)}


def _noise(rng, size, slope):
    """Noise (size, size), mean 0, deviation 1, of amplitude frequency ** -slope: 1 is rough, 2 like hills, 3 smooth."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf                             # no constant term
    white = np.fft.rfft2(rng.standard_normal((size, size)))
    noise = np.fft.irfft2(white * frequency ** -slope, s=(size, size))
    return noise / noise.std()


def scene(rng, size, *, fraction):
    """One tile: image (10, size, size) uint16 and mask (size, size) uint8 in {0, 1}.

    `fraction` of the pixels burn (0: none). SPECTRA has the values of bands 1-7; bands 8-10 tell nothing about fire.
    """
    image = np.broadcast_to(SPECTRA["forest"], (7, size, size))
    for name, (low, high, width) in COVERS.items():
        opacity = ((_noise(rng, size, 1.7) - rng.uniform(low, high)) / width).clip(0, 1)
        image = image + opacity * (SPECTRA[name] * rng.uniform(.7, 1.6) - image)
    image = image * np.exp(.1 * _noise(rng, size, .7))
    fuel = _noise(rng, size, 1.8) + 20 * image[4].clip(max=.2)                      # what is dark in NIR does not burn
    heat = (fuel - np.quantile(fuel, 1 - fraction)).clip(0)
    image = image + SPECTRA["fire"] * rng.uniform(.4, .7) * (heat > 0) * (.7 + heat)

    # The sensor: its scale differs between tiles far more than the noise does between pixels
    gain = np.exp(rng.uniform(np.log(.1), 0) + rng.normal(0, .35, (7, 1, 1)))
    image = image * rng.normal(1, .04, image.shape) + rng.normal(0, .006, image.shape) + rng.uniform(0, .1, (7, 1, 1))
    others = [9000 + 900 * _noise(rng, size, slope) for slope in (1, 2, 3)]
    image = np.concatenate([image * gain * 45000, others])
    return np.clip(np.rint(image), 0, 65535).astype(np.uint16), (heat > 0).astype(np.uint8)


def _write_tif(path, bands, north):
    """Writes `bands` (C, H, W), whose upper edge lies at `north` metres of UTM zone 52N, with pixels of 30 m."""
    count, height, width = bands.shape
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=count, dtype=bands.dtype,
                       crs="EPSG:32652", transform=rasterio.Affine(30, 0, 300_000, 0, -30, north),
                       compress="deflate", zlevel=1) as file:
        file.write(bands)


def wildfire(out, *, train=48, test=12, size=256, seed=0):
    """AI SPARK 2024 wildfire -> `out`/Wildfire/{train_img,train_mask,test_img,test_mask}. Returns the folder.

    Images are 10-band uint16 GeoTIFF, masks one-band uint8 in {0, 1}. The competition does not publish the masks of its
    test set; here they lie in test_mask, so that a demonstration can be scored. Every eighth tile has no fire.
    Raises UserError if the folder exists already. The folder appears whole or not at all.
    """
    target = os.path.join(out, "Wildfire")
    with whole_folder(target) as root:
        for folder in ("train_img", "train_mask", "test_img", "test_mask"):
            os.mkdir(f"{root}/{folder}")
        for split, i, rng in numbered(target, train=train, test=test, seed=seed):
            fraction = np.exp(rng.uniform(np.log(4e-4), np.log(.13))) if i % 8 != 5 else 0     # of 256 px: 26 to 8520
            north = 4_000_000 + 30 * size * (i + 1 if split == "train" else -i)                # no two tiles overlap
            image, mask = scene(rng, size, fraction=fraction)
            for kind, bands in (("img", image), ("mask", mask[None])):
                _write_tif(f"{root}/{split}_{kind}/{split}_{kind}_{i:04d}.tif", bands, north)
    return target
