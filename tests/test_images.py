"""data/images.py: every format and depth gives the pixels that were written, and no file on Earth a traceback."""
import os
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import images
from tests.conftest import write_tif
from utils.errors import UserError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]])  # channels first


def save(path, array, **options):
    """(C, H, W) or (H, W) by Pillow."""
    Image.fromarray(array if array.ndim == 2 else array.transpose(1, 2, 0)).save(path, **options)
    return path


def png(path, depth, colour, rows, *, width, palette=b""):
    """A PNG written by hand, of the depths and sizes that Pillow does not write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows) if isinstance(rows, list) else rows, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows) if isinstance(rows, list) else b"\0")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"")
                     + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def same(tensor, array):
    """Equal values; uint16 has no == in torch."""
    np.testing.assert_array_equal(np.asarray(tensor), array)


# ---- what is read is what was written -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, read_as", [
    ("uint8", torch.uint8), ("int8", torch.float32), ("int16", torch.int16), ("uint16", torch.uint16),
    ("int32", torch.int32), ("uint32", torch.float32), ("float32", torch.float32), ("float64", torch.float32)])
@pytest.mark.parametrize("bands", [1, 4, 13])
def test_tiff_dtypes_and_band_counts(tmp_path, dtype, read_as, bands):
    rng = np.random.default_rng(bands)
    low, high = (-1000, 1000) if dtype.startswith("float") else (np.iinfo(dtype).min // 300, np.iinfo(dtype).max // 300)
    array = rng.uniform(low, high, (bands, 5, 9)).astype(dtype)
    path = write_tif(tmp_path / "a.tif", array)
    assert images.size(path) == (bands, 5, 9)
    image = images.read(path)
    assert image.dtype == read_as
    same(image, array.astype(np.float32) if read_as == torch.float32 else array)
    same(images.read(path, [bands, 1]), image.numpy()[[bands - 1, 0]])


def test_png_of_8_bits(tmp_path):
    for name, array in dict(grey=GREY[None], la=RGB[:2], rgb=RGB, rgba=np.concatenate((RGB, RGB[:1]))).items():
        path = save(tmp_path / f"{name}.png", array[0] if len(array) == 1 else array)
        assert images.size(path) == array.shape
        same(images.read(path), array)
    same(images.read(tmp_path / "rgba.png", [4, 2]), np.stack((GREY, RGB[1])))


def test_png_of_16_bits(tmp_path):
    grey = GREY.astype(np.uint16) * 257
    image = images.read(save(tmp_path / "grey.png", grey))
    assert image.dtype == torch.uint16
    same(image, grey[None])
    rows = [np.stack((row, row // 2, row // 3), -1).astype(">u2").tobytes() for row in grey]
    same(images.read(png(tmp_path / "rgb.png", 16, 2, rows, width=8)), np.stack((grey, grey // 2, grey // 3)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_with_a_palette_gives_its_indices(tmp_path, depth):
    """As masks in the style of Pascal VOC have them; torchvision gives packed bits and unset memory below 8 bits."""
    indices = np.arange(48).reshape(6, 8) % 2 ** depth
    rows = [np.packbits((row[:, None] >> np.arange(depth)[::-1] & 1).astype(bool)).tobytes() for row in indices]
    palette = bytes(np.random.default_rng(0).integers(0, 256, 3 * 2 ** depth, np.uint8))
    path = png(tmp_path / "a.png", depth, 3, rows, width=8, palette=palette)
    assert images.size(path) == (1, 6, 8)
    image = images.read(path)
    assert image.dtype == torch.uint8
    same(image, indices[None])


def test_png_of_one_bit_is_0_and_1(tmp_path):
    Image.fromarray(GREY > 99).save(tmp_path / "a.png")
    same(images.read(tmp_path / "a.png"), (GREY > 99)[None])


def test_jpeg(tmp_path):
    smooth = np.stack([np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) + 50 * c for c in range(3)])
    for name, array in dict(grey=smooth[:1], rgb=smooth).items():
        path = save(tmp_path / f"{name}.JPG", array[0] if len(array) == 1 else array, quality=95)
        assert images.size(path) == array.shape
        assert np.abs(images.read(path).numpy().astype(int) - array).mean() < 3


def test_cmyk_jpeg_keeps_its_four_bands_as_stored(tmp_path):
    cmyk = np.stack([np.full((16, 16), v, np.uint8) for v in (10, 80, 150, 220)])
    path = tmp_path / "a.jpg"
    Image.fromarray(cmyk.transpose(1, 2, 0), mode="CMYK").save(path, quality=98)
    assert images.size(path) == (4, 16, 16)
    image = images.read(path).numpy().astype(int)
    assert image.shape == (4, 16, 16)
    assert np.abs(image - (255 - cmyk.astype(int))).max() < 12  # Adobe's way: 255 is no ink


def test_exif_orientation_of_a_jpeg_is_applied(tmp_path):
    upright = np.kron(GREY, np.ones((8, 8), np.uint8))  # blocks, which JPEG keeps
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"{orientation}.jpg", np.ascontiguousarray(array), exif=exif)
        assert images.size(path) == (1, *upright.shape)
        image = images.read(path).numpy()[0].astype(int)
        assert np.abs(image - upright).max() < 12, orientation


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory):
    """A GeoTIFF and a PNG of the same pixels (3, 20, 30)."""
    folder = tmp_path_factory.mktemp("pictures")
    array = np.random.default_rng(0).integers(0, 256, (3, 20, 30), np.uint8)
    return array, write_tif(folder / "a.tif", array), save(folder / "b.png", array)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 19), st.integers(0, 29), st.data())
def test_windows_and_reduced_reads_are_slices_of_the_whole(picture_files, y, x, data):
    array, *paths = picture_files
    h, w = data.draw(st.integers(1, 20 - y)), data.draw(st.integers(1, 30 - x))
    bands = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    for path in paths:
        same(images.read(path, bands, window=(y, x, h, w)), array[[b - 1 for b in bands], y:y + h, x:x + w])
        reduced = images.read(path, bands, window=(y, x, h, w), shape=shape).numpy()
        assert reduced.shape == (len(bands), *shape)
        pixels = array[[b - 1 for b in bands], y:y + h, x:x + w].reshape(len(bands), -1).T.tolist()
        assert all(pixel in pixels for pixel in reduced.reshape(len(bands), -1).T.tolist())
    if shape == (h, w):
        same(images.read(paths[1], bands, window=(y, x, h, w), shape=shape), reduced)


# ---- digests: equal pixels ------------------------------------------------------------------------------------------
def test_a_digest_is_of_the_pixels_and_not_of_their_file(picture_files, tmp_path):
    array, *paths = picture_files
    paths += [write_tif(tmp_path / f"{i}.tif", array, **options) for i, options in enumerate((
        dict(compress="deflate"), dict(compress="lzw", predictor=2, interleave="band", crs="EPSG:4326"),
        dict(tiled=True, blockxsize=16, blockysize=16), dict(BIGTIFF="YES")))]
    assert len({images.digest(path) for path in paths}) == 1
    for spot in ((0, 0, 0), (2, 19, 29), (1, 10, 3)):
        other = array.copy()
        other[spot] ^= 1
        path = write_tif(tmp_path / "x.tif", other)
        assert images.digest(path) != images.digest(paths[0])
    tall = array[0].reshape(30, 20)
    same_bytes = [array[0], tall, *(tall.view(dtype) for dtype in ("int16", "uint16", "uint32", "int32", "float32"))]
    found = {images.digest(write_tif(tmp_path / f"same{i}.tif", each)) for i, each in enumerate(same_bytes)}
    assert len(found) == len(same_bytes)


def test_a_digest_in_pieces(tmp_path, monkeypatch):
    """Pieces are cut alike in every format, and a scene that cannot be read whole has a digest."""
    array = np.random.default_rng(0).integers(0, 256, (3, 70, 50), np.uint8)
    smooth = np.add.outer(np.arange(70), np.arange(50)).astype(np.uint8)[None].repeat(3, 0)
    jpeg = save(tmp_path / "a.jpg", smooth)
    decoded = images.read(jpeg).numpy()
    monkeypatch.setattr(images, "STRIP", 3 * 50 * 20)
    wanted, by_jpeg = images.digest(write_tif(tmp_path / "a.tif", array)), images.digest(jpeg)
    assert images.digest(save(tmp_path / "png", decoded, format="PNG")) == by_jpeg
    for values in (1, 3 * 50 * 7, 3 * 50 * 69):
        monkeypatch.setattr(images, "STRIP", values)
        assert images.digest(tmp_path / "a.tif") == images.digest(save(tmp_path / "a.png", array))
        assert images.digest(tmp_path / "png") == images.digest(jpeg)
    monkeypatch.setattr(images, "STRIP", 3 * 50 * 20)
    monkeypatch.setattr(images, "MAX_VALUES", array.size - 1)
    for path in (tmp_path / "a.tif", write_tif(tmp_path / "b.tif", array, tiled=True, blockxsize=16, blockysize=16)):
        refused(path, "too many", bands=None)
        assert images.digest(path) == wanted
    with pytest.raises(UserError, match="too many"):  # a PNG has no windows
        images.digest(save(tmp_path / "new.png", array))


def test_whole_divisors_reduce_to_the_same_grid(picture_files):
    array, *paths = picture_files
    for path in paths:
        reduced = images.read(path, shape=(10, 10)).numpy()
        blocks = array.reshape(3, 10, 2, 10, 3).transpose(0, 1, 3, 2, 4).reshape(3, 10, 10, 6)
        assert (blocks == reduced[..., None]).any(-1).all()  # every pixel is one of its own block


def test_the_caller_owns_what_was_read(picture_files):
    for path in picture_files[1:]:
        images.read(path).zero_()
        same(images.read(path), picture_files[0])


def test_a_changed_file_is_read_again(tmp_path):
    path = save(tmp_path / "a.png", GREY)
    same(images.read(path, window=(0, 0, 3, 3)), GREY[None, :3, :3])
    save(path, 255 - GREY)
    os.utime(path, ns=(1, 1))
    same(images.read(path), 255 - GREY[None])
    same(images.read(path, window=(0, 0, 3, 3)), 255 - GREY[None, :3, :3])


def test_a_file_stays_open_between_its_windows(tmp_path, monkeypatch):
    """In every process one of its own: a forked one shares the place in the file."""
    opened, real = [], rasterio.open
    monkeypatch.setattr(images.rasterio, "open", lambda path, *args, **options: opened.append(path) or real(
        path, *args, **options))
    pixels = np.random.default_rng(0).integers(0, 9999, (3, 64, 80), np.uint16)
    path = write_tif(tmp_path / "a.tif", pixels, compress="deflate")
    images.header(path)
    opened.clear()
    for y, x in ((0, 0), (16, 40), (40, 48)):
        same(images.read(path, window=(y, x, 24, 32)), pixels[:, y:y + 24, x:x + 32])
    assert len(opened) == 1
    child = os.fork()
    if not child:
        images.read(path, window=(0, 0, 8, 8))
        os._exit(len(opened))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    write_tif(path, pixels + 1)
    os.utime(path, ns=(1, 1))
    same(images.read(path, window=(0, 0, 8, 8)), pixels[:, :8, :8] + 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="a.tif: "):
        images.read(path, window=(0, 0, 8, 8))


def test_the_first_bytes_tell_the_kind_not_the_name(tmp_path):
    smooth = np.full((8, 8), 77, np.uint8)
    for format in ("PNG", "JPEG", "TIFF"):
        for suffix in images.SUFFIXES:
            Image.fromarray(smooth).save(tmp_path / f"a{suffix}", format=format)
            same(images.read(tmp_path / f"a{suffix}"), smooth[None])


def test_find_takes_images_only_and_sorts(tmp_path):
    for name in ("b.TIF", "a.tiff", "d.PNG", "c.jpeg", "e.jpg", "f.txt", "g.tif.aux.xml", "h"):
        (tmp_path / name).write_text("")
    assert [p.name for p in images.find(tmp_path)] == ["a.tiff", "b.TIF", "c.jpeg", "d.PNG", "e.jpg"]


# ---- what cannot be read --------------------------------------------------------------------------------------------
def refused(path, words="", **options):
    """Reading raises a UserError of one line that names the file; in time."""
    began = time.monotonic()
    for function in (images.read, images.size) if not options else (images.read,):
        with pytest.raises(UserError) as caught:
            function(path, **options)
            if function is images.size:
                images.read(path)
        text = str(caught.value)
        assert str(path) in text and "\n" not in text and ";" in text and words in text, text
    assert time.monotonic() - began < 5


def test_pixels_without_a_number(tmp_path):
    array = np.ones((2, 4, 4), np.float32)
    for value in (np.inf, -np.inf):
        array[1, 2, 3] = value
        refused(write_tif(tmp_path / "a.tif", array), "infinite", bands=None, window=None)
        same(images.read(tmp_path / "a.tif", [1]), array[:1])
    refused(write_tif(tmp_path / "b.tif", np.full((1, 4, 4), 3 + 4j, np.complex64)), "complex", shape=None)


def test_bands_that_are_not_there(tmp_path):
    for path in (write_tif(tmp_path / "a.tif", RGB), save(tmp_path / "a.png", RGB)):
        refused(path, "has 3 bands, band 4", bands=[1, 4])


def test_unreadable_things(tmp_path):
    for suffix in ("tif", "png", "jpg"):
        def new(name):
            return tmp_path / f"{name}.{suffix}"
        new("empty").write_text("")
        new("folder").mkdir()
        os.mkfifo(new("fifo"))
        new("loop").symlink_to(new("loop"))
        new("dangling").symlink_to("nowhere")
        new("zero").symlink_to("/dev/zero")
        new("text").write_text("name,group\n" * 100)
        Image.fromarray(GREY).save(new("ppm"), format="PPM")
        new("random").write_bytes(np.random.default_rng(0).bytes(5000))
        for path in tmp_path.glob(f"*.{suffix}"):
            refused(path)
        refused(new("x" * 300))
        refused(new("missing"))


VRT = """<VRTDataset rasterXSize="4" rasterYSize="3"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename>{}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"""


def test_a_vrt_does_not_open_what_it_points_to(tmp_path):
    secret = write_tif(tmp_path / "secret.tif", RGB)
    (tmp_path / "a.tif").write_text(VRT.format(secret))
    with rasterio.open(tmp_path / "a.tif") as vrt:  # without our guard it does
        same(vrt.read(1), RGB[0, :3, :4])
    refused(tmp_path / "a.tif", "not a .tif")


@pytest.fixture
def listener():
    """(port, calls): a server on this machine that counts who connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls = []

        def answer():
            while True:
                try:
                    calls.append(server.accept()[0].close())
                except OSError:
                    return
        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1], calls


