"""nets/pretrained.py: timm's and torchvision's nets as oracles, the safetensors package, and hostile files."""
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from urllib.error import HTTPError, URLError

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models._manipulate import adapt_input_conv

from nets import pretrained
from nets.efficientnet import EfficientNetV2
from nets.regnet import VARIANTS, RegNetX
from nets.unet import UNet
from nets.yolo import VARIANTS as YOLOV5
from nets.yolo import YOLOv5
from tests.test_nets import assert_equal, with_statistics, randn
from tests.test_weights import foreign

HEAD = {"head.fc.weight", "head.fc.bias"}


def save(path, state):
    torch.save(state, path)
    return str(path)


def one_line(error, *words):
    """Checks that the message is one line that contains every word."""
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture(scope="module")
def theirs():
    return with_statistics(timm.create_model("regnetx_002")).eval()


def small_unet(**options):
    return UNet(decoder=(8, 8, 8, 8), **options)


# ---- the right weights in the right places --------------------------------------------------------------------------

def test_timm_net(theirs, tmp_path):
    ours, x = RegNetX().eval(), randn(2, 3, 65, 97)
    report = pretrained.load(ours, save(tmp_path / "timm.pth", theirs.state_dict()))
    assert report == {"loaded": list(ours.state_dict()), "adapted": [], "unused": [], "missing": [], "sha256": None}
    with torch.no_grad():
        assert_equal(ours(x), theirs(x))


def test_torchvision_net(tmp_path):
    theirs = with_statistics(torchvision.models.regnet_x_400mf(weights=None)).eval()
    ours, x = RegNetX(variant="regnetx_004_tv").eval(), randn(2, 3, 65, 97)
    report = pretrained.load(ours, save(tmp_path / "tv.pth", theirs.state_dict()))
    assert set(report["loaded"]) == set(ours.state_dict()) and not report["unused"] + report["missing"]
    with torch.no_grad():
        assert_equal(ours(x), theirs(x))


@pytest.mark.parametrize("theirs, ours", [("regnet_x_400mf", "regnetx_004_tv"), ("regnet_x_800mf", "regnetx_008"),
                                          ("regnet_x_1_6gf", "regnetx_016"), ("regnet_x_3_2gf", "regnetx_032")])
