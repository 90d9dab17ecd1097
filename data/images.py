"""Reading images of any band count and depth: GeoTIFF by rasterio, PNG and JPEG by torchvision.

Every reader answers a file that it cannot use with a UserError naming it. Nothing but the file itself is
opened: GDAL's other drivers, which follow references to further files and to the network, stay shut.
"""
import functools
import math
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window
from torchvision.io import ImageReadMode, decode_image, read_file

from utils.errors import UserError

warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images have no place on Earth, and need none

TIFF, OTHER = (".tif", ".tiff"), (".png", ".jpg", ".jpeg")
MAX_PIXELS = 2**28  # of one image read whole: a small file can claim to be 2e9 x 2e9


def find(folder):
    """The image files in a folder, sorted by name. Raises UserError when it is missing or has none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put the data there, or point --data or --source to it "
                        f"(python -m data.sample makes sample data)")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in TIFF + OTHER)
    if not files:
        raise UserError(f"{folder}: no images in it ({', '.join(TIFF + OTHER)}); check the path")
    return files


def is_tiff(path):
    return Path(path).suffix.lower() in TIFF


def open_tiff(path):
    """rasterio's dataset, for windowed reading. Use it in a `with`."""
    _regular(path)
    try:
        return rasterio.open(os.path.abspath(path), driver="GTiff")  # absolute: no /vsi names, no URLs
    except RasterioError:
        raise UserError(f"{path}: not a readable GeoTIFF; replace or remove it") from None


def size(path):
    """(bands, height, width) from the file's header."""
    if is_tiff(path):
        with open_tiff(path) as file:
            return file.count, file.height, file.width
    _regular(path)
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:  # the header only
            turned = file.getexif().get(0x0112, 1) >= 5
            return (len(file.getbands()),) + (file.size if turned else file.size[::-1])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{path}: not a readable PNG or JPEG; replace or remove it") from None


def read(path, bands=None, *, window=None, shape=None):
    """-> tensor (C, H, W) in the file's own dtype; EXIF orientation is applied.

    bands: 1-based, None: all. window: (row, column, height, width), of which a GeoTIFF reads no more than that.
    shape: (height, width) to reduce to, nearest pixels. Raises UserError naming the file.
    """
    count, height, width = size(path)
    if shape is None and (math.prod(window[2:]) if window else height * width) > MAX_PIXELS:
        raise UserError(f"{path}: {width} x {height} pixels are too many to read whole; cut it into tiles")
    if bands and max(bands) > count:
        raise UserError(f"{path}: has {count} bands, band {max(bands)} is asked for; see --bands, or remove the file")
    try:
        if is_tiff(path):
            with open_tiff(path) as file:
                view = Window(window[1], window[0], window[3], window[2]) if window else None
                out_shape = shape and (len(bands or range(count)), *shape)
                image = torch.from_numpy(_native(file.read(bands, window=view, out_shape=out_shape)))
        else:
            image = _decode(path)
            image = image if bands is None else image[[b - 1 for b in bands]]
            if window:
                image = image[:, window[0]:window[0] + window[2], window[1]:window[1] + window[3]]
            if shape:
                rows, columns = (torch.arange(n) * side // n for n, side in zip(shape, image.shape[1:]))
                image = image[:, rows][:, :, columns]
    except (RasterioError, RuntimeError):
        raise UserError(f"{path}: truncated or damaged; replace or remove it") from None
    return check_finite(image, path)


@functools.lru_cache(maxsize=1)  # windows of one large picture follow each other
def _decode(path):
    return decode_image(read_file(str(path)), ImageReadMode.UNCHANGED, apply_exif_orientation=True)


def check_finite(image, path):
    if image.is_floating_point() and not image.isfinite().all():
        raise UserError(f"{path}: has NaN or infinite pixels; fill them (0 counts as no data), or remove the file")
    return image


def _native(array):
    # torch computes in these; the rare uint32, int8, ... become the next that holds them
    kept = (np.uint8, np.uint16, np.int16, np.int32, np.float32)
    return array if array.dtype in kept else array.astype(np.float32)


def _regular(path):
    # a pipe or a device would block or never end
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from None
    if not regular or os.path.getsize(path) == 0:
        raise UserError(f"{path}: {'empty' if regular else 'not a regular file'}; replace or remove it")
