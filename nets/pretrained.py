"""Published weights into our nets, tensor for tensor: timm, torchvision, YOLOv5, our own checkpoints.

    pretrained.load(model, "timm:regnetx_002")        downloads once (torch.hub's cache), checks the file's hash
    pretrained.load(model, "yolov5:yolov5s")          the same, without a hash: none is published
    pretrained.load(model, "weights.safetensors")     or .pth, .pt: no network

Files are read as tensors and nothing else: `torch.load(weights_only=True)`, nets/unpickle.py for whole modules, or the
safetensors reader below.
"""
import errno
import json
import os
import re
from urllib.error import URLError

import numpy as np
import torch

from nets.unpickle import read_module

_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-regnet/"
_EFFICIENTNET = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-effv2-weights/"
_TORCHVISION = "https://download.pytorch.org/models/"
_YOLOV5 = "https://github.com/ultralytics/yolov5/releases/download/v7.0/"
# the eight digits in a .pth's name begin the file's SHA-256; torch.hub compares
URLS = {
    "timm:regnetx_002": _TIMM + "regnetx_002-e7e85e5c.pth",
    "timm:regnetx_004": _TIMM + "regnetx_004-7d0e9424.pth",
    "timm:regnetx_006": _TIMM + "regnetx_006-85ec1baa.pth",
    "timm:regnetx_008": _TIMM + "regnetx_008-d8b470eb.pth",
    "timm:regnetx_016": _TIMM + "regnetx_016-65ca972a.pth",
    "timm:regnetx_032": _TIMM + "regnetx_032-ed0c7f7e.pth",
    # pretrained on ImageNet-21k: in21k with its 21,843 classes, in21k_ft_in1k then tuned on ImageNet's 1000
    "timm:tf_efficientnetv2_s.in21k_ft_in1k": _EFFICIENTNET + "tf_efficientnetv2_s_21ft1k-d7dafa41.pth",
    "timm:tf_efficientnetv2_m.in21k_ft_in1k": _EFFICIENTNET + "tf_efficientnetv2_m_21ft1k-bf41664a.pth",
    "timm:tf_efficientnetv2_l.in21k_ft_in1k": _EFFICIENTNET + "tf_efficientnetv2_l_21ft1k-60127a9d.pth",
    "timm:tf_efficientnetv2_s.in21k": _EFFICIENTNET + "tf_efficientnetv2_s_21k-6337ad01.pth",
    "timm:tf_efficientnetv2_m.in21k": _EFFICIENTNET + "tf_efficientnetv2_m_21k-361418a2.pth",
    "timm:tf_efficientnetv2_l.in21k": _EFFICIENTNET + "tf_efficientnetv2_l_21k-91a19ec9.pth",
    "timm:tf_efficientnetv2_s.in1k": _EFFICIENTNET + "tf_efficientnetv2_s-eb54923e.pth",
    "timm:tf_efficientnetv2_m.in1k": _EFFICIENTNET + "tf_efficientnetv2_m-cc09e0cd.pth",
    "timm:tf_efficientnetv2_l.in1k": _EFFICIENTNET + "tf_efficientnetv2_l-d664b728.pth",
    "timm:tf_efficientnetv2_b0.in1k": _EFFICIENTNET + "tf_efficientnetv2_b0-c7cc451f.pth",
    "timm:tf_efficientnetv2_b1.in1k": _EFFICIENTNET + "tf_efficientnetv2_b1-be6e41b0.pth",
    "timm:tf_efficientnetv2_b2.in1k": _EFFICIENTNET + "tf_efficientnetv2_b2-847de54e.pth",
    "timm:tf_efficientnetv2_b3.in1k": _EFFICIENTNET + "tf_efficientnetv2_b3-57773f13.pth",
    "torchvision:efficientnet_v2_s": _TORCHVISION + "efficientnet_v2_s-dd5fe13b.pth",
    "torchvision:efficientnet_v2_m": _TORCHVISION + "efficientnet_v2_m-dc08266a.pth",
    "torchvision:efficientnet_v2_l": _TORCHVISION + "efficientnet_v2_l-59c71312.pth",
    "torchvision:regnet_x_400mf": _TORCHVISION + "regnet_x_400mf-62229a5f.pth",
    "torchvision:regnet_x_800mf": _TORCHVISION + "regnet_x_800mf-94a99ebd.pth",
    "torchvision:regnet_x_1_6gf": _TORCHVISION + "regnet_x_1_6gf-a12f2b72.pth",
    "torchvision:regnet_x_3_2gf": _TORCHVISION + "regnet_x_3_2gf-7071aa85.pth",
    **{f"yolov5:yolov5{v}": f"{_YOLOV5}yolov5{v}.pt" for v in ("n", "s", "m", "l", "x", "n6", "s6", "m6", "l6", "x6")},
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_HALVED = re.compile(r"timm:tf_efficientnetv2_[sml]\.|torchvision:efficientnet_v2_l")
# what the weights were trained on: (image in 0...1 - mean) / std, and EfficientNetV2's padding; YOLOv5: 0...1 as it is
EXPECTS = {name: dict(_HALF if _HALVED.match(name) else _IMAGENET) for name in URLS if not name.startswith("yolov5:")}
for _name in EXPECTS:
    if "efficientnet" in _name:
        EXPECTS[_name]["padding"] = "same" if _name.startswith("timm:") else "symmetric"
TORCHVISION_STEM = "features.0.0.weight"  # in torchvision's EfficientNetV2, and in none of timm's
# what belongs to a task and its data, the rest is the encoder; a net built otherwise has its own `task_prefixes`
TASK = ("conv0.", "decoder.", "head.", "presence.",
        "conv_head.", "bn2.", "classifier.",  # EfficientNetV2's head
        "incre_modules.", "downsamp_modules.", "final_layer.")  # HRNet's


def load(model, path_or_name):
    """Copies what fits from a file (or a name in URLS) into `model`, or into its `encoder`.

    A first convolution with another number of input bands is adapted (RepVGG has two). The encoder, that is all but
    the names that start with one of `model.task_prefixes` (TASK if it has none), must fit as a whole: half of one is a
    wrong choice of net. A detector's anchors are loaded where their shape fits: the head was trained for them.
    How images are to be scaled for weights with a name: EXPECTS.
    Returns {"loaded", "adapted", "unused", "missing"}: lists of tensor names, the last two as they are called in the
    file and in the model.
    Raises OSError when the file cannot be had, ValueError when it is damaged, not weights of this net, or an
    EfficientNetV2's that was trained with the other padding: it would run and be worse.
    """
    published = download(path_or_name) if path_or_name in URLS else read(path_or_name)
    state = to_timm_names(unwrap(published))
    # the anchors once more, in pixels: a buffer of YOLOv5's nets before v6
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".anchor_grid")}
    ours = model.state_dict()
    # a whole net fits as it is; a classification net fits into the encoder of a segmentation net
    prefix = max(("", "encoder."), key=lambda p: sum(p + name in ours for name in state))
    loaded, adapted, unused = {}, [], []
    first = next((name for name, t in ours.items() if name.startswith(prefix) and t.ndim == 4), None)
    for name, tensor in state.items():
        target = ours.get(prefix + name)
        sees_input = (prefix + name).replace("stem.conv_1x1.", "stem.conv_kxk.") == first  # RepVGG: both branches
        if sees_input and target is not None and tensor.shape[1:2] != target.shape[1:2] and (
                tensor.shape[::2] == target.shape[::2]):
            tensor = adapt_input(tensor, target.shape[1])
            adapted.append(prefix + name)
        if target is None or tensor.shape != target.shape:
            unused.append(name)
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path_or_name}: tensor {name} is not finite; fetch the file again")
        else:
            loaded[prefix + name] = tensor
    missing = [name for name in ours if name not in loaded]
    both, task = state | ours, tuple(getattr(model, "task_prefixes", TASK))
    wrong = [n for n in unused + missing if not n.startswith(task) and both[n].ndim]  # not the counters of norms
    if wrong:
        raise ValueError(f"{path_or_name}: no match for {wrong[0]} ({len(loaded)} of the file's {len(state)} tensors "
                         f"fit this net); choose the net they belong to")
    check_padding(getattr(model, "encoder", model), path_or_name, published)
    model.load_state_dict(loaded, strict=False)
    return {"loaded": list(loaded), "adapted": adapted, "unused": unused, "missing": missing}


