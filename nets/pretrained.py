"""Published weights for our nets, tensor for tensor: from timm, torchvision, YOLOv5, and our own checkpoints.

    pretrained.checkpoint("yolov5n.pt", "det")        what such a file holds, as a checkpoint of ours

    pretrained.load(model, "timm:regnetx_002")        downloads once (torch.hub's cache), checks the file's hash
    pretrained.load(model, "yolov5:yolov5s")          the same without a hash, because none is published
    pretrained.load(model, "weights.safetensors")     or .pth, .pt: no network

The published files are in nets/weights.py, the readers of all formats in utils/tensors.py.
"""
import contextlib
import functools
import os
import re

import torch

import nets
from nets.weights import (EXPECTS, HALF, IMAGENET, NONE, SAME, STEM, SYMMETRIC, URLS, download, missing, our_names, read,
                          to_timm_names, unwrap, verified)
from nets.yolo import SIZES
from utils import tensors
from utils.errors import UserError, answers_for
from utils.files import read_bytes
from utils.train import checkpoint as checkpoints
from utils.train import dist

# prefixes of layers that depend on the task and its data; the rest is the encoder. A net may have its own
# `task_prefixes`.
TASK = ("conv0.", "decoder.", "head.", "aux_cls.",  # UNet's
        "conv_head.", "bn2.", "classifier.",  # EfficientNetV2's head
        "incre_modules.", "downsamp_modules.", "final_layer.")  # HRNet's
FAMILIES = {  # of classifiers: the tensors that tell the input's bands and the classes
    "regnetx": ("stem.conv.weight", "head.fc.bias"), "repvgg": ("stem.conv_kxk.conv.weight", "head.fc.bias"),
    "efficientnetv2": ("conv_stem.weight", "classifier.bias"), "hrnet": ("conv1.weight", "classifier.bias"),
}
# sides of the images that published classifiers were tested with; others 224
SIDES = {"efficientnetv2_s": 384, "efficientnetv2_m": 480, "efficientnetv2_l": 480}
KINDS = (  # start of a tensor's name, as a regular expression: the net that has it; the first one counts
    (r"model\.0\.conv\.bias", "a net whose batch norms are fused into its convolutions"),
    (r"model\.\d+\.proto\.", "a segmentation net"), (r"model\.\d+\.cv4\.\d", "a net for poses or rotated boxes"),
    (r"model\.\d+\.one2one", "a YOLOv10 or YOLO26"), (r"model\.22\.cv3\.", "a YOLOv8 or YOLOv9"),
    (r"model\.23\.cv3\.\d", "a YOLO11 or YOLO12"),
)


# ---- checkpoints of others -------------------------------------------------------------------------------------------
def checkpoint(path_or_name, task, names=None):
    """Reads a checkpoint as `utils.train.checkpoint.load` does. Published weights and weights of other projects become
    one too, see `as_checkpoint`. path_or_name: as in `load`. Raises UserError."""
    with answers_for("--weights"):
        path = verified(path_or_name)
    convert = functools.partial(as_checkpoint, task=task, path=path, names=names)
    if path in URLS:
        with answers_for("--weights"):
            return checkpoints.checked(convert(download(path)), path)
    if not any(map(os.path.isfile, (path, f"{path}.prev"))):
        raise UserError(f"--weights {missing(path, task)}")
    return checkpoints.load(path, convert)


