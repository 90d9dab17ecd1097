"""Files of weights: which are published where, and how they are read.

Nothing in a file is executed. `torch.load(weights_only=True)` builds tensors and plain containers and refuses every
other class or function that a file names; `read_module` and `read_safetensors` read the formats that it refuses.
"""
import json
import math
import os
import re
import zipfile
from urllib.error import URLError

import torch
from torch import nn

from nets.yolo import VARIANTS
from utils.train import checkpoint

_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/"
_TORCHVISION = "https://download.pytorch.org/models/"
_YOLOV5 = "https://github.com/ultralytics/yolov5/releases/download/v7.0/"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
NONE = {"mean": (0.0,), "std": (1.0,)}
SAME, SYMMETRIC = {"padding": "same"}, {"padding": "symmetric"}  # of EfficientNetV2, see nets/efficientnet.py
_PUBLISHED = (  # address, what the weights expect, {name: file}; the eight digits of a .pth begin its SHA-256
    (_TIMM + "v0.1-regnet/", IMAGENET, {
        "timm:regnetx_002": "regnetx_002-e7e85e5c.pth",
        "timm:regnetx_004": "regnetx_004-7d0e9424.pth",
        "timm:regnetx_006": "regnetx_006-85ec1baa.pth",
        "timm:regnetx_008": "regnetx_008-d8b470eb.pth",
        "timm:regnetx_016": "regnetx_016-65ca972a.pth",
        "timm:regnetx_032": "regnetx_032-ed0c7f7e.pth",
    }),
    # in21k: trained on ImageNet-21k, with its 21,843 classes; in21k_ft_in1k: then fine-tuned on ImageNet's 1000
    (_TIMM + "v0.1-effv2-weights/", HALF | SAME, {
        "timm:tf_efficientnetv2_s.in21k_ft_in1k": "tf_efficientnetv2_s_21ft1k-d7dafa41.pth",
        "timm:tf_efficientnetv2_m.in21k_ft_in1k": "tf_efficientnetv2_m_21ft1k-bf41664a.pth",
        "timm:tf_efficientnetv2_l.in21k_ft_in1k": "tf_efficientnetv2_l_21ft1k-60127a9d.pth",
        "timm:tf_efficientnetv2_s.in21k": "tf_efficientnetv2_s_21k-6337ad01.pth",
        "timm:tf_efficientnetv2_m.in21k": "tf_efficientnetv2_m_21k-361418a2.pth",
        "timm:tf_efficientnetv2_l.in21k": "tf_efficientnetv2_l_21k-91a19ec9.pth",
        "timm:tf_efficientnetv2_s.in1k": "tf_efficientnetv2_s-eb54923e.pth",
        "timm:tf_efficientnetv2_m.in1k": "tf_efficientnetv2_m-cc09e0cd.pth",
        "timm:tf_efficientnetv2_l.in1k": "tf_efficientnetv2_l-d664b728.pth",
    }),
    (_TIMM + "v0.1-effv2-weights/", IMAGENET | SAME, {
        "timm:tf_efficientnetv2_b0.in1k": "tf_efficientnetv2_b0-c7cc451f.pth",
        "timm:tf_efficientnetv2_b1.in1k": "tf_efficientnetv2_b1-be6e41b0.pth",
        "timm:tf_efficientnetv2_b2.in1k": "tf_efficientnetv2_b2-847de54e.pth",
        "timm:tf_efficientnetv2_b3.in1k": "tf_efficientnetv2_b3-57773f13.pth",
    }),
    (_TORCHVISION, IMAGENET | SYMMETRIC, {
        "torchvision:efficientnet_v2_s": "efficientnet_v2_s-dd5fe13b.pth",
        "torchvision:efficientnet_v2_m": "efficientnet_v2_m-dc08266a.pth",
    }),
    (_TORCHVISION, HALF | SYMMETRIC, {"torchvision:efficientnet_v2_l": "efficientnet_v2_l-59c71312.pth"}),
    (_TORCHVISION, IMAGENET, {
        "torchvision:regnet_x_400mf": "regnet_x_400mf-62229a5f.pth",
        "torchvision:regnet_x_800mf": "regnet_x_800mf-94a99ebd.pth",
        "torchvision:regnet_x_1_6gf": "regnet_x_1_6gf-a12f2b72.pth",
        "torchvision:regnet_x_3_2gf": "regnet_x_3_2gf-7071aa85.pth",
    }),
)
URLS = {name: address + file for address, _, files in _PUBLISHED for name, file in files.items()}
URLS |= {f"yolov5:yolov5{v}": f"{_YOLOV5}yolov5{v}.pt" for v in VARIANTS}
# how images are normalised for the weights, (image in 0...1 - mean) / std, and the padding of an EfficientNetV2.
# YOLOv5's nets take images in 0...1 without normalisation.
EXPECTS = {name: expects for _, expects, files in _PUBLISHED for name in files}


