"""The masks of segmentation as GeoTIFFs, with pictures, polygons, labels to train on and y_pred.pkl made of them.

    OUT/masks/NAME.tif   OUT/overlays/NAME.png   OUT/polygons/NAME.geojson   OUT/y_pred.pkl
    OUT/pseudo/train_mask/NAME.tif   OUT/pseudo/train_img/NAME.tif (a link)

Masks are written piece by piece, so that memory does not grow with the image, except by `write_parts`.
"""
import contextlib
import json
import math
import pickle

import numpy as np
import rasterio
from PIL import Image
from rasterio import features
from rasterio.transform import from_gcps
from rasterio.windows import Window

from data import bad, images
from data.results import pseudo
from data.results.pseudo import UNSURE
from utils.files import whole_file, write_json_list
from utils.pictures import sheets

PSEUDO = "pseudo/train_mask"
MAX_PICKLED = 2**26, 2**32  # pixels in y_pred.pkl, which must fit into memory: of one image, of all


class MaskWriter:
    """Writes the masks of image files into the folder `out`. Raises UserError when a file cannot be written.

    overlays: the bands (from 1) to show under the mask in a picture, None: no pictures. polygons: whether the outlines
    are written as GeoJSON. pseudo: whether masks of pseudo labels are written too.

    A piece of an image is (row, column, class map (h, w) uint8), and with `pseudo` as a fourth the labels (h, w) uint8.
    """

    def __init__(self, out, *, overlays=None, polygons=False, pseudo=False):
        self.out, self.overlays, self.polygons = out, overlays, polygons
        self.blank = {"masks": 0} | ({PSEUDO: UNSURE} if pseudo else {})

    def write(self, file, pieces):
        """Writes an image's files from pieces that cover it."""
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(_new_mask(file, self.out / folder, nodata=blank or None))
                       for folder, blank in self.blank.items()]
            for y, x, *maps in pieces:
                for target, values in zip(targets, maps):
                    target.write(values, 1, window=Window(x, y, *values.shape[::-1]))
        with _open_mask(file, self.out) as mask:
            if self.overlays:
                image, _ = images.thumbnail(file, self.overlays, 1024)
                shown = sheets.overlay(sheets.to_rgb(image), mask.read(1, out_shape=image.shape[1:]))
                sheets.save_image(self.out / "overlays" / f"{file.stem}.png", Image.fromarray(shown))
            if self.polygons:
                write_polygons(self.out / "polygons" / f"{file.stem}.geojson", mask)

    def write_parts(self, file, pieces):
        """Writes an image's files from pieces that need not cover it, whose masks are held in memory. The other pixels
        are 0 in the mask and UNSURE in the labels. Where pieces overlap, the last one holds that is neither; where the
        mask has an object, the labels have the same or UNSURE."""
        maps = [np.full(images.size(file)[1:], value, np.uint8) for value in self.blank.values()]
        for y, x, *parts in pieces:
            for whole, part, blank in zip(maps, parts, self.blank.values()):
                np.copyto(whole[y:y + part.shape[0], x:x + part.shape[1]], part, where=part != blank)
        mask, *labels = maps
        for label in labels:
            label[(mask > 0) & (label != mask)] = UNSURE
        self.write(file, [(0, 0, *maps)])

    def finish(self, files, failed=()):
        """Writes the files that need all masks: y_pred.pkl of the wildfire competition, a pickle of
        {file name: uint8 mask (H, W)} without large scenes, and the links to the images of pseudo labels.

        failed: those of the files that have no mask. In y_pred.pkl it is empty, if the header tells its size."""
        sizes = {file: size[1:] for file in files if (size := bad.attempt(images.size, file)[0])}
        small = {file: size for file, size in sizes.items() if math.prod(size) <= MAX_PICKLED[0]}
        if len(small) < len(sizes):
            print(f"{len(sizes) - len(small)} scenes are too large for y_pred.pkl; their masks are in "
                  f"{self.out / 'masks'}")
        if sum(map(math.prod, small.values())) > MAX_PICKLED[1]:
            print(f"no y_pred.pkl: it would hold more than 2^32 pixels; the masks are in {self.out / 'masks'}")
        else:
            with whole_file(self.out / "y_pred.pkl") as temporary, open(temporary, "wb") as target:
                pickler = pickle.Pickler(target)
                pickler.fast = True  # it does not hold what it has written
                pickler.dump(_Streamed((file.name, self._mask(file, size, failed)) for file, size in small.items()))
        if PSEUDO in self.blank:
            pseudo.link(sizes.keys() - set(failed), self.out / "pseudo/train_img")


    def _mask(self, file, size, failed):
        if file in failed:
            return np.zeros(size, np.uint8)
        with _open_mask(file, self.out) as mask:
            return mask.read(1)


class _Streamed:
    """Pairs that are pickled as a dict, one after the other."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __reduce__(self):
        return dict, (), None, None, self.pairs


@contextlib.contextmanager
def _new_mask(file, folder, nodata):
    """The mask of an image file, open for writing, at the place on Earth of the image (if that has one)."""
    _, height, width = images.size(file)
    place = {"nodata": nodata}
    if images.header(file).kind in images.GDAL_KINDS and images.header(file).orientation == 1:
        with images.open_raster(file, sidecars=True) as source:
            points, crs = source.gcps  # such as Sentinel-1's
            place |= {"gcps": points, "crs": crs} if points else {"crs": source.crs, "transform": source.transform}
            place["rpcs"] = source.rpcs
    with whole_file(folder / f"{file.stem}.tif") as temporary:
        with rasterio.open(temporary, "w", driver="GTiff", dtype="uint8", count=1, height=height, width=width,
                           compress="deflate", tiled=max(height, width) > 1024, BIGTIFF="IF_SAFER", **place) as mask:
            yield mask
        rasterio.open(temporary, driver="GTiff").close()  # GDAL does not raise when the disk is full


def _open_mask(file, out):
    return rasterio.open(out / "masks" / f"{file.stem}.tif", driver="GTiff")


def write_polygons(path, mask):
    """Writes the outlines of an open mask's classes as GeoJSON, in the mask's coordinates. Ground control points are
    approximated by an affine transform. Without a coordinate system the coordinates are the mask's, and "crs" is null.
    Rings run as RFC 7946 wants it: outer ones counter-clockwise."""
    points, crs = mask.gcps
    transform, crs = (from_gcps(points), crs) if points else (mask.transform, mask.crs)
    source = mask.read(1) if points else rasterio.band(mask, 1)  # a band's outlines are in its own coordinates
    # GeoJSON's own default is WGS 84
    collection = {"type": "FeatureCollection", "name": path.stem,
                  "crs": {"type": "name", "properties": {"name": crs.to_string()}} if crs else None, "features": []}
    outlines = ([{"type": "Feature", "properties": {"class": int(value)}, "geometry": shape | {"coordinates": [
        ring if (_area(ring) > 0) == (i == 0) else ring[::-1] for i, ring in enumerate(shape["coordinates"])]}}]
        for shape, value in features.shapes(source, transform=transform) if value > 0)
    write_json_list(path, outlines, json.dumps(collection).removesuffix("]}"), "]}")


def _area(ring):
    """Twice the area in a ring [(x, y), ...], positive if it runs counter-clockwise."""
    x, y = np.array(ring).T
    return x[:-1] @ y[1:] - x[1:] @ y[:-1]