def test_names_of_networks_and_archives_are_no_files(tmp_path, monkeypatch, listener):
    monkeypatch.chdir(tmp_path)
    write_tif(tmp_path / "x.tif", RGB)
    port, calls = listener
    for name in (f"/vsicurl/http://127.0.0.1:{port}/x.tif", f"http://127.0.0.1:{port}/x.tif", "/vsizip/x.zip/x.tif",
                 f"/vsizip//vsicurl/http://127.0.0.1:{port}/x.zip/x.tif", "zip://x.zip!x.tif", "GTIFF_DIR:1:x.tif",
                 f"/vsicurl/http://127.0.0.1:{port}/x.png", "s3://bucket/x.tif", "/vsistdin/x.tif", "/vsimem/x.tif"):
        refused(name)
    assert not calls
    with pytest.raises(rasterio.errors.RasterioIOError):
        rasterio.open(f"/vsicurl/http://127.0.0.1:{port}/x.tif")
    assert calls  # the listener does hear


def test_overviews_do_not_lead_to_other_files_or_the_network(tmp_path, listener):
    """A reduced read would take GDAL's overviews, which a neighbouring file or a tag can place anywhere."""
    port, calls = listener
    away = f"/vsicurl/http://127.0.0.1:{port}/x.tif"
    secret = write_tif(tmp_path / "secret.tif", np.full((1, 6, 8), 77, np.uint8))

    def safe(path):
        assert (images.read(path, shape=(3, 4)) != 77).all()
        assert (images.read(path, window=(0, 0, 6, 8), shape=(3, 4)) != 77).all()
        images.read(path)
        images.size(path)
        assert not calls

    for i, target in enumerate((secret, away)):
        path = write_tif(tmp_path / f"ovr{i}.tif", GREY)
        (tmp_path / f"ovr{i}.tif.ovr").write_text(VRT.format(target))
        safe(path)
        path = write_tif(tmp_path / f"aux{i}.tif", GREY)
        (tmp_path / f"aux{i}.tif.aux.xml").write_text(
            f'<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{target}</MDI></Metadata></PAMDataset>')
        safe(path)
        path = write_tif(tmp_path / f"tag{i}.tif", GREY)
        with rasterio.open(path, "r+") as file:
            file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(target))
        safe(path)
    with rasterio.open(tmp_path / "ovr1.tif") as file, pytest.raises(rasterio.errors.RasterioIOError):
        file.read(out_shape=(1, 3, 4))
    assert calls  # without our guard