def download(name):
    """The content of a published file, by its name in URLS, from the network or from torch.hub's cache. Raises OSError
    and ValueError as `nets.pretrained.load`."""
    url, folder = URLS[name], f"{torch.hub.get_dir()}/checkpoints"
    path, digest = f"{folder}/{os.path.basename(url)}", re.search(r"-([0-9a-f]{8})\.pth$", url)
    try:
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest[1])
        return read(path)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"{name}: no network? {url} did not answer ({getattr(error, 'reason', error)}); fetch it on "
                      f"another machine and pass the file's path") from None
    except OSError as error:
        raise OSError(f"{name}: cannot be kept in {folder} ({error.strerror}); make room, or set TORCH_HOME") from None
    except Exception as error:  # another hash, or a damaged file in the cache
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"{name}: not the published file ({reason}); delete it from {folder} and try again") from None


def read(path):
    """The content of a file of weights, a dict. Of pickled modules only the tensors are read; checkpoints of the first
    edition are converted to today's layout. Raises OSError and ValueError as `nets.pretrained.load`."""
    if not os.path.isfile(path):
        raise OSError(f"{path}: no such file; give a file of weights, or one of {', '.join(URLS)}")
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen types on damaged files, OSError among them, and one on modules
        return read_module(path)  # or ValueError, with the reason
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; save a state dict")
    return checkpoint.convert(content, path) if "task" in content else content


def read_safetensors(path):
    """The state dict of a file in the safetensors format: 8 bytes with the header's length, a JSON header, the tensors'
    bytes."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
              "U8": torch.uint8, "BOOL": torch.bool}
    with open(path, "rb") as file:
        data = bytearray(file.read())
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError("its header is cut off")
        header, state = json.loads(data[8:start]), {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (first, last) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if last - first != count * dtype.itemsize or first < 0:
                raise ValueError(f"{name} has the shape {shape} and {last - first} bytes")
            state[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first).reshape(shape) \
                if count else torch.empty(shape, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    return state


_PARTS = "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"  # of nn.Module, for state_dict()


class _Inert(nn.Module):
    """Replaces every class and function that a pickle names, so that none of them is imported or called: accepts all
    arguments and keeps only what a state dict is made of."""

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        super().__init__()  # a pickle makes modules without __init__
        if isinstance(state, dict):
            self.__dict__.update({name: state[name] for name in _PARTS if name in state})


def read_module(path):
    """The state dict of a file in which a whole module was pickled, such as YOLOv5's releases, without its code.

    The module stands under "ema" (if that is not None), under "model", or alone. Returns {name: tensor} in the order of
    `Module.state_dict()`: parameters and persistent buffers in the file's dtypes (fp16 in the releases) on the CPU;
    tensors that shared memory still share it.
    Raises OSError if there is no such file, and ValueError in one line for all other faults: damaged (every record is
    checked against its CRC-32), written before torch 1.6, not a module.
    """
    with open(path, "rb") as file:
        try:
            if broken := zipfile.ZipFile(file).testzip():
                raise ValueError(f"bad CRC-32 of {broken}")
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(_Inert, name) for name in names]):
                content = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(content, dict):
                content = content.get("model") if content.get("ema") is None else content["ema"]
            if not isinstance(content, _Inert) or not content.state_dict():
                raise ValueError("there is no module in it")
            return dict(content.state_dict())
        except Exception as error:  # zipfile and torch raise a dozen types on damaged files
            reason = " ".join(str(error.__context__ or error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: holds neither plain tensors nor a module in torch's zip format ({reason}); "
                             f"fetch it again, or save a state dict with torch.save(model.state_dict(), ...)") from None
