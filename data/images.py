"""Reading images of any band count and depth: GeoTIFF and PNG by GDAL, JPEG by torchvision, the rest by Pillow.

    palette   one band of indices, as masks need them
    CMYK      four bands as JPEG stores them: 255 is no ink
    EXIF      the orientation is applied, in every format
    no data   is NaN: what a no-data value, a mask in the file or beside it, or the opacity declares to hold no data

A file that cannot be used is a UserError that names it. The first bytes of a file tell its kind, not its name. GDAL
opens no other file for pixels than these two: its other drivers and its overviews, which follow references to further
files and to the network, are switched off.

Why not torchvision for PNG: its decoder ends the process on about one in 300 damaged files (version 0.29), returns
unset memory for palettes of less than 8 bits, and takes twice as long. For JPEG it is three times faster than others.
"""
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import stat
import struct
import sys
import threading
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import rasterio
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from data.cache import facts
from utils.errors import UserError
from utils.files import by_name, list_tree, read_bytes, reading
from utils.train import dist

warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images have no place on Earth, and need none
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits below replace Pillow's

# megabytes for GDAL's blocks; it would take a twentieth of the machine's memory, in every process
os.environ.setdefault("GDAL_CACHEMAX", "256")

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
KINDS = {b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff", b"MM\0+": "GTiff", b"\x89PNG": "PNG",
         b"\xff\xd8": "JPEG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP"}
GDAL_KINDS = ("GTiff", "PNG")
# chunks that may stand before the pixels of a PNG without saying anything about them
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PLAIN_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"tEXt")
MAX_SIDE = 2**16  # pixels of a PNG; larger ones are left to GDAL
WKT = "WKT2_2019"  # it can tell every coordinate system
ORIENTATION = 0x0112  # the tag of TIFF and EXIF
MIRRORED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # axes; from 5 on, after rows became columns
# a file of a few bytes can claim to be 2e9 x 2e9
MAX_SCENE = 2**36  # pixels, however it is read
MAX_VALUES = 2**30  # pixels times bands of one read
HEAD = 2**12  # bytes; more of a header is left to GDAL
STRIP = 2**25  # pixels times bands of a piece, where an image is read in pieces
# GDAL's search for files beside the one that it opens takes half of the time; they say nothing about pixels
ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
DAMAGED = "{}: truncated or damaged; replace or remove it"


def find(folder, below=False):
    """The image files in a folder, with `below` also those in the folders in it, sorted by name. Raises UserError when
    it is missing or has none."""
    try:
        names = os.listdir(folder)
    except OSError:
        raise UserError(f"{folder}: no such folder, or not readable; put the data there, or point --data or --source "
                        f"to it (python -m data.samples makes sample data)") from None
    names = list_tree(folder) if below else names
    return some(folder, sorted(Path(folder) / name for name in names if is_image(name)))


def some(place, files):
    """Of the files found at a place the images, and the file that is itself the place. Rank 0 prints how many others
    there are. Raises UserError where no image is."""
    found = [file for file in files if is_image(file) or file == Path(place)]
    if not found:
        raise UserError(f"{place}: no images in it ({', '.join(SUFFIXES)}); check the path")
    if len(found) < len(files):
        other = min(set(files) - set(found))
        dist.print0(f"{place}: {len(files) - len(found)} files are no images and are left out, such as {other}")
    return found


def is_image(path):
    """Whether a file is an image by its name; hidden files are none."""
    name = os.path.basename(path)
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def find_sources(patterns, default, name_of):
    """Files, folders with all folders in them, and globs -> the image files, sorted; name_of(file) must differ. Files
    of other kinds are named with their count, unless the pattern is the file itself. UserError where there is none."""
    found = []
    for pattern in patterns or [default]:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(str(pattern), recursive=True)
        if not matches:
            raise UserError(f"{pattern}: no such file or folder; give --source, the images to predict")
        found += some(pattern, [file for match in map(Path, sorted(matches)) for file in (
            sorted(match / name for name in list_tree(match)) if match.is_dir() else [match])])
    return list(by_name(found, name_of).values())