def as_checkpoint(content, task, path, names):
    """What a file of weights holds -> a checkpoint of ours: ours as it is, the tensors of a YOLOv5 or an ImageNet
    classifier as if they had been trained here. Variant, classes, bands, anchors and head are read from the tensors;
    what was understood is printed.

    names: a text file with a class name per line, for files that have none; None: the classes are numbers. Category
    ids count from 0. Raises UserError for other nets.
    """
    if "task" in content or task == "seg":
        return content
    state, detects = our_names(content), task == "det"
    arch = fitting(state, detectors if detects else classifiers)
    if not arch:
        kinds = (kind for pattern, kind in KINDS if any(re.match(pattern, name) for name in unwrap(content)))
        raise UserError(f"{path}: is {next(kinds, 'pruned, or another net')}; give a YOLOv5 of release 4.0 to 7.0 or "
                        f"YOLOv5u for --task det, a RegNetX, EfficientNetV2, RepVGG or HRNet for --task cls")
    kwargs = arch["kwargs"]
    expects = expectations(path, content)
    bands, count = [*range(1, kwargs["in_chans"] + 1)], kwargs["num_classes"]
    classes, name = name_classes(content, count, path, names), kwargs.get("variant", arch["name"])
    arch["name"] += "_tv" * (expects.get("padding") == "symmetric")
    mean, std = normalisation(None, len(bands), NONE if detects else expects)
    dist.print0(f"{path}: variant {name}, {count} classes: {', '.join(classes[:20])}")
    return {"task": task, "arch": arch, "classes": classes, "single_label": True, "model": state,
            "category_ids": [*range(count)],
            "input": {"bands": bands, "pixel_scale": 255.0, "mean": mean, "std": std,
                      "imgsz": SIDES.get(name, 224) if not detects else 1280 if "6" in name else 640},
            # of no data; --tta without names mirrors; images are not enlarged and get no border
            "args": {"data": path, "hflip": 0.5, "rot90": False, "canvas_border": 0}}


def fitting(state, candidates):
    """The first "arch" of the candidates(state) whose tensors have the names and shapes of a state dict, or None."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    # a state dict may lack the tensors that tell the net, or have them in shapes of which no net can be built
    strange = LookupError, TypeError, ValueError, RuntimeError, ArithmeticError
    with contextlib.suppress(*strange), torch.device("meta"):
        for arch in candidates(state):
            if shapes == {name: tensor.shape for name, tensor in nets.build(arch).state_dict().items()}:
                return arch


def detectors(state):
    """Yields the "arch" of the YOLOv5 nets that a state dict may belong to."""
    kind, head = ("6", "model.33.") if "model.32.cv3.conv.weight" in state else ("", "model.24.")
    kwargs, anchors = {"in_chans": state["model.0.conv.weight"].shape[1]}, state.get(f"{head}anchors")
    if anchors is None:
        kwargs |= {"head": "dense", "num_classes": len(state[f"{head}cv3.0.2.bias"])}
    else:
        kwargs |= {"anchors": [0.0] * anchors.numel(),  # how many they are: their sizes are a tensor of the state
                   "num_classes": len(state[f"{head}m.0.bias"]) // anchors.shape[1] - 5}
    for size in SIZES:
        for release in ("", "_v5"):
            yield {"name": "yolo.YOLOv5", "kwargs": kwargs | {"variant": size + kind + release}}


def classifiers(state):
    """Yields the "arch" of the classifiers that a state dict may belong to."""
    for name in nets.NAMES:
        stem, last = FAMILIES[name.partition("_")[0]]
        if stem in state:
            yield {"name": name, "kwargs": {"in_chans": state[stem].shape[1], "num_classes": len(state[last])}}


def name_classes(content, count, path, file):
    """-> `count` class names: of the content of a file of weights, else of the text file `file`, else numbers."""
    names = tensors.class_names(content.get("names"))
    if file and not names:
        names = tensors.class_names(read_bytes(file).decode("utf-8", "replace").splitlines())
        if len(names) != count:
            raise UserError(f"--names {file}: has {len(names)} lines for the {count} classes of {path}; write one per class")
    return [names.get(k) or str(k) for k in range(count)]


# ---- weights for training --------------------------------------------------------------------------------------------
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
    state, ours = our_names(content), model.state_dict()
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


def freeze(model, part):
    """Freezes the first `part` layers of a net, or its "backbone", which published weights fill; the last layer is always
    trained. None: nothing. Frozen layers get no gradients, and keep their running statistics: train() does not reach them.
    """
    count = getattr(model, "backbone", None) if part == "backbone" else part or 0
    for k, (name, layer) in enumerate([*getattr(model, "model", model).named_children()][:-1]):
        if not f"{name}.".startswith(TASK) if count is None else k < count:
            layer.requires_grad_(False).eval().train = lambda mode=True: None


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
    names, torchvision = to_timm_names(state), STEM in state
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
