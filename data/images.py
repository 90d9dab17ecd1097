"""Reading images of any band count and depth: GeoTIFF and PNG by GDAL, JPEG by torchvision.

    palette   one band of indices, as masks need them
    CMYK      four bands as JPEG stores them: 255 is no ink
    EXIF      a JPEG's orientation is applied

A file that cannot be used is a UserError that names it. The first bytes of a file tell its kind, not its name. No other
file is opened for pixels: GDAL's other drivers and its overviews, which follow references to further files and to the
network, are switched off.

Why not torchvision for PNG: its decoder ends the process on about one in 300 damaged files (version 0.29), returns
unset memory for palettes of less than 8 bits, and takes twice as long. For JPEG it is three times faster than others.
"""
import contextlib
import functools
import glob
import hashlib
import math
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

from utils.errors import UserError
from utils.files import reading
from utils.train import dist

warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images have no place on Earth, and need none
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits below replace Pillow's

# megabytes for GDAL's blocks; it would take a twentieth of the machine's memory, in every process
os.environ.setdefault("GDAL_CACHEMAX", "128")

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
KINDS = {b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff", b"MM\0+": "GTiff", b"\x89PNG": "PNG"}
# a file of a few bytes can claim to be 2e9 x 2e9
MAX_SCENE = 2**36  # pixels, however it is read
MAX_VALUES = 2**30  # pixels times bands of one read
STRIP = 2**25  # pixels times bands of a piece, where an image is read in pieces
# GDAL's search for files beside the one that it opens takes half of the time; they say nothing about pixels
ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
DAMAGED = "{}: truncated or damaged; replace or remove it"


def find(folder):
    """The image files in a folder, sorted by name. Raises UserError when it is missing or has none."""
    try:
        files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    except OSError:
        raise UserError(f"{folder}: no such folder, or not readable; put the data there, or point --data or --source "
                        f"to it (python -m data.samples makes sample data)") from None
    if not files:
        raise UserError(f"{folder}: no images in it ({', '.join(SUFFIXES)}); check the path")
    return files


def find_sources(patterns, default, scale):
    """Files, folders and globs -> the image files, sorted; their names must differ. Prints a line where the depth of a
    file is not the one that `scale`, the net's, is made for."""
    files = []
    for pattern in patterns or [default]:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(str(pattern), recursive=True)
        if not matches:
            raise UserError(f"{pattern}: no such file or folder; choose another --source")
        for match in map(Path, sorted(matches)):
            files += find(match) if match.is_dir() else [match]
    files = list(by_stem(files).values())
    other = [file for file in files if {default_scale([file]), scale} == {255.0, 65535.0}]
    if other:
        dist.print0(f"{other[0]}: has {header(other[0]).dtype} pixels ({len(other)} in total), and the net takes "
                    f"{scale:g} for white; convert them unless that is right")
    return files


def in_threads(function, items, what=None):
    """[function(item) for item in items], in threads: reading, decoding and hashing release Python's lock. what: the
    name of a progress bar, which rank 0 shows."""
    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=what, leave=False,
                         disable=dist.rank() > 0 or not items or what is None))


def by_stem(files):
    """Image files -> {name without folder and suffix: file}. UserError for two files of one name."""
    found = {}
    for file in files:
        if found.setdefault(file.stem, file) != file:
            raise UserError(f"{file}: {found[file.stem]} has the same name; rename or remove one")
    return found


class Header(NamedTuple):
    kind: str        # "GTiff", "PNG" or "JPEG"
    size: tuple      # (bands, height, width)
    dtype: str       # of the numbers, such as "uint8"
    bits: int = 8    # of a number, where they are less than a byte
    palette: object = None  # the colours that the indices of the one band stand for, (256, 3) uint8
    orientation: int = 1  # EXIF's of a JPEG, already applied to `size`


def header(path):
    """A file's Header. Raises UserError. It is kept until the file changes: an epoch asks for it several times."""
    with reading(path):
        found = os.stat(path)
    return _header(path, found.st_mtime_ns, found.st_size, stat.S_ISREG(found.st_mode))