def claim(path, width, height, samples=1):
    """A TIFF header that claims a size, with a hundred bytes of pixels."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, samples), (278, height),
               (279, 100)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes((b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0\0\0\0").ljust(400, b"\1"))
    return path


def test_claims_of_hugeness(tmp_path):
    refused(claim(tmp_path / "a.tif", 2_000_000_000, 2_000_000_000), "2000000000 x 2000000000")
    with pytest.raises(UserError, match="claims to be"):  # a window of it would be read, and a mask of its size made
        images.header(tmp_path / "a.tif")
    refused(claim(tmp_path / "a.tif", 2_000_000_000, 2_000_000_000), window=(0, 0, 8, 8))
    for size in ((60_000, 60_000, 1), (2_000_000_000, 1, 1), (16_000, 16_000, 60_000)):
        refused(claim(tmp_path / "b.tif", *size), bands=None, shape=None)
    for side in (2**31 - 1, 2_000_000_000, 100_000):
        refused(png(tmp_path / "a.png", 8, 0, side, width=side), bands=None, shape=None)
        refused(tmp_path / "a.png", window=(0, 0, 8, 8))
    sides = dict(height=50_000, width=50_000, blockxsize=4096, blockysize=4096)
    with rasterio.open(tmp_path / "sparse.tif", "w", driver="GTiff", count=1, dtype="uint8", SPARSE_OK=True, tiled=True,
                       **sides):
        pass
    refused(tmp_path / "sparse.tif", "50000 x 50000", bands=None, shape=None)
    same(images.read(tmp_path / "sparse.tif", window=(40_000, 3, 2, 2)), np.zeros((1, 2, 2)))


def noise_files(folder):
    """A file of every kind, 3 x 40 x 40 pixels of noise, -> {path: what reading gives}."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = folder / "palette.png"
    Image.fromarray(noise[0] % 3).convert("P").save(palette)
    paths = [write_tif(folder / "plain.tif", noise), save(folder / "a.png", noise), palette,
             write_tif(folder / "deflate.tif", noise.astype(np.uint16), compress="deflate", predictor=2),
             write_tif(folder / "lzw.tif", noise, compress="lzw", tiled=True, blockxsize=16, blockysize=16),
             save(folder / "b.png", noise[0].astype(np.uint16) * 200),
             save(folder / "a.jpg", noise, exif=exif), save(folder / "b.jpg", noise, progressive=True)]
    return {path: images.read(path).numpy() for path in paths}