class Header(NamedTuple):
    kind: str         # "GTiff", "PNG", "JPEG", "WEBP", "GIF" or "BMP"
    size: tuple       # (bands, height, width), upright
    dtype: str        # of the numbers, such as "uint8"
    bits: int = 8     # of a number, where they are less than a byte
    palette: list = ()      # the colours that the indices of the one band stand for: red, green and blue, 256 times
    orientation: int = 1    # EXIF's, 1 to 8
    opacity: bool = False   # the last band says how opaque the pixels are
    nodata: list = ()       # the value of each band that stands for no data, or None
    mask: str = ""    # "inside": the file has a mask of the pixels that hold data; "beside": the file PATH.msk has it
    place: list = ()        # on Earth: the coordinate system as WKT or "", the numbers of the affine transform

    @property
    def gaps(self):
        """Whether pixels without data are possible."""
        return bool(self.opacity or self.mask or any(v is not None for v in self.nodata) or self.dtype[:5] == "float")


_headers = {}  # name of a file -> [bytes, time of the last change, Header as JSON]


@functools.lru_cache(2**16)
def _parsed(text):
    kind, size, *rest = json.loads(text)
    return Header(kind, tuple(size), *rest)


def header(path):
    """A file's Header. Raises UserError. It is kept until the file changes: an epoch asks for it several times."""
    with reading(path):
        found = os.stat(path)
    known, stamp = _headers.get(str(path), []), [found.st_size, found.st_mtime_ns]
    if known[:2] != stamp:
        text = json.dumps(_header(path, stat.S_ISREG(found.st_mode)))
        known = _headers[str(path)] = [*stamp, sys.intern(text)]  # equal texts take memory once
    return _parsed(known[2])


def read_headers(files, **options):
    """Puts the headers of many files where `header` finds them; what cannot be used is left for `header` to tell.
    options: of `facts`, which keeps them between runs."""
    def look(path):
        with contextlib.suppress(UserError):
            header(path)
        return _headers.get(str(path))

    new = [(file,) for file in files if str(file) not in _headers]
    for (file,), (*stamp, text) in filter(all, zip(new, facts("headers", look, new, **options))):
        _headers[str(file)] = [*stamp, sys.intern(text)]
        if text.startswith('["JPEG"'):
            import torchvision.io  # noqa: F401  It takes as long as torch: once, before loader workers are forked


def _header(path, regular):
    with reading(path):
        head = open(path, "rb").read(HEAD) if regular else b""  # reading a pipe or a device would block or never end
    kind = KINDS.get(head[:4], KINDS.get(head[:2]))
    if kind is None:
        what = "not a regular file" if not regular else "empty" if not head else f"not a {' '.join(SUFFIXES)} file"
        raise UserError(f"{path}: {what}; replace or remove it")
    plain = _plain_png(path, head)
    if plain:
        return plain
    if kind not in GDAL_KINDS:
        with _pillow(path, kind) as file:
            if getattr(file, "n_frames", 1) > 1:
                raise UserError(f"{path}: has {file.n_frames} frames; save them as files of their own")
            orientation, mode = file.getexif().get(ORIENTATION, 1), _mode(file.mode)
            bands = Image.getmodebands(file.mode if kind == "JPEG" else mode)
            sides = file.size if orientation in range(5, 9) else file.size[::-1]
            return Header(kind, (bands, *sides), "uint8", 1 if mode == "1" else 8, orientation=orientation,
                          palette=_palette(file.getpalette("RGB")) if file.mode == "P" else (),
                          opacity=kind != "JPEG" and mode.endswith("A"))
    with _open(path, kind) as file:
        if file.height * file.width > MAX_SCENE:
            raise UserError(f"{path}: claims to be {file.width} x {file.height} pixels; replace or remove it")
        if file.subdatasets:
            raise UserError(f"{path}: has {len(file.subdatasets)} pages; save them as bands, or as files of their own")
        colours, beside = (), kind == "GTiff" and os.path.isfile(f"{path}.msk")
        if file.count == 1:
            with contextlib.suppress(ValueError):  # it has none
                colours = file.colormap(1)
                colours = _palette(value for i in range(256) for value in colours.get(i, (0, 0, 0))[:3])
        # the one colour of a PNG that is transparent is one of all its bands together
        nodata = file.nodatavals if kind == "GTiff" or file.count == 1 else ()
        located = file.crs or not file.transform.is_identity
        orientation = 1 if located or file.gcps[0] else _orientation(path, head, kind)
        return Header(
            kind, (file.count, *(file.shape[::-1] if orientation > 4 else file.shape)), file.dtypes[0],
            int(file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)), colours, orientation,
            file.count > 1 and file.colorinterp[-1] == ColorInterp.alpha,
            nodata if any(value is not None for value in nodata) else _nodata_beside(path, file.count),
            "beside" if beside else "inside" if file.mask_flag_enums[0] == [MaskFlags.per_dataset] else "",
            (file.crs.to_wkt(version=WKT) if file.crs else "", tuple(file.transform)[:6]) if located else ())