@functools.lru_cache(maxsize=2**18)
def _header(path, changed, length, regular):
    with reading(path):
        head = open(path, "rb").read(4) if regular else b""  # reading a pipe or a device would block or never end
    kind = KINDS.get(head, "JPEG" if head[:2] == b"\xff\xd8" else None)
    if kind is None:
        what = "not a regular file" if not regular else "empty" if not head else "not a TIFF, PNG or JPEG"
        raise UserError(f"{path}: {what}; replace or remove it")
    if kind == "JPEG":
        try:
            with Image.open(path, formats=("JPEG",)) as file:  # the header only
                tag = file.getexif().get(0x0112, 1)
                size = file.size if tag >= 5 else file.size[::-1]
                return Header(kind, (len(file.getbands()), *size), "uint8", orientation=tag)
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
            raise UserError(f"{path}: not a readable JPEG, or far too large; replace or remove it") from None
    with _open(path, kind) as file:
        if file.height * file.width > MAX_SCENE:
            raise UserError(f"{path}: claims to be {file.width} x {file.height} pixels; replace or remove it")
        bits = int(file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        colours = None
        if file.count == 1:
            with contextlib.suppress(ValueError):  # it has none
                colours = file.colormap(1)
                colours = torch.tensor([colours.get(i, (0, 0, 0))[:3] for i in range(256)], dtype=torch.uint8)
        return Header(kind, (file.count, *file.shape), file.dtypes[0], bits, colours)


def size(path):
    """(bands, height, width) of a file."""
    return header(path).size


def open_raster(path, *, sidecars=False):
    """rasterio's dataset for a `with` block. Raises UserError when it cannot be opened, or not be read in the block.

    sidecars: whether GDAL may look for files beside it, which can tell the place on Earth.
    """
    return _open(path, header(path).kind, sidecars)


@contextlib.contextmanager
def _open(path, driver, sidecars=False):
    # GDAL's shortcut for whole PNGs does not notice that data is missing, and returns wrong pixels (version 3.10)
    with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO", **({} if sidecars else ALONE)):
        try:
            # an absolute name is neither a /vsi name nor a URL. Overviews may lie in another file that a tag points to
            file = rasterio.open(os.path.abspath(path), driver=driver, OVERVIEW_LEVEL="NONE")
        except UnicodeEncodeError:
            raise UserError(f"{path}: its name or its folder's is no text; rename it") from None
        except (RasterioError, ValueError):  # ValueError: a damaged name of a coordinate system
            raise UserError(f"{path}: not a readable {driver}; replace or remove it") from None
        with file:
            try:
                yield file
            except RasterioError:
                raise UserError(DAMAGED.format(path)) from None


def read(path, bands=None, *, window=None, shape=None, missing=0):
    """-> tensor (C, H, W) in the file's own dtype, or in float32 where torch hardly computes in that dtype.

    bands: counted from 1, None: all. window: (row, column, height, width); of a GeoTIFF only the window is read.
    shape: (height, width) to reduce to by nearest pixels. missing: the value for pixels that a GeoTIFF declares to hold
    no data; with None they keep their numbers, and NaN stays. Raises UserError naming the file.
    """
    kind, (count, height, width), *_ = header(path)
    y, x, h, w = window or (0, 0, height, width)
    every = list(range(1, count + 1))
    bands = list(bands or every)
    if max(bands) > count:
        raise UserError(f"{path}: has {count} bands, band {max(bands)} is asked for; see --bands, or remove the file")
    if len(bands) * math.prod(shape or (h, w)) > MAX_VALUES:
        raise UserError(f"{path}: {width} x {height} pixels are too many to read whole; cut it into tiles")
    if kind == "GTiff":
        with open_raster(path) as file:
            image = file.read(bands, window=Window(x, y, w, h), out_shape=shape and (len(bands), *shape))
            for plane, band in zip(image, bands):
                empty = file.nodatavals[band - 1]
                if missing is not None and empty not in (None, missing):
                    plane[np.isnan(plane) if np.isnan(empty) else plane == empty] = missing
    else:
        image = (_decode_once if window else _decode)(path, os.stat(path).st_mtime_ns)
        if image.shape != (count, height, width):  # its header tells two sizes
            raise UserError(DAMAGED.format(path))
        image = image if bands == every else image[[band - 1 for band in bands]]  # which copies
        if window:
            image = image[:, y:y + h, x:x + w].copy()
        if shape:
            image = nearest(image, shape)
    return _check(image, path, finite=missing is not None)


def digest(path, middle=None):
    """-> 16 bytes that are equal for equal pixels, as `read` gives them: equal in shape, dtype and every bit, whatever the
    format and the compression. Where pixels are indices, the colours count too. Of a JPEG beyond MAX_VALUES the bytes of
    the file count.

    middle: only this number of rows in the middle counts. All bands are read, in pieces (a PNG or JPEG as a whole), so
    memory does not grow with the scene. Raises UserError naming the file.
    """
    kind, (count, height, width), dtype, *_ = header(path)
    if kind == "JPEG" and count * height * width > MAX_VALUES:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    hashed = hashlib.blake2b(f"{count, height, width, dtype}".encode(), digest_size=16)
    whole = kind != "GTiff" and _decode(path, None)
    first = (height - min(middle or height, height)) // 2
    step = max(1, STRIP // (count * width))  # the shape alone decides, so that every format is cut alike
    for row in range(first, height - first, step):
        rows = min(step, height - first - row)
        pixels = whole[:, row:row + rows] if kind != "GTiff" else read(path, window=(row, 0, rows, width), missing=None)
        hashed.update(np.asarray(pixels).ravel().view(np.uint8))
    colours = None if middle else header(path).palette
    if colours is not None:
        hashed.update(colours.numpy().ravel())
    return hashed.digest()


def read_picture(path, bands=None, **options):
    """As `read`; where RGB is asked for (bands 1-3), grey, CMYK and palette images are converted to it. Grey of less
    than eight bits, such as a scanned page of one bit, is spread to 0 ... 255."""
    rgb, found = list(bands or []) == [1, 2, 3], header(path)
    if rgb and found.kind == "JPEG":
        image = read(path, **options)  # all bands: picking some would copy them
        if len(image) == 4:
            ink = image.int()  # 255 is none
            image = (ink[:3] * ink[3] // 255).to(torch.uint8)
    else:
        image = read(path, [1] if rgb and colour_bands(path) == 1 else bands, **options)
        if rgb and found.palette is not None and image.dtype == torch.uint8:
            return found.palette[image[0].long()].permute(2, 0, 1)
        if len(image) == 1 and image.dtype == torch.uint8 and found.bits < 8:
            image = image * (255 // (2**found.bits - 1))
    return image.expand(3, -1, -1) if rgb and len(image) == 1 else image


def colour_bands(path):
    """The number of bands of a file, without the second or fourth band of a PNG, which is its opacity."""
    count = size(path)[0]
    return count - 1 if header(path).kind == "PNG" and count in (2, 4) else count


def check_bands(files, bands):
    """UserError for a file of which `read_picture` cannot give these bands."""
    def check(path):
        count = size(path)[0]
        if count < max(bands) and not (colour_bands(path) == 1 and list(bands) == [1, 2, 3]):
            raise UserError(f"{path}: has {count} bands, band {max(bands)} is asked for; leave it out, or train with "
                            f"other --bands")

    in_threads(check, files)


def default_bands(files):
    """The bands of the first picture, from 1, without opacity. A JPEG counts as RGB, even a grey or CMYK one (see
    `read_picture`); so does a palette, and a grey image where another image has three bands."""
    first, count = header(files[0]), colour_bands(files[0])
    if first.kind == "JPEG" or first.palette is not None or count == 1 and max(in_threads(colour_bands, files)) >= 3:
        count = 3
    return list(range(1, count + 1))


def resize(image, size):
    """(C, H, W) -> (C, *size), antialiased. Bytes stay bytes, all else becomes float32."""
    if image.shape[1:] == tuple(size):
        return image
    bytes_here = image.dtype == torch.uint8 and image.device.type == "cpu"  # GPUs resize no bytes
    small = F.interpolate((image if bytes_here else image.float())[None], size, mode="bilinear", antialias=True)[0]
    return small.round().to(torch.uint8) if image.dtype == torch.uint8 and not bytes_here else small


def reduced(size, limit):
    """size (height, width) -> the same shape with the long side at most `limit`."""
    factor = min(1, limit / max(size))
    return tuple(max(1, round(side * factor)) for side in size)


def thumbnail(path, bands, limit):
    """-> `read_picture` with the long side at most `limit` pixels, and the factor by which it is smaller."""
    full = size(path)[1:]
    shape = reduced(full, limit)
    return read_picture(path, bands, shape=shape), max(shape) / max(full)


def nearest(image, size):
    """(..., H, W), array or tensor -> `size`: for every new pixel the old one that lies at its centre."""
    rows, columns = ((np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(size, image.shape[-2:]))
    return image[..., rows[:, None], columns]


def default_scale(files):
    """The number that pixel values are divided by to lie in 0..1: 65535 for uint16 (as in the wildfire system), 255 for
    uint8, else 1. UserError where the files differ in it."""
    file_of = {}
    for file in files:
        file_of.setdefault({"uint8": 255.0, "uint16": 65535.0}.get(header(file).dtype, 1.0), file)
    if len(file_of) > 1:
        one, other = list(file_of.values())[:2]
        raise UserError(f"{other}: has {header(other).dtype} pixels, {one} {header(one).dtype}, and one scale is for "
                        f"all; convert them")
    return next(iter(file_of))


# ---- pixels ----------------------------------------------------------------------------------------------------------
def _decode(path, changed):
    """A whole PNG or JPEG, which have no windows, as an array (C, H, W)."""
    if header(path).kind == "JPEG":
        data = Path(path).read_bytes()
        try:
            if _cut_off(data):
                raise RuntimeError("torchvision would fill up with grey")
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(data, ImageReadMode.UNCHANGED, apply_exif_orientation=True).numpy()
        except RuntimeError:
            raise UserError(DAMAGED.format(path)) from None
    with open_raster(path) as file:
        if file.count * file.height * file.width > MAX_VALUES:
            raise UserError(f"{path}: {file.width} x {file.height} pixels are too many to read; cut it into tiles")
        return file.read()


def _cut_off(jpeg):
    """Whether a JPEG's end marker is missing. It is looked for behind the header's segments, which hold thumbnails with
    end markers of their own."""
    at = 2
    while jpeg[at:at + 1] == b"\xff" and jpeg[at + 1:at + 2] != b"\xda":
        at += 2 + int.from_bytes(jpeg[at + 2:at + 4], "big")
    return jpeg.find(b"\xff\xd9", at) < 0


_decode_once = functools.lru_cache(maxsize=1)(_decode)  # for the windows of one large picture


def _check(array, path, finite):
    if array.dtype.kind == "c":
        raise UserError(f"{path}: has complex pixels; save their amplitudes, or remove the file")
    if array.dtype not in (np.uint8, np.uint16, np.int16, np.int32, np.float32):
        array = array.astype(np.float32)
    if finite and array.dtype == np.float32 and not np.isfinite(array).all():
        raise UserError(f"{path}: has NaN or infinite pixels; fill them (0 counts as no data), or remove the file")
    return torch.from_numpy(array)


# ---- what a net sees -------------------------------------------------------------------------------------------------
@dataclass
class Input:
    """How the pixels of a file become what a net sees; each task has a subclass that is called on a batch.

    The fields are plain values and stand in every checkpoint as "input", so training, validation and prediction share
    one definition. bands: the bands that the net sees, from 1; pixel_scale: pixel values are divided by it; imgsz: side
    of the net's input in training, pixels.
    """
    bands: list
    pixel_scale: float
    imgsz: int

    def scaled(self, images, bands=None):
        """images (B, len(bands), H, W) in the files' numbers -> (B, len(self.bands), H, W) float32, the input's bands,
        divided by pixel_scale. bands: what the channels of `images` are; None: the input's own bands."""
        if bands is not None and list(bands) != list(self.bands):
            images = images[:, [list(bands).index(band) for band in self.bands]]
        return images.float() / self.pixel_scale