def test_truncated_files_are_refused(tmp_path):
    for path in noise_files(tmp_path):
        original = path.read_bytes()
        for part in (0.001, 0.01, 0.2, 0.5, 0.9, 0.95):
            path.write_bytes(original[:int(part * len(original))])
            refused(path)
            with pytest.raises(UserError, match=path.name):
                images.digest(path)


def test_mutated_files_give_an_image_or_a_usererror(tmp_path):
    """With flipped bits, 100 times each: an image or one line, ever; and PNG has checksums."""
    rng = np.random.default_rng(0)
    outcomes = {}
    for path, pixels in noise_files(tmp_path).items():
        original = path.read_bytes()
        for i in range(100):
            data = bytearray(original)
            for spot in rng.integers(min(len(data), 300) if i % 2 else len(data), size=rng.integers(1, 6)):
                data[spot] ^= 1 << rng.integers(8)  # every other time in the header
            path.write_bytes(data)
            began = time.monotonic()
            try:
                shape = images.size(path)
                image = images.read(path)
                assert image.shape == shape and len(images.digest(path)) == 32
                if path.suffix == ".png":
                    same(image, pixels)
                result = "read"
            except UserError as error:
                assert path.name in str(error) and "\n" not in str(error)
                result = "refused"
            assert time.monotonic() - began < 5, i
            outcomes.setdefault((path.suffix, result), []).append(i)
    assert min(map(len, outcomes.values())) > 0 and len(outcomes[".jpg", "read"]) > 20 < len(outcomes[".tif", "read"])