def _plain_png(path, head):
    """The Header of a PNG whose first bytes show that it has pixels of 8 or 16 bits without palette, transparent colour
    or orientation; else None, and GDAL has to look. It is read here because GDAL takes ten times as long."""
    if head[:16] != PNG_START or len(head) < 41:
        return None
    width, height, bits, colour, *rest, checksum = struct.unpack(">II5BI", head[16:33])
    bands, at = {0: 1, 2: 3, 4: 2, 6: 4}.get(colour), 33
    while head[at + 4:at + 8] in PLAIN_CHUNKS:
        at += 12 + int.from_bytes(head[at:at + 4], "big")
    if not bands or bits not in (8, 16) or rest not in ([0, 0, 0], [0, 0, 1]) or checksum != zlib.crc32(head[12:29]) \
            or not (0 < width < MAX_SIDE and 0 < height < MAX_SIDE) or head[at + 4:at + 8] != b"IDAT" or head[at] > 127:
        return None
    return Header("PNG", (bands, height, width), f"uint{bits}", opacity=bands in (2, 4),
                  nodata=_nodata_beside(path, bands))


def _palette(colours):
    """Red, green and blue of each colour, one after another -> the same for 256 colours; missing ones are black."""
    return tuple([*colours, *[0] * 768][:768])


@contextlib.contextmanager
def _pillow(path, kind):
    """Opens a file with Pillow, which reads the header only until the pixels are asked for."""
    try:
        with Image.open(path, formats=(kind,)) as file:
            yield file
    except (UserError, MemoryError):
        raise
    except Exception:  # of any kind: Pillow's plugins do not answer for damaged files
        raise UserError(f"{path}: not a readable {kind}, or far too large; replace or remove it") from None


def _mode(mode):
    """The one of Pillow's modes in which an image is read: indices of colours stay indices."""
    return mode if mode in ("1", "L", "LA", "RGB", "RGBA") else "L" if mode == "P" else "RGB"


def _orientation(path, head, kind):
    """The orientation in the tags of a TIFF, or in a PNG's EXIF before its pixels; 1 without one."""
    found = None
    with contextlib.suppress(Exception):  # damaged tags say nothing; GDAL has read the file
        if kind == "PNG":
            with Image.open(path, formats=(kind,)) as file:
                tags = Image.Exif()
                tags.load(file.info.get("exif"))
        else:
            tags = ImageFileDirectory_v2(head if head[2:4] in (b"+\0", b"\0+") else head[:8])
            with open(path, "rb") as file:
                file.seek(tags.next)
                tags.load(file)
        found = tags.get(ORIENTATION)
    return found if found in range(1, 9) else 1