def test_every_torchvision_name_is_converted(theirs, ours):
    state, target = getattr(torchvision.models, theirs)(weights=None).state_dict(), RegNetX(variant=ours).state_dict()
    renamed = pretrained.to_timm_names(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in target.items()}


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 14, 32])
def test_encoder_of_a_unet_and_its_stem(bands, theirs, tmp_path):
    """The stem is adapted as in timm, other encoder tensors are timm's, the decoder stays, and the report says so."""
    conv0 = (32, 32) if bands == 32 else ()
    net = small_unet(in_chans=bands, conv0=conv0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = pretrained.load(net, save(tmp_path / "timm.pth", theirs.state_dict()))
    after, source = net.state_dict(), theirs.state_dict()
    stem = adapt_input_conv(bands, source["stem.conv.weight"].clone())
    assert torch.allclose(after["encoder.stem.conv.weight"], stem, rtol=1e-6, atol=0)
    for name, tensor in after.items():
        if name.startswith("encoder.") and name != "encoder.stem.conv.weight":
            assert torch.equal(tensor, source[name.removeprefix("encoder.")]), name
        elif not name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    assert report["loaded"] == ["encoder." + k for k in source if k not in HEAD]
    assert report["adapted"] == (["encoder.stem.conv.weight"] if bands != 3 else [])
    assert set(report["unused"]) == HEAD
    assert report["missing"] == [k for k in after if not k.startswith("encoder.")]


def test_grey_gives_what_it_gave_as_rgb(theirs, tmp_path):
    net, x = RegNetX(1).eval(), randn(1, 1, 64, 64)
    pretrained.load(net, save(tmp_path / "timm.pth", theirs.state_dict()))
    with torch.no_grad():
        assert_equal(net(x), theirs(x.expand(-1, 3, -1, -1)))


def test_another_head_is_left_out(theirs, tmp_path):
    net = RegNetX(num_classes=26)
    before = net.head.fc.weight.clone()
    report = pretrained.load(net, save(tmp_path / "timm.pth", theirs.state_dict()))
    assert set(report["unused"]) == set(report["missing"]) == HEAD
    assert torch.equal(net.head.fc.weight, before)


def test_own_unet_with_other_bands_and_classes(tmp_path):
    old, new = with_statistics(small_unet(in_chans=14)), small_unet(in_chans=10, classes=3)
    report = pretrained.load(new, save(tmp_path / "unet.pth", old.state_dict()))
    assert report["adapted"] == ["conv0.0.weight"]
    assert report["unused"] == report["missing"] == ["head.weight", "head.bias"]
    assert torch.equal(new.encoder.s4.b7.conv3.conv.weight, old.encoder.s4.b7.conv3.conv.weight)
    assert torch.equal(new.decoder[3].conv2.bn.running_var, old.decoder[3].conv2.bn.running_var)
    flat = [net.conv0[0].weight.sum(1).squeeze() for net in (old, new)]
    assert flat[0].std() > 0 and new.conv0[0].weight.shape[1] == 10
    assert torch.allclose(new.conv0[0].weight, old.conv0[0].weight[:, :10] * 1.4)


def test_only_what_was_loaded_is_called_adapted(tmp_path):
    """The first convolution has other bands and another width: it cannot be adapted."""
    path = save(tmp_path / "unet.pth", small_unet(in_chans=14).state_dict())
    report = pretrained.load(small_unet(in_chans=10, conv0=(16, 32)), path)
    assert report["adapted"] == [] and "conv0.0.weight" in report["unused"] and "conv0.0.weight" in report["missing"]


def test_half_precision_weights(theirs, tmp_path):
    net = RegNetX()
    pretrained.load(net, save(tmp_path / "half.pth", {k: v.half() if v.is_floating_point() else v
                                                      for k, v in theirs.state_dict().items()}))
    assert net.stem.conv.weight.dtype == torch.float32
    assert torch.equal(net.s4.b7.conv1.conv.weight, theirs.s4.b7.conv1.conv.weight.half().float())


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_unwrap(key, prefix):
    state = {"stem.conv.weight": torch.ones(2), "head.module.bias": torch.ones(1)}
    wrapped = {key: {prefix + k: v for k, v in state.items()}, "epoch": 3, "optimizer": {"state": {}}, "lr": 0.1}
    assert list(pretrained.unwrap(wrapped)) == list(state)
    assert list(pretrained.unwrap({prefix + k: v for k, v in state.items()})) == list(state)


def test_unwrap_prefers_the_average():
    raw, average = {"w": torch.zeros(1)}, {"module.w": torch.ones(1), "n_averaged": torch.tensor(4)}
    for keys in (("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")):
        assert pretrained.unwrap(dict(zip(keys, (raw, average))))["w"] == 1
    assert pretrained.unwrap({"model": raw, "ema": None})["w"] == 0


def test_describe(theirs, tmp_path):
    text = pretrained.describe(pretrained.load(small_unet(), save(tmp_path / "timm.pth", theirs.state_dict())))
    assert text == ("weights: 264 tensors loaded, 1 adapted to the input bands, not used: 2 (head), "
                    "left as initialised: 54 (conv0, decoder, head)")


# ---- wrong, damaged and hostile files -------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", ["resnet18", "regnetx_004", "regnety_002", "torchvision"])
def test_weights_of_another_net(wrong, tmp_path):
    source = torchvision.models.regnet_y_400mf(weights=None) if wrong == "torchvision" else timm.create_model(wrong)
    path = save(tmp_path / "wrong.pth", source.state_dict())
    for net in (RegNetX(), small_unet(), RegNetX(variant="regnetx_004_tv")):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(ValueError) as error:
            pretrained.load(net, path)
        one_line(error, path, "no match", "choose")
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("content", [{}, {"weights": {"stem.conv.weight": torch.ones(32, 3, 3, 3)}}, {"epoch": 3},
                                     {0: torch.ones(3)}, {"stem.conv.weight": torch.ones(())},
                                     {"stem.conv.weight": torch.ones(32, 3, 3, 3)}], ids=range(6))
def test_no_weights_in_the_file(content, tmp_path):
    with pytest.raises(ValueError) as error:
        pretrained.load(RegNetX(), save(tmp_path / "w.pth", content))
    one_line(error, "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_weights(value, theirs, tmp_path):
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    state["s3.b2.conv1.bn.running_var"][7] = value
    net = RegNetX()
    before = net.stem.conv.weight.clone()
    with pytest.raises(ValueError) as error:
        pretrained.load(net, save(tmp_path / "nan.pth", state))
    one_line(error, "nan.pth", "s3.b2.conv1.bn.running_var", "not finite")
    assert torch.equal(net.stem.conv.weight, before)


class Trap:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_hostile_pickles_are_refused_unopened(tmp_path):
    marker = tmp_path / "executed"
    trap = Trap(marker)
    plain = pickle.dumps({"state_dict": trap})
    buffer = io.BytesIO()
    torch.save({"stem.conv.weight": torch.ones(2), "x": trap}, buffer)
    pickle.loads(plain)
    assert marker.is_dir()  # the trap works
    marker.rmdir()
    module = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), module)
    for data in (plain, buffer.getvalue(), module.getvalue(), pickle.dumps(trap, protocol=0)):
        for name in ("evil.pth", "evil.pt", "evil.bin", "evil.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError) as error:
                pretrained.load(RegNetX(), str(tmp_path / name))
            one_line(error, name)
            assert not marker.exists()


def test_truncated_and_foreign_files(theirs, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({k: v for k, v in theirs.state_dict().items() if "s1" in k}, path)
    whole = path.read_bytes()
    rest = [whole[:n] for n in (0, 1, 10, len(whole) // 2, len(whole) - 100, len(whole) - 1)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no weights")
    for data in (*rest, archive.getvalue(), b"<!DOCTYPE html>\n<html>404</html>\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            pretrained.load(RegNetX(), str(path))
        one_line(error, "cut.pth")
    for content in ([torch.ones(2)], torch.ones(2), 3):
        with pytest.raises(ValueError) as error:
            pretrained.load(RegNetX(), save(path, content))
        one_line(error, "cut.pth", type(content).__name__)


def test_no_such_file(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(OSError) as error:
            pretrained.load(RegNetX(), str(path))
        one_line(error, str(path), "timm:regnetx_002")


# ---- safetensors ----------------------------------------------------------------------------------------------------

def tensors():
    g = torch.Generator().manual_seed(0)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    state = {str(d): torch.randn(3, 5, generator=g).to(d) for d in floats}
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    state |= {str(d): torch.randint(100, (2, 3, 2), generator=g).to(d) - 50 for d in integers}
    state["bool"] = torch.tensor([True, False, True])
    state |= {f"scalar {d}": torch.tensor(3).to(d) for d in (*floats, *integers)}
    state |= {"empty": torch.zeros(0), "empty rows": torch.zeros(0, 4), "empty columns": torch.zeros(3, 0).short()}
    state["not numbers"] = torch.tensor([float("nan"), float("inf"), -0.0])
    state["名前 \"quoted\" \\"] = torch.ones(1, dtype=torch.float16)
    return state


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": "ü"}])
def test_safetensors_reads_as_the_package(metadata, tmp_path):
    path = str(tmp_path / "all.safetensors")
    safetensors.torch.save_file(tensors(), path, metadata)
    ours, theirs = pretrained.read(path), safetensors.torch.load_file(path)
    assert set(ours) == set(theirs) == set(tensors())
    for name, a in ours.items():
        b = theirs[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert safetensors.torch.save({"": a}) == safetensors.torch.save({"": b}), name  # bytes: NaN != NaN


def test_safetensors_into_a_net(theirs, tmp_path):
    path, net = str(tmp_path / "w.safetensors"), RegNetX().eval()
    safetensors.torch.save_file(theirs.state_dict(), path)
    assert not pretrained.load(net, path)["missing"]
    with torch.no_grad():
        assert_equal(net(randn(1, 3, 64, 64)), theirs(randn(1, 3, 64, 64)))


def packed(header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = {
    "header beyond the file": (10 ** 6).to_bytes(8, "little") + b"{}", "header beyond memory": b"\xff" * 8 + b"{}",
    "not json": packed(b"{not json"), "not text": packed(b"\xff\xfe{}"), "a list": packed([1, 2]),
    "null": packed(b"null"), "endless nesting": packed(b"[" * 100_000), "entry is a number": packed({"w": 3}),
    "no dtype": packed({"w": {"shape": [4], "data_offsets": [0, 16]}}), "dtype unknown": packed(entry(dtype="F33")),
    "dtype a list": packed(entry(dtype=["F32"])), "shape too large": packed(entry(shape=(3, 2))),
    "shape too small": packed(entry(shape=(1, 2))), "shape of text": packed(entry(shape="22")),
    "offsets beyond": packed(entry(offsets=(4, 20))),
    "offsets before": packed(entry(offsets=(-16, 0))), "offsets reversed": packed(entry(offsets=(16, 0))),
    "offsets of text": packed(entry(offsets="ab")), "three offsets": packed(entry(offsets=(0, 8, 16))),
    "fractional offsets": packed(entry(offsets=(0.0, 16.0))), "odd bytes": packed(entry(shape=(3,), offsets=(0, 15))),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_safetensors(name, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(packed(entry()))
    assert pretrained.read(str(path))["w"].shape == (2, 2)  # the undamaged one
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError) as error:
        pretrained.read(str(path))
    one_line(error, "bad.safetensors", "damaged")


def test_safetensors_cut_anywhere_or_with_a_byte_changed(tmp_path):
    path = str(tmp_path / "bad.safetensors")
    safetensors.torch.save_file({"a": torch.ones(2, 3), "b": torch.arange(3)}, path)
    whole = open(path, "rb").read()

    def read(data):
        with open(path, "wb") as file:
            file.write(data)
        return pretrained.read(path)

    for n in range(len(whole)):
        with pytest.raises(ValueError) as error:
            read(whole[:n])
        one_line(error, path)
    g = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        data[int(torch.randint(len(whole) - 48, (), generator=g))] = int(torch.randint(256, (), generator=g))
        try:
            read(bytes(data))
        except ValueError as error:  # no other type
            refused += "\n" not in str(error)
    assert refused > 200


# ---- published weights ----------------------------------------------------------------------------------------------

def test_urls():
    for name, url in pretrained.URLS.items():
        if name.startswith("yolov5:"):
            continue  # no hash in the name; see test_yolov5_names
        assert re.search(r"-[0-9a-f]{8}\.pth$", url) and url.startswith("https://"), name
        library, net = name.split(":")
        if library == "torchvision":
            weights = torchvision.models.get_model_weights(net)
            assert url in {w.url for w in weights} and url == weights.DEFAULT.url
            assert url.split("/")[-1].startswith(net + "-")
        elif "efficientnet" in net:
            assert url == timm.get_pretrained_cfg(net).url and timm.is_model(net)
        else:
            assert net in VARIANTS and net in timm.list_models("regnetx*") and f"/{net}-" in url
    assert len(set(pretrained.URLS.values())) == len(pretrained.URLS)


@pytest.mark.parametrize("reason", [URLError("Name or service not known"), TimeoutError("timed out"),
                                    ConnectionResetError("reset"), HTTPError("https://x", 404, "Not Found", {}, None)])
def test_no_network(reason, monkeypatch):
    def fail(*args, **kwargs):
        raise reason

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(OSError) as error:
        pretrained.load(RegNetX(), "timm:regnetx_002")
    assert error.type is OSError
    one_line(error, "timm:regnetx_002", pretrained.URLS["timm:regnetx_002"], "pass the file's path")


def publish(path, state, monkeypatch, hash=None):
    """Publishes a state dict as a file whose name has its hash (or the given one) -> the file."""
    torch.save(state, path / "file.pth")
    digest = hash or hashlib.sha256((path / "file.pth").read_bytes()).hexdigest()[:8]
    target = (path / "file.pth").rename(path / f"regnetx_002-{digest}.pth")
    monkeypatch.setitem(pretrained.URLS, "timm:regnetx_002", target.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(path / "cache"))
    return target


def test_download_checks_the_hash_and_keeps_the_file(theirs, tmp_path, monkeypatch):
    source = publish(tmp_path, theirs.state_dict(), monkeypatch)
    for _ in range(2):
        net = RegNetX()
        assert not pretrained.load(net, "timm:regnetx_002")["missing"]
        assert torch.equal(net.head.fc.weight, theirs.head.fc.weight)
        source.unlink(missing_ok=True)  # the second time it comes from the cache


def test_download_with_another_hash(theirs, tmp_path, monkeypatch):
    publish(tmp_path, theirs.state_dict(), monkeypatch, hash="0123abcd")
    with pytest.raises(ValueError) as error:
        pretrained.load(RegNetX(), "timm:regnetx_002")
    one_line(error, "timm:regnetx_002", "not the published file", "hash", "delete")


def test_damaged_file_in_the_cache(theirs, tmp_path, monkeypatch):
    source = publish(tmp_path, theirs.state_dict(), monkeypatch)
    cached = tmp_path / "cache" / "hub" / "checkpoints" / source.name
    cached.parent.mkdir(parents=True)
    for data in (b"", b"<html>", source.read_bytes()[:10_000]):
        cached.write_bytes(data)
        with pytest.raises(ValueError) as error:
            pretrained.load(RegNetX(), "timm:regnetx_002")
        one_line(error, "timm:regnetx_002", str(cached.parent), "delete")


def test_hostile_download(tmp_path, monkeypatch):
    publish(tmp_path, {"state_dict": Trap(tmp_path / "executed")}, monkeypatch)
    with pytest.raises(ValueError) as error:
        pretrained.load(RegNetX(), "timm:regnetx_002")
    one_line(error, "timm:regnetx_002")
    assert not (tmp_path / "executed").exists()


# ---- YOLOv5: files that hold a whole module -------------------------------------------------------------------------

def release(path, net, **more):
    """Saves a net as YOLOv5's releases: fp16, pickled as a module of unknown classes -> path, its state dict."""
    net = with_statistics(net).half()
    with foreign(net, "models.yolo") as theirs:
        torch.save({"epoch": -1, "model": theirs, "ema": None, "optimizer": None, **more}, path)
    return str(path), {name: tensor.float() if tensor.is_floating_point() else tensor
                       for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="module")
def yolov5n(tmp_path_factory):
    return release(tmp_path_factory.mktemp("yolov5") / "yolov5n.pt", YOLOv5("n"))


@pytest.mark.parametrize("variant", ["n", "n6"])
def test_a_release_of_yolov5(variant, tmp_path):
    path, source = release(tmp_path / "yolov5.pt", YOLOv5(variant))
    net = YOLOv5(variant)
    with pytest.raises(ModuleNotFoundError):  # torch alone cannot open the file
        torch.load(path, weights_only=False)
    assert pretrained.load(net, path) == {"loaded": list(source), "adapted": [], "unused": [], "missing": [], "sha256": None}
    assert all(torch.equal(tensor, source[name]) for name, tensor in net.state_dict().items())
    assert net.model[0].conv.weight.dtype == torch.float32 and net.model[0].conv.weight.requires_grad


@pytest.mark.parametrize("variant, head, parts", [("n", "model.24", 6), ("n6", "model.33", 8)])
def test_other_classes_leave_the_last_convolutions(variant, head, parts, tmp_path):
    path, source = release(tmp_path / "yolov5.pt", YOLOv5(variant))
    net = YOLOv5(variant, num_classes=14)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = pretrained.load(net, path)
    own = [name for name in source if name.startswith(f"{head}.m.")]
    assert len(own) == parts and report["unused"] == report["missing"] == own
    assert report["loaded"] == [name for name in source if name not in own] and f"{head}.anchors" in report["loaded"]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name in own else source[name]), name
    assert pretrained.describe(report).endswith(f"not used: {parts} ({head}), left as initialised: {parts} ({head})")


def test_the_anchor_free_head_starts_anew(yolov5n):
    path, source = yolov5n
    net = YOLOv5("n", head="free")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = pretrained.load(net, path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("model.24.") else source[name]), name
    assert report["unused"] == [name for name in source if name.startswith("model.24.")]
    assert report["missing"] == [name for name in before if name.startswith("model.24.")]


@pytest.mark.parametrize("bands", [1, 4, 10])
def test_other_bands_of_a_detector(bands, yolov5n):
    path, source = yolov5n
    net = YOLOv5("n", in_chans=bands)
    report = pretrained.load(net, path)
    assert report["adapted"] == ["model.0.conv.weight"] and not report["missing"]
    expected = adapt_input_conv(bands, source["model.0.conv.weight"].clone())
    assert torch.allclose(net.model[0].conv.weight, expected, rtol=1e-6, atol=0)
    assert torch.equal(net.model[1].conv.weight, source["model.1.conv.weight"])


def test_anchors_of_the_file_and_of_the_net(yolov5n, tmp_path):
    """The file's anchors are loaded where they fit; otherwise a net with such task_prefixes keeps its own."""
    path, source = yolov5n
    net = YOLOv5("n", anchors=torch.arange(18.) + 1)
    assert pretrained.load(net, path)["missing"] == []
    assert torch.equal(net.head.anchors, source["model.24.anchors"])
    net = YOLOv5("n", anchors=torch.arange(24.) + 1)
    net.task_prefixes = ("model.24.",)
    before = net.head.anchors.clone()
    assert "model.24.anchors" in pretrained.load(net, path)["missing"]
    assert torch.equal(net.head.anchors, before)


@pytest.mark.parametrize("wrong", ["s", "n6"])
def test_weights_of_another_detector_are_refused(wrong, yolov5n):
    net = YOLOv5(wrong, num_classes=3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        pretrained.load(net, yolov5n[0])
    one_line(error, yolov5n[0], "no match", "choose")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(ValueError, match="no match"):
        pretrained.load(RegNetX(), yolov5n[0])


def test_a_net_can_have_its_own_task_prefixes(theirs, tmp_path):
    """They replace TASK: without `head.` among them, weights with another head are refused."""
    path, net = save(tmp_path / "timm.pth", theirs.state_dict()), RegNetX(num_classes=5)
    net.task_prefixes = ("stem.",)
    with pytest.raises(ValueError, match=r"no match for head\.fc"):
        pretrained.load(net, path)
    net.task_prefixes = ["head.fc."]
    assert set(pretrained.load(net, path)["missing"]) == HEAD


def test_yolov5_names():
    names = {name.removeprefix("yolov5:yolov5"): url for name, url in pretrained.URLS.items() if "yolov5:" in name}
    assert names and set(names) <= set(YOLOV5)
    for variant, url in names.items():
        assert url == f"https://github.com/ultralytics/yolov5/releases/download/v7.0/yolov5{variant}.pt"


def test_yolov5_by_name(yolov5n, tmp_path, monkeypatch):
    """Downloaded once; a wrong file is a ValueError that says what to delete; no network is an OSError."""
    path, source = yolov5n
    server = tmp_path / "yolov5n.pt"
    server.write_bytes(open(path, "rb").read())
    monkeypatch.setitem(pretrained.URLS, "yolov5:yolov5n", server.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        net = YOLOv5("n")
        assert not pretrained.load(net, "yolov5:yolov5n")["missing"]
        assert torch.equal(net.model[9].cv2.conv.weight, source["model.9.cv2.conv.weight"])
        server.unlink(missing_ok=True)  # the second time it comes from the cache
    cached, = (tmp_path / "cache" / "hub" / "checkpoints").iterdir()
    for data in (b"<html>", server.name.encode(), cached.read_bytes()[:100_000]):
        cached.write_bytes(data)
        with pytest.raises(ValueError) as error:
            pretrained.load(YOLOv5("n"), "yolov5:yolov5n")
        one_line(error, "yolov5:yolov5n", "not the published file", str(cached.parent), "delete")
    cached.unlink()
    with pytest.raises(OSError) as error:
        pretrained.load(YOLOv5("n"), "yolov5:yolov5n")
    one_line(error, "yolov5:yolov5n", server.as_uri(), "pass the file's path")
    assert not list(cached.parent.iterdir())


def test_a_trap_in_a_release(tmp_path):
    """A file that names the module os beside its net is refused, and nothing of it runs."""
    path, _ = release(tmp_path / "trap.pt", YOLOv5("n"), opt=Trap(tmp_path / "executed"))
    with pytest.raises(ValueError) as error:
        pretrained.load(YOLOv5("n"), path)
    one_line(error, path, "mkdir")
    assert not (tmp_path / "executed").exists()


# ---- EfficientNetV2: two paddings, three ways to scale an image -----------------------------------------------------

def test_what_the_weights_expect():
    assert set(pretrained.EXPECTS) == {name for name in pretrained.URLS if not name.startswith("yolov5:")}
    for name, expects in pretrained.EXPECTS.items():
        library, net = name.split(":")
        if library == "torchvision":
            theirs, padding = torchvision.models.get_model_weights(net).DEFAULT.transforms(), "symmetric"
        else:
            theirs, padding = timm.get_pretrained_cfg(net), "same"
        wanted = {"mean": tuple(theirs.mean), "std": tuple(theirs.std)}
        assert expects == wanted | ({"padding": padding} if "efficientnet" in net else {}), name


def test_every_published_efficientnet_is_in_the_table():
    """All weights that timm has by URL, for the variants of nets/efficientnet.py."""
    cfgs = [(name, timm.get_pretrained_cfg(name)) for name in timm.list_pretrained("tf_efficientnetv2*")]
    names = {f"timm:{name}" for name, cfg in cfgs if cfg.url and "_xl" not in name}
    assert names <= set(pretrained.URLS) and len(names) == 13


@pytest.fixture(scope="module")
def efficientnet():
    return with_statistics(timm.create_model("tf_efficientnetv2_b0")).eval()


EFFICIENTNET_HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_efficientnet_in_a_unet(bands, efficientnet, tmp_path):
    net, source = UNet("efficientnetv2_b0", in_chans=bands, conv0=(), decoder=(8, 8, 8, 8)), efficientnet.state_dict()
    report = pretrained.load(net, save(tmp_path / "timm.pth", source))
    assert report["adapted"] == (["encoder.conv_stem.weight"] if bands != 3 else [])
    assert all(name.startswith(("conv_head.", "bn2.", "classifier.")) for name in report["unused"])
    assert len(report["unused"]) == 8 and not any(name.startswith("encoder.") for name in report["missing"])
    stem = adapt_input_conv(bands, source["conv_stem.weight"].clone())
    assert torch.allclose(net.encoder.conv_stem.weight, stem, rtol=1e-6, atol=0)
    for name, tensor in net.encoder.state_dict().items():
        assert name == "conv_stem.weight" or torch.equal(tensor, source[name]), name
    assert pretrained.describe(report).endswith("not used: 8 (bn2, classifier, conv_head), left as initialised: "
                                                "50 (decoder, head)")


def test_efficientnet_with_other_classes(efficientnet, tmp_path):
    path, net = save(tmp_path / "timm.pth", efficientnet.state_dict()), EfficientNetV2("b0", 1, 26)
    report = pretrained.load(net, path)
    assert set(report["unused"]) == set(report["missing"]) == EFFICIENTNET_HEAD
    assert report["adapted"] == ["conv_stem.weight"]
    for wrong in (EfficientNetV2("b1"), RegNetX()):
        with pytest.raises(ValueError, match="no match"):
            pretrained.load(wrong, path)


def test_the_other_padding_is_refused(tmp_path, monkeypatch, efficientnet):
    """torchvision's tensor names imply the padding; timm's files are only known by their name."""
    theirs = {name: tensor.clone() for name, tensor in torchvision.models.efficientnet_v2_s().state_dict().items()}
    path = save(tmp_path / "tv.pth", theirs)
    pretrained.load(UNet("efficientnetv2_s_tv", in_chans=3, conv0=()), path)
    for net in (EfficientNetV2("s"), UNet("efficientnetv2_s", in_chans=3, conv0=())):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with pytest.raises(ValueError) as error:
            pretrained.load(net, path)
        one_line(error, path, "'symmetric'", "'same'", "efficientnetv2_s_tv")
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    path = save(tmp_path / "timm.pth", efficientnet.state_dict())
    pretrained.load(EfficientNetV2("b0", padding="symmetric"), path)
    monkeypatch.setattr(pretrained, "download", lambda name: torch.load(path))
    pretrained.load(EfficientNetV2("b0"), "timm:tf_efficientnetv2_b0.in1k")
    with pytest.raises(ValueError) as error:
        pretrained.load(EfficientNetV2("b0", padding="symmetric"), "timm:tf_efficientnetv2_b0.in1k")
    one_line(error, "timm:tf_efficientnetv2_b0.in1k", "'same'", "'symmetric'")


def first_edition(task, arch, **more):
    """A checkpoint of the first edition, with the keys that reading weights needs."""
    of_task = {"seg": {"mean_planes": False, "classes": 1},
               "cls": {"norm": [[0.5], [0.5]], "exclusive": True, "classes": ["a", "b"]}}
    return {"task": task, "arch": arch, "bands": [1], "scale": 255.0, "imgsz": 32, **of_task[task], **more}


@pytest.mark.parametrize("kind", ["encoder", "classifier", "old encoder", "old classifier"])
def test_the_other_padding_of_our_own_checkpoints_is_refused(kind, tmp_path):
    """The checkpoint's architecture states it: a UNet's encoder or a classifier, in both editions."""
    for suffix, net in (("_tv", EfficientNetV2("b0")), ("", EfficientNetV2("b0", padding="symmetric"))):
        name, weights = f"efficientnetv2_b0{suffix}", {"model": net.state_dict()}
        content = {
            "encoder": {"task": "seg", "arch": {"name": "unet.UNet", "kwargs": {"encoder": name}}, "input": {}},
            "classifier": {"task": "cls", "arch": {"name": name, "kwargs": {}}, "input": {}},
            "old encoder": first_edition("seg", {"name": "UNet", "kwargs": {"encoder": name}}),
            "old classifier": first_edition("cls", {"name": "backbones.make", "kwargs": {"name": name}})}[kind]
        path = save(tmp_path / "own.pt", content | weights)
        with pytest.raises(ValueError, match="the net has"):
            pretrained.load(net, path)
        right = EfficientNetV2("b0", padding="symmetric" if suffix else "same")
        assert len(pretrained.load(right, path)["loaded"]) == len(net.state_dict())


@pytest.mark.parametrize("wrong", ["efficientnet_b0", "mobilenet_v2", "densenet121"])
def test_torchvisions_other_nets(wrong, tmp_path):
    """Their tensor names begin like EfficientNetV2's."""
    path = save(tmp_path / "wrong.pth", getattr(torchvision.models, wrong)().state_dict())
    with pytest.raises(ValueError) as error:
        pretrained.load(EfficientNetV2("b0", padding="symmetric"), path)
    one_line(error, path, "no match")


@pytest.mark.parametrize("name, kind", [
    ("", "IMAGENET"), ("repvgg_a0", "IMAGENET"), ("tf_efficientnetv2_s", "HALF"), ("tf_efficientnetv2_l", "HALF"),
    ("tf_efficientnetv2_b0", "IMAGENET"), ("regnetx_002", "IMAGENET")])
def test_a_file_has_the_normalisation_of_its_source(tmp_path, name, kind):
    with torch.device("meta"):
        state = (timm.create_model(name) if name else torchvision.models.efficientnet_v2_s()).state_dict()
    torch.save({name: torch.zeros(t.shape, dtype=torch.uint8) for name, t in state.items()}, tmp_path / "net.pth")
    want = getattr(pretrained, kind)
    assert pretrained.normalisation(str(tmp_path / "net.pth"), 3) == [list(want["mean"]), list(want["std"])]


def test_our_own_checkpoints_state_their_normalisation(tmp_path):
    norm = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    old = first_edition("cls", {"name": "backbones.make", "kwargs": {"name": "efficientnetv2_b0"}}, norm=norm, model={})
    new = {"task": "cls", "arch": {"name": "efficientnetv2_b0", "kwargs": {}}, "model": {}, "classes": ["a", "b"],
           "single_label": False, "input": {"bands": [1, 2, 3], "mean": norm[0], "std": norm[1]}}
    for content, single_label in ((old, True), (new, False)):
        path = save(tmp_path / "best.pt", content)
        assert pretrained.normalisation(path, 3) == norm
        assert pretrained.normalisation(path, 1) == [[pytest.approx(0.2)], [pytest.approx(0.5)]]
        assert pretrained.classes(path) == (["a", "b"], single_label)
    assert pretrained.normalisation(None, 3) == [[0.5] * 3] * 2
    assert pretrained.classes(save(tmp_path / "timm.pth", {})) is None


def test_an_auxiliary_head_starts_anew(tmp_path):
    torch.save(RegNetX(3, num_classes=7).state_dict(), tmp_path / "encoder.pth")
    net = UNet(in_chans=3, conv0=(), decoder=(8, 8, 8, 8), aux_cls=True)
    report = pretrained.load(net, tmp_path / "encoder.pth")
    assert {"aux_cls.weight", "aux_cls.bias"} <= set(report["missing"]) and len(report["loaded"]) > 200
    torch.save(net.state_dict(), tmp_path / "with.pth")  # and back
    report = pretrained.load(UNet(in_chans=3, conv0=(), decoder=(8, 8, 8, 8)), tmp_path / "with.pth")
    assert report["unused"] == ["aux_cls.weight", "aux_cls.bias"] and not report["missing"]