def test_a_damaged_name_of_a_coordinate_system(tmp_path):
    path = write_tif(tmp_path / "a.tif", GREY, crs='LOCAL_CS["a name of its own",UNIT["metre",1]]')
    data = path.read_bytes()
    assert b"a name of its own" in data
    path.write_bytes(data.replace(b"a name of its own", b"a \xdb\xb8\xe8\xff of its own"))
    refused(path)


@pytest.mark.parametrize("size", [(5, 9), (64, 40), (17, 23), (1, 1)])
def test_nearest_takes_the_pixel_at_the_centre(size):
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (17, 23)).astype(np.uint8))
    wanted = torch.nn.functional.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0]
    assert images.nearest(mask, size).dtype == torch.uint8 and (images.nearest(mask, size) == wanted).all()


@pytest.mark.parametrize("error", [IndexError, struct.error, KeyError, OverflowError])
def test_whatever_pillow_raises_for_a_damaged_file(tmp_path, monkeypatch, error):
    path, other = save(tmp_path / "a.gif", GREY), save(tmp_path / "b.gif", GREY)
    images.header(other)

    def fails(*args, **kwargs):
        raise error("index out of range")
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(UserError, match="a.gif: not a readable GIF"):
        images.header(path)
    with pytest.raises(UserError, match="b.gif: not a readable GIF"):
        images.read(other)
