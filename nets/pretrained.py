"""Published weights for our nets, tensor for tensor: from timm, torchvision, YOLOv5, and our own checkpoints.

    pretrained.load(model, "timm:regnetx_002")        downloads once (torch.hub's cache), checks the file's hash
    pretrained.load(model, "yolov5:yolov5s")          the same without a hash, because none is published
    pretrained.load(model, "weights.safetensors")     or .pth, .pt: no network

The published files are in nets/weights.py, the readers of all formats in utils/tensors.py.
"""
import os
import re

import torch

from nets.efficientnet import STAGES, ConvBnAct, FusedMBConv, MBConv
from nets.weights import EXPECTS, HALF, IMAGENET, NONE, SAME, SYMMETRIC, URLS, download, read
from utils import tensors

# prefixes of layers that depend on the task and its data; the rest is the encoder. A net may have its own
# `task_prefixes`.
TASK = ("conv0.", "decoder.", "head.", "aux_cls.",  # UNet's
        "conv_head.", "bn2.", "classifier.",  # EfficientNetV2's head
        "incre_modules.", "downsamp_modules.", "final_layer.")  # HRNet's

# torchvision's names -> timm's
_STEM = "features.0.0.weight"  # in torchvision's EfficientNetV2, and not in timm's
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


def load(model, path_or_name):
    """Copies the tensors that fit from a file (or a name in URLS) into `model`, or into its `encoder`.

    A first convolution with another number of input bands is adapted (RepVGG has two of them). The encoder must fit
    completely, because half an encoder means that the wrong net was chosen; it is all tensors but those whose names
    start with one of `model.task_prefixes` (TASK if the model has none). The anchors of a detector are loaded where
    their shape fits, because its head was trained for them. How images must be normalised: `normalisation`.
    Returns {"loaded", "adapted", "unused", "missing"}: lists of tensor names, in "unused" the file's names, in the
    others the model's; and "sha256", the hash of a file whose format has no checksums, else None.
    Raises OSError when the file cannot be had; ValueError when it is damaged, holds weights of another net, or weights
    of an EfficientNetV2 that was trained with the other padding: it would run and be worse.
    """
    content = download(path_or_name) if path_or_name in URLS else read(path_or_name)
    state, ours = to_timm_names(unwrap(content)), model.state_dict()
    # a whole net fits as it is; a classifier fits into the encoder of another net
    prefix = max(("", "encoder."), key=lambda p: sum(p + name in ours for name in state))
    first = next((name for name, t in ours.items() if name.startswith(prefix) and t.ndim == 4), "")
    see_input = first, first.replace("stem.conv_kxk.", "stem.conv_1x1.")  # RepVGG: two branches
    loaded, adapted, unused = {}, [], []
    for name, tensor in state.items():
        target = ours.get(prefix + name)
        if target is None:
            unused.append(name)
            continue
        if prefix + name in see_input and tensor.shape != target.shape and tensor.shape[::2] == target.shape[::2]:
            tensor = adapt_input(tensor, target.shape[1])
            adapted.append(prefix + name)
        if tensor.shape != target.shape:
            unused.append(name)
        elif not tensors.fits(tensor, target):
            raise ValueError(f"{path_or_name}: tensor {name} is not finite, or not of {target.dtype}; fetch the file "
                             f"again")
        else:
            loaded[prefix + name] = tensor
    missing = [name for name in ours if name not in loaded]
    both, task = state | ours, tuple(getattr(model, "task_prefixes", TASK))
    wrong = [n for n in unused + missing if not n.startswith(task) and both[n].ndim]  # ndim 0: counters of batch norms
    if wrong:
        raise ValueError(f"{path_or_name}: no match for {wrong[0]} ({len(loaded)} of the file's {len(state)} tensors "
                         f"fit this net); choose the net that these weights belong to")
    wanted = expectations(path_or_name, content).get("padding")
    padding = getattr(getattr(model, "encoder", model), "padding", wanted)
    if wanted and padding != wanted:
        raise ValueError(f"{path_or_name}: trained with padding {wanted!r}, the net has {padding!r}; choose the net "
                         f"with the other padding (efficientnetv2_s for timm's weights, efficientnetv2_s_tv for "
                         f"torchvision's)")
    model.load_state_dict(loaded, strict=False)
    file = os.fspath(path_or_name).partition(":sha256=")[0]
    return {"loaded": list(loaded), "adapted": adapted, "unused": unused, "missing": missing,
            "sha256": None if file in URLS else tensors.sha256(file)}