def _nodata_beside(path, count):
    """The no-data value per band in PATH.aux.xml, where GDAL writes what a format has no room for; () without one."""
    try:
        bands = ElementTree.fromstring(read_bytes(f"{path}.aux.xml")).iter("PAMRasterBand")
        found = {int(band.get("band")): float(band.findtext("NoDataValue")) for band in bands
                 if band.findtext("NoDataValue")}
    except (UserError, ElementTree.ParseError, ValueError, TypeError):
        return ()
    return tuple(map(found.get, range(1, count + 1)))


def size(path):
    """(bands, height, width) of a file."""
    return header(path).size


def open_raster(path, *, sidecars=False):
    """rasterio's dataset for a `with` block. Raises UserError when it cannot be opened, or not be read in the block.

    sidecars: whether GDAL may look for files beside it, which can tell the place on Earth; it is not for pixels then.
    """
    # Overviews may lie in another file that a tag points to. A file opened so has no valid place on Earth
    kind = header(path).kind
    return _open(path, kind, env={}) if sidecars else _open(path, kind, OVERVIEW_LEVEL="NONE")


@contextlib.contextmanager
def _open(path, driver, *, env=ALONE, **options):
    with _gdal(path, env), _opened(path, driver, **options) as file:
        yield file


@contextlib.contextmanager
def _open_for_windows(path):
    """`open_raster` that leaves the file open: GDAL keeps the blocks that the next windows share with this one. A
    process or thread has a file of its own, as GDAL cannot share one."""
    with _gdal(path):
        yield _kept_open(path, os.stat(path).st_mtime_ns, os.getpid(), threading.get_ident())


@functools.lru_cache(maxsize=8)
def _kept_open(path, *_):
    return _opened(path, header(path).kind, OVERVIEW_LEVEL="NONE")


@contextlib.contextmanager
def _gdal(path, env=ALONE):
    """GDAL's settings, and its errors in one line."""
    # GDAL's shortcut for whole PNGs does not notice that data is missing, and returns wrong pixels (version 3.10)
    with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO", **env):
        try:
            yield
        except (RasterioError, CPLE_BaseError):  # some functions pass on GDAL's own errors
            raise UserError(DAMAGED.format(path)) from None


def _opened(path, driver, **options):
    try:
        # an absolute name is neither a /vsi name nor a URL
        return rasterio.open(os.path.abspath(path), driver=driver, **options)
    except UnicodeEncodeError:
        raise UserError(f"{path}: its name or its folder's is no text; rename it") from None
    except (RasterioError, ValueError):  # ValueError: a damaged name of a coordinate system
        raise UserError(f"{path}: not a readable {driver}; replace or remove it") from None


def read(path, bands=None, *, window=None, shape=None, once=False):
    """-> tensor (C, H, W) in the file's own dtype, or in float32 where torch hardly computes in that dtype, and where
    pixels hold no data: these are NaN.

    bands: counted from 1, None: all. window: (row, column, height, width); of a GeoTIFF only the window is read.
    shape: (height, width) to reduce to by nearest pixels. once: no other window of the file is read soon, so that a PNG
    is decoded down to this one only. Raises UserError naming the file.
    """
    found = header(path)
    count, height, width = found.size
    y, x, h, w = window or (0, 0, height, width)
    every = list(range(1, count + 1))
    bands = list(bands or every)
    if max(bands) > count:
        raise UserError(f"{path}: has {count} bands, band {max(bands)} is asked for; leave it out, or see --bands")
    if len(bands) * math.prod(shape or (h, w)) > MAX_VALUES:
        raise UserError(f"{path}: {width} x {height} pixels are too many to read whole; cut it into tiles")
    opaque = None  # opacity or mask: 0 where a pixel holds no data
    planes = bands + [count] * (found.opacity and count not in bands)
    if in_windows(found) or once and found.kind == "PNG" and found.orientation == 1:
        with _open_for_windows(path) if window and not once else open_raster(path) as file:
            part = Window(x, y, w, h)
            image = file.read(planes, window=part, out_shape=shape and (len(planes), *shape))
            if found.mask == "inside":
                opaque = file.read_masks(1, window=part, out_shape=shape)
    else:
        image = (_decode_once if window else _decode)(path, os.stat(path).st_mtime_ns)
        if image.shape != (count, height, width):  # its header tells two sizes
            raise UserError(DAMAGED.format(path))
        image = image if planes == every else image[[band - 1 for band in planes]]  # which copies
        if window:
            image = image[:, y:y + h, x:x + w].copy()
        if shape:
            image = nearest(image, shape)
    if found.mask == "beside":
        opaque = read(f"{path}.msk", [1], window=window, shape=shape)[0].numpy()
    if len(planes) > len(bands):
        *image, opaque = image
        image = np.stack(image)
    return torch.from_numpy(_checked(path, image, [found.nodata[b - 1] for b in bands if found.nodata], opaque))


