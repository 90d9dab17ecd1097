"""Files of weights: which are published where, how they are read, and what other libraries call their tensors.

utils/tensors.py reads the formats; nothing in a file is executed.
"""
import hashlib
import os
import re
from pathlib import Path
from urllib.error import URLError

import torch

from nets.efficientnet import STAGES, ConvBnAct, FusedMBConv, MBConv
from nets.yolo import VARIANTS
from utils import tensors
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


def missing(path, task="cls"):
    """The line about a file that does not exist, with the published names for this task."""
    names = [name for name in URLS if name.startswith("yolov5:") == (task == "det")]
    return f"{path}: no such checkpoint, no such file of weights; give one, or one of {', '.join(names)}"


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


def verified(path):
    """The path without `:sha256=HEX` behind it. Raises ValueError where a file is there and does not have this hash."""
    path, _, wanted = os.fspath(path).partition(":sha256=")
    if wanted and os.path.isfile(path) and hashlib.sha256(Path(path).read_bytes()).hexdigest() != wanted.lower():
        raise ValueError(f"{path}: has another SHA-256; fetch it again")
    return path


def read(path):
    """The content of a file of weights, a dict. Of pickled modules only the tensors are read; checkpoints of the first
    edition are converted to today's layout. path: see `verified`. Raises OSError and ValueError as
    `nets.pretrained.load`."""
    path = verified(path)
    if not os.path.isfile(path):
        raise OSError(missing(path))
    content = tensors.read(path, modules=True)
    return checkpoint.checked(content, path) if "task" in content else content


# ---- names of tensors ------------------------------------------------------------------------------------------------
# torchvision's names -> timm's
STEM = "features.0.0.weight"  # in torchvision's EfficientNetV2, and not in timm's
_EFFICIENTNET_PARTS = {
    ConvBnAct: {"0.0": "conv", "0.1": "bn1"},
    FusedMBConv: {"0.0": "conv_exp", "0.1": "bn1", "1.0": "conv_pwl", "1.1": "bn2"},
    MBConv: {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2.fc1": "se.conv_reduce",
             "2.fc2": "se.conv_expand", "3.0": "conv_pwl", "3.1": "bn3"},
}
_REGNET_RULES = (  # regular expression, replacement; applied one after the other
    (r"^fc\.", "head.fc."),
    (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", lambda match: f"s{match[1]}.b{int(match[2]) + 1}."),
    (r"\.proj\.", ".downsample."), (r"\.f\.a\.", ".conv1."), (r"\.f\.b\.", ".conv2."), (r"\.f\.c\.", ".conv3."),
    (r"(^stem|\.downsample|\.conv\d)\.0\.", r"\1.conv."), (r"(^stem|\.downsample|\.conv\d)\.1\.", r"\1.bn."),
)
# the old stem, and the box branch of YOLOv5u
_YOLO_RULES = (r"^model\.0\.conv\.(?=conv|bn)", "model.0."), (r"^(model\.\d+)\.cv2(?=\.\d)", r"\1.box")


def unwrap(content):
    """The state dict inside a training checkpoint, EMA weights first, without the prefixes of DDP, torch.compile and other
    wrappers."""
    for key in ("ema", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {re.sub(r"^(module\.|_orig_mod\.|model\.(?=model\.))+", "", str(name)): value
            for name, value in content.items() if isinstance(value, torch.Tensor)}


def our_names(content):
    """What a file of weights holds -> its state dict with the names and shapes that our nets have.

    The stem of YOLOv5's releases 4.0 and 5.0 took every second pixel of every second row in four turns and convolved the
    12 channels by 3x3: this is a 6x6 convolution of stride 2, whose weights are in another order. Constants of heads
    (anchors in pixels, numbers of bins) are left out, because our nets compute them.
    """
    state = _renamed(to_timm_names(unwrap(content)), _YOLO_RULES)
    stem = state.get("model.0.conv.weight")
    if stem is not None and stem.shape[1:] == (12, 3, 3):
        state["model.0.conv.weight"] = stem.unflatten(1, (2, 2, 3)).permute(0, 3, 4, 2, 5, 1).reshape(-1, 3, 6, 6)
    return {name: tensor for name, tensor in state.items() if not name.endswith((".anchor_grid", ".dfl.conv.weight"))}


def to_timm_names(state):
    """A state dict with torchvision's names of a RegNet or an EfficientNetV2 -> with timm's names, which are ours.
    Other state dicts are returned as they are."""
    if STEM in state:
        return {_efficientnet_name(name): tensor for name, tensor in state.items()}
    if not any(name.startswith("trunk_output.") for name in state):
        return state
    return _renamed(state, _REGNET_RULES)


def _renamed(state, rules):
    """The state dict with the rules (regular expression, replacement) applied to its names, one after the other."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _efficientnet_name(name):
    """torchvision's name of a tensor of an EfficientNetV2 -> timm's."""
    if match := re.fullmatch(r"features\.([1-7])\.(\d+)\.block\.(\d\.\w+)\.(\w+)", name):
        stage = int(match[1]) - 1
        part = _EFFICIENTNET_PARTS[STAGES[stage][0]].get(match[3], match[3])
        return f"blocks.{stage}.{match[2]}.{part}.{match[4]}"
    if match := re.fullmatch(r"features\.(\d)\.([01])\.(\w+)", name):
        layers = ("conv_stem", "bn1") if match[1] == "0" else ("conv_head", "bn2")
        return f"{layers[int(match[2])]}.{match[3]}"
    return name.replace("classifier.1.", "classifier.")
