"""Files of weights: which are published where, and how they are read.

utils/tensors.py reads the formats; nothing in a file is executed.
"""
import hashlib
import os
import re
from pathlib import Path
from urllib.error import URLError

import torch

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
    edition are converted to today's layout. path: with `:sha256=HEX` behind it, the file must have this hash. Raises
    OSError and ValueError as `nets.pretrained.load`."""
    path, _, wanted = os.fspath(path).partition(":sha256=")
    if not os.path.isfile(path):
        raise OSError(f"{path}: no such file; give a file of weights, or one of {', '.join(URLS)}")
    if wanted and hashlib.sha256(Path(path).read_bytes()).hexdigest() != wanted.lower():
        raise ValueError(f"{path}: has another SHA-256; fetch it again")
    content = tensors.read(path, modules=True)
    return checkpoint.checked(content, path) if "task" in content else content