def normalisation(path_or_name, bands):
    """-> [means, deviations] of images in 0..1, for weights by a name in EXPECTS, for a file, or for none: a number per
    band, or one for all where there are not as many."""
    values = EXPECTS.get(path_or_name) or (_of_file(read(path_or_name)) if path_or_name else _HALF)
    values = [list(values["mean"]), list(values["std"])]
    return values if len(values[0]) == bands else [[sum(numbers) / len(numbers)] for numbers in values]


def classes(path_or_name):
    """(names of the classes, whether they exclude each other) of a classifier's checkpoint of ours; None for others."""
    state = {} if path_or_name in URLS else read(path_or_name)
    return (state["classes"], state["exclusive"]) if {"classes", "exclusive"} <= state.keys() else None


def _of_file(state):
    """What the weights of a file want: our own checkpoints tell it, others' layouts show it (not that of a B3, which is
    taken for in21k's)."""
    if isinstance(state.get("norm"), (list, tuple)):
        return dict(zip(("mean", "std"), state["norm"]))
    names = to_timm_names(unwrap(state))
    stem, first = names.get("conv_stem.weight"), names.get("blocks.0.0.conv.weight")
    if stem is None or first is None:
        return _IMAGENET  # RegNet, RepVGG, HRNet
    # -1..1: torchvision's L, timm's S, M, L
    halved = len(stem) == 32 if TORCHVISION_STEM in unwrap(state) else len(first) > 16 or len(stem) == 40
    return _HALF if halved else _IMAGENET