def in_windows(found):
    """Whether of a file with this Header parts can be read without the rest."""
    return found.kind == "GTiff" and found.orientation == 1


def strips(size):
    """The windows (row, column, height, width) in which an image of size (bands, height, width) is read in pieces. The
    size alone decides: every format is cut alike."""
    count, height, width = size
    step = max(1, STRIP // (count * width))
    return [(row, 0, min(step, height - row), width) for row in range(0, height, step)]


def void(image):
    """Image (..., C, H, W) -> bool (..., H, W): the pixels that hold no data in any band; None where all hold some."""
    if not image.is_floating_point():
        return None
    empty = image.isnan().all(-3)
    return empty if empty.any() else None


def digest(path):
    """-> 32 digits that are equal for equal pixels, as `read` gives them: equal in shape, dtype and every bit, whatever
    the format and the compression. Where pixels are indices, the colours count too. Of a JPEG beyond MAX_VALUES the
    bytes of the file count.

    All bands are read, in pieces (a PNG or JPEG as a whole), so memory does not grow with the scene. Raises UserError
    naming the file.
    """
    found = header(path)
    if found.kind == "JPEG" and math.prod(found.size) > MAX_VALUES:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    hashed = hashlib.blake2b(f"{found.size, found.dtype}".encode(), digest_size=16)
    whole = None if in_windows(found) else read(path)
    for window in strips(found.size):
        pixels = read(path, window=window) if whole is None else whole[:, window[0]:window[0] + window[2]]
        hashed.update(np.asarray(pixels).ravel().view(np.uint8))
    hashed.update(bytes(found.palette))
    return hashed.hexdigest()


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
        if rgb and found.palette and found.dtype == "uint8":
            palette = torch.tensor(found.palette, dtype=torch.uint8).reshape(256, 3)
            empty, colours = void(image), palette[image[0].nan_to_num().long()].permute(2, 0, 1)
            return colours if empty is None else colours.float().masked_fill(empty, math.nan)
        if len(image) == 1 and found.dtype == "uint8" and found.bits < 8:
            image = image * (255 // (2**found.bits - 1))
    return image.expand(3, -1, -1) if rgb and len(image) == 1 else image


def colour_bands(path):
    """The number of bands of a file, without the one that is its opacity."""
    return size(path)[0] - header(path).opacity


def check_bands(files, bands):
    """UserError for a file of which `read_picture` cannot give these bands."""
    for path in files:
        count = size(path)[0]
        if count < max(bands) and not (colour_bands(path) == 1 and list(bands) == [1, 2, 3]):
            raise UserError(f"{path}: has {count} bands, band {max(bands)} is asked for; leave it out, or train with "
                            f"other --bands")


def default_bands(files):
    """The bands of the first picture, from 1, without opacity. A JPEG counts as RGB, even a grey or CMYK one (see
    `read_picture`); so does a palette, and a grey image where another image has three bands."""
    first, count = header(files[0]), colour_bands(files[0])
    if first.kind == "JPEG" or first.palette or count == 1 and max(map(colour_bands, files)) >= 3:
        count = 3
    return list(range(1, count + 1))


def reduced(size, limit, side=max):
    """size (height, width) -> the same shape with the long side (side=min: the short side) at most `limit`."""
    factor = min(1, limit / side(size))
    return tuple(max(1, round(n * factor)) for n in size)


def thumbnail(path, bands, limit):
    """-> `read_picture` with the long side at most `limit` pixels, and the factor by which it is smaller."""
    full = size(path)[1:]
    shape = reduced(full, limit)
    return read_picture(path, bands, shape=shape), max(shape) / max(full)


def nearest(image, size):
    """(..., H, W), array or tensor -> `size`: for every new pixel the old one that lies at its centre."""
    rows, columns = ((np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(size, image.shape[-2:]))
    return image[..., rows[:, None], columns]


# ---- pixels ----------------------------------------------------------------------------------------------------------
def _decode(path, changed):
    """A whole file of a kind that has no windows, upright, as an array (C, H, W)."""
    found = header(path)
    if found.kind == "JPEG":
        return _decode_jpeg(path)
    if math.prod(found.size) > MAX_VALUES:
        raise UserError(f"{path}: {found.size[2]} x {found.size[1]} pixels are too many to read; cut it into tiles")
    if found.kind in GDAL_KINDS:
        with open_raster(path) as file:
            image = file.read()
    else:
        with _pillow(path, found.kind) as file:
            image = np.asarray(file if file.mode == "P" else file.convert(_mode(file.mode))).astype(np.uint8)
        image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    image = image.swapaxes(1, 2) if found.orientation > 4 else image
    return np.ascontiguousarray(np.flip(image, MIRRORED.get(found.orientation, ())))


def _decode_jpeg(path):
    """A JPEG as an array (C, H, W). One that lacks no more than its end marker is whole: then its pixels do not depend
    on what stands in place of the marker."""
    data, end = Path(path).read_bytes(), b"\xff\xd9"
    try:
        # Behind the start of the last scan, as thumbnails in the header have end markers of their own. Without one
        # torchvision would fill up with grey; Pillow does, but prints nothing
        if data.rfind(end) < data.rfind(b"\xff\xda"):
            whole, other = (np.asarray(Image.open(BytesIO(data + tail + end), formats=("JPEG",)))
                            for tail in (b"", b"Z" * 4096))
            if not np.array_equal(whole, other):
                raise RuntimeError("truncated")
            data += end
        from torchvision.io import ImageReadMode, decode_jpeg  # see read_headers
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(data, ImageReadMode.UNCHANGED, apply_exif_orientation=True).numpy()
    except (RuntimeError, OSError, SyntaxError, ValueError):
        raise UserError(DAMAGED.format(path)) from None


_decode_once = functools.lru_cache(maxsize=1)(_decode)  # for the windows of one large picture


def _checked(path, image, nodata, opaque):
    """The planes of a file -> an array (C, H, W) in a dtype that torch computes in, NaN where there is no data:
    where a plane has its value of `nodata`, and where `opaque` (H, W) is 0; None: nowhere."""
    if image.dtype.kind == "c":
        raise UserError(f"{path}: has complex pixels; save their amplitudes, or remove the file")
    # no pixel equals None
    empty = np.stack([plane == value for plane, value in zip(image, nodata)]) if nodata else np.zeros(1, bool)
    empty = empty if opaque is None else empty | (opaque == 0)
    if empty.any() or image.dtype not in (np.uint8, np.uint16, np.int16, np.int32, np.float32):
        image = np.where(empty, np.float32(np.nan), image.astype(np.float32))
    if image.dtype == np.float32 and np.isinf(image).any():
        raise UserError(f"{path}: has infinite pixels; declare them as no data (NaN), or remove the file")
    return image