def normalisation(path_or_name, bands, default=HALF):
    """How images in 0...1 must be normalised for weights: [means, standard deviations], one number per band.

    path_or_name: as in `load`; None without weights: the default, {"mean", "std"}. Where the weights were trained with
    another number of bands, both lists hold one number for all bands.
    """
    expects = expectations(path_or_name) if path_or_name else default
    values = [list(expects["mean"]), list(expects["std"])]
    return values if len(values[0]) == bands else [[sum(numbers) / len(numbers)] for numbers in values]


def classes(path_or_name):
    """(class names, whether every image has one class) of a checkpoint of our classifiers; None for other weights."""
    content = {} if path_or_name in URLS else read(path_or_name)
    return (content["classes"], content["single_label"]) if "single_label" in content else None


def expectations(path_or_name, content=None):
    """How weights were trained: {"mean", "std"} of images in 0...1 and, if it is known, an EfficientNetV2's "padding".

    content: what the file holds. Published files are in EXPECTS, our own checkpoints state it. For other files it is inferred:
    torchvision's names imply the padding, and the widths tell timm's EfficientNetV2 S, M, L and torchvision's L, which
    were trained on -1...1; all others with ImageNet's mean and deviation. (timm's B3 has both kinds; -1...1 is assumed.)
    """
    if path_or_name in EXPECTS:
        return EXPECTS[path_or_name]
    content = read(path_or_name) if content is None else content
    state = unwrap(content)
    names, torchvision = to_timm_names(state), _STEM in state
    stem, first = (len(names.get(name, ())) for name in ("conv_stem.weight", "blocks.0.0.conv.weight"))
    halved = stem == 32 if torchvision else first > 16 or stem == 40
    expects = (HALF if halved else IMAGENET) | (SYMMETRIC if torchvision else {})
    if "task" in content:  # our own checkpoint
        expects |= NONE | {key: value for key, value in content.get("input", {}).items() if key in NONE}
        net = content["arch"].get("kwargs", {}).get("encoder", content["arch"].get("name", ""))
        if net.startswith("efficientnetv2"):
            expects |= SYMMETRIC if net.endswith("_tv") else SAME
    return expects


def describe(report):
    """The report of `load` as one line."""
    def names(key):
        top = sorted({".".join(n.split(".")[:1 + n.startswith(("encoder.", "model."))]) for n in report[key]})
        return f"{len(report[key])} ({', '.join(top[:6])})" if top else "0"

    return (f"weights: {len(report['loaded'])} tensors loaded, {len(report['adapted'])} adapted to the input bands, "
            f"not used: {names('unused')}, left as initialised: {names('missing')}"
            + (f"; the file's format has no checksums, --weights FILE:sha256={report['sha256']} compares this one"
               if report["sha256"] else ""))


def unwrap(content):
    """The state dict inside a training checkpoint, EMA weights first, without the prefixes of DDP and torch.compile."""
    for key in ("ema", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in content.items()
            if isinstance(value, torch.Tensor)}


def to_timm_names(state):
    """A state dict with torchvision's names of a RegNet or an EfficientNetV2 -> with timm's names, which are ours.
    Other state dicts are returned as they are."""
    if _STEM in state:
        return {_efficientnet_name(name): tensor for name, tensor in state.items()}
    if not any(name.startswith("trunk_output.") for name in state):
        return state
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _REGNET_RULES:
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


def adapt_input(weight, in_chans):
    """A convolution's weight (O, I, k, k) -> (O, in_chans, k, k), as timm's `adapt_input_conv`.

    One band gets the sum over the bands, so that a grey image gives the same result as in RGB. More bands repeat the
    weights in turn, scaled so that the response to a flat image stays.
    """
    bands = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True)
    repeated = weight.float().repeat(1, -(-in_chans // bands), 1, 1)[:, :in_chans]
    return repeated * (bands / in_chans)