def describe(report):
    """The report of `load` as one line."""
    def names(key):
        top = sorted({".".join(n.split(".")[:1 + n.startswith(("encoder.", "model."))]) for n in report[key]})
        return f"{len(report[key])} ({', '.join(top[:6])})" if top else "0"

    return (f"weights: {len(report['loaded'])} tensors loaded, {len(report['adapted'])} adapted to the input bands, "
            f"not used: {names('unused')}, left as initialised: {names('missing')}")


def unwrap(state):
    """The state dict inside a training checkpoint (averaged weights first), without DDP's `module.`."""
    for key in ("ema", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v for k, v in state.items() if isinstance(v, torch.Tensor)}


def check_padding(net, path_or_name, state):
    """Raises ValueError when the weights want another padding than the net has. Our own checkpoints tell it, files with
    timm's names do not."""
    made_by = state["arch"].get("kwargs", {}) if isinstance(state.get("arch"), dict) else {}
    name = str(made_by.get("encoder", made_by.get("name")))
    wants = EXPECTS.get(path_or_name, {}).get("padding")
    if name.startswith("efficientnetv2"):
        wants = "symmetric" if name.endswith("_tv") else "same"
    elif TORCHVISION_STEM in unwrap(state):
        wants = "symmetric"
    if wants and getattr(net, "padding", wants) != wants:
        raise ValueError(f"{path_or_name}: trained with padding {wants!r}, the net has {net.padding!r}; choose the net "
                         f"with the other (a UNet's encoder: efficientnetv2_s for timm's, efficientnetv2_s_tv for "
                         f"torchvision's)")


def to_timm_names(state):
    """torchvision's RegNet and EfficientNetV2 names -> timm's, which are ours. Others pass."""
    if TORCHVISION_STEM in state:
        return {efficientnet_name(name, state): tensor for name, tensor in state.items()}
    if not any(name.startswith("trunk_output.") for name in state):
        return state
    part = {"0": "conv", "1": "bn"}
    unit = {"proj": "downsample", "f.a": "conv1", "f.b": "conv2", "f.c": "conv3"}
    renamed = {}
    for name, tensor in state.items():
        if m := re.fullmatch(r"stem\.([01])\.(.+)", name):
            name = f"stem.{part[m[1]]}.{m[2]}"
        elif m := re.fullmatch(r"trunk_output\.block(\d+)\.block\d+-(\d+)\.(proj|f\.[abc])\.([01])\.(.+)", name):
            name = f"s{m[1]}.b{int(m[2]) + 1}.{unit[m[3]]}.{part[m[4]]}.{m[5]}"
        elif name.startswith("fc."):
            name = f"head.{name}"
        renamed[name] = tensor
    return renamed


def efficientnet_name(name, state):
    """One of torchvision's EfficientNetV2 names -> timm's. The kind of a block shows in `state`, by its last part."""
    if m := re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(\d)\.(fc1|fc2|0|1)\.(.+)", name):
        stage, block, position, part, rest = m.groups()
        last = max((k for k in "0123" if f"features.{stage}.{block}.block.{k}.0.weight" in state), default="")
        unit = {"0 0": "conv bn1", "1 0": "conv_exp bn1", "1 1": "conv_pwl bn2", "3 0": "conv_pw bn1",
                "3 1": "conv_dw bn2", "3 2": "se.conv_reduce se.conv_expand", "3 3": "conv_pwl bn3"}
        unit = unit.get(f"{last} {position}")
        return f"blocks.{int(stage) - 1}.{block}.{unit.split()[part in ('1', 'fc2')]}.{rest}" if unit else name
    if m := re.fullmatch(r"features\.(\d+)\.([01])\.(.+)", name):
        unit = "conv_head bn2" if int(m[1]) else "conv_stem bn1"
        return f"{unit.split()[int(m[2])]}.{m[3]}"
    return name.replace("classifier.1.", "classifier.")


def adapt_input(weight, in_chans):
    """(O, I, k, k) -> (O, in_chans, k, k), as timm's `adapt_input_conv` does.

    One band gets the sum over the bands: a grey image gives what it gave as RGB. More bands repeat the
    weights in turn, scaled so that the response to a flat image stays.
    """
    bands = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True)
    repeated = weight.float().repeat(1, -(-in_chans // bands), 1, 1)[:, :in_chans]
    return repeated * (bands / in_chans)


def download(name):
    """A name in URLS -> dict, from the net or from torch.hub's cache. Raises OSError or ValueError, as `load` does."""
    try:
        if name.startswith("yolov5:"):  # no digest to check, and whole modules, which torch.load refuses
            path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URLS[name]))
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(URLS[name], path)
            return read_module(path)
        return torch.hub.load_state_dict_from_url(URLS[name], map_location="cpu", check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"{name}: no network? {URLS[name]} did not answer ({getattr(error, 'reason', error)}); "
                      f"fetch it elsewhere and pass the file's path") from None
    except Exception as error:  # another hash, or a damaged file in the cache
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise OSError(f"{name}: cannot be kept in {torch.hub.get_dir()} ({error.strerror}); make room, or set "
                          f"TORCH_HOME") from None
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"{name}: not the published file ({reason}); delete it from {torch.hub.get_dir()}/checkpoints "
                         f"and try again") from None


def read(path):
    """A file of weights -> dict. Executes nothing: of pickled modules the tensors are read and nothing else."""
    if not os.path.isfile(path):
        raise OSError(f"{path}: no such file; give a file of weights, or one of {', '.join(URLS)}")
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch raises a dozen types on damaged files, OSError among them, and one on modules
            return read_module(path)  # or ValueError, with what is wrong
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dict of tensors; save a state dict")
    return state


def read_safetensors(path):
    """The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
              "U8": torch.uint8, "BOOL": torch.bool}
    data = np.fromfile(path, np.uint8)
    try:
        start = 8 + int(data[:8].view("<u8")[0])
        if start > len(data):
            raise ValueError("its header is cut off")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        state = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(data) - start:
                raise ValueError(f"{name} lies outside the file")
            raw = torch.from_numpy(data[start + first:start + last].copy())
            dtype = dtypes[entry["dtype"]]
            state[name] = (raw.view(dtype) if len(raw) else raw.to(dtype)).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    return state
