"""Checkpoints: plain dicts of tensors, numbers, strings, lists and dicts, which are never half written.

A file is written beside its target, synced, read back, and only then renamed; the file that it replaces is kept as
`NAME.prev` on request. What is read is checked: its bytes and tensors (utils/tensors.py), then every value, see SCHEMA.
"""
import math
import os
import zipfile
from numbers import Real
from pathlib import Path

import torch

from utils import tensors
from utils.errors import UserError
from utils.files import show, whole_file, writing

REMEDY = "make room or mend the folder, then go on with --resume"
OTHER_VERSION = "{}: made by another version of this project; use that, or train again"


def save(path, state, *, keep_previous=False):
    """Writes `state` so that at every moment a valid file stands at `path` (or, while two renames are under
    way, at `path + ".prev"`). Raises UserError when the disk is full or not writable; the old file stays."""
    path = Path(path)
    with writing(path, REMEDY):
        os.stat(path.parent)  # an error if it is gone: whole_file would make it anew
        with whole_file(path, REMEDY) as temporary:
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                tensors.seal(temporary)
                _sync(temporary)
                tensors.check_records(temporary)
            except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
                while error.__context__ and not isinstance(error, OSError):
                    error = error.__context__  # torch's writer hides the system's reason behind one of its own
                raise error if isinstance(error, OSError) else OSError(str(error))
            if keep_previous and path.exists():
                os.replace(path, f"{path}.prev")
        _sync(path.parent)  # the rename itself


def _sync(path):
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def load(path, convert=None):
    """Reads a checkpoint on the CPU; falls back to `path + ".prev"` when the newer file is damaged.

    convert(content): makes a checkpoint of files of others too, which may be pickled modules; None: they are refused.
    Executes nothing in the file. Raises UserError naming the file when there is no valid one.
    """
    path = os.fspath(path)
    try:
        return _read(path, convert)
    except UserError as error:
        if not os.path.exists(f"{path}.prev"):
            raise
        state = _read(f"{path}.prev", convert)
        print(f"warning: {error}; going on from {path}.prev")
        return state


def convert(state, path):
    """A checkpoint of the first edition, which has no "input", -> the same as today's scripts write it.

    There, what the net sees stood in keys of its own, nets had other names, single_label was called exclusive, and the
    auxiliary head of the UNet presence. Raises UserError where such a key is missing.
    """
    if "input" in state or state["task"] not in ("seg", "det", "cls"):
        return state
    state, arch = dict(state), state["arch"]
    try:
        kwargs = dict(arch["kwargs"])
        inputs = {"bands": state.pop("bands"), "pixel_scale": state.pop("scale"), "imgsz": state.pop("imgsz")}
        if state["task"] == "seg":
            inputs |= {"mean_planes": state.pop("mean_planes"), "resize": state.pop("resize", False)}
            kwargs["aux_cls"] = kwargs.pop("presence", False)
            for key in ("model", "ema", "swa"):
                state[key] = {name.replace("presence.", "aux_cls."): tensor
                              for name, tensor in state[key].items()} if state.get(key) else state.get(key)
        elif state["task"] == "cls":
            inputs |= dict(zip(("mean", "std"), state.pop("norm")))
            state["single_label"] = state.pop("exclusive")
        elif state.get("optimizer"):  # its loss was a sum over the images of a step; now it is their mean
            count = state["args"]["bs"] * state["args"]["accumulate"]
            moments = {"exp_avg": count, "exp_avg_sq": count ** 2, "momentum_buffer": count}
            state["optimizer"] = state["optimizer"] | {"state": {
                i: {name: value / moments[name] if name in moments and value is not None else value
                    for name, value in entry.items()}
                for i, entry in state["optimizer"]["state"].items()}}
        name = {"UNet": "unet.UNet", "YOLOv5": "yolo.YOLOv5"}.get(arch["name"]) or kwargs.pop("name")
        score = {"seg": "iou" if state["classes"] == 1 else "miou", "det": "ap", "cls": "acc"}[state["task"]]
    except (KeyError, TypeError, AttributeError):
        raise UserError(OTHER_VERSION.format(path)) from None
    return state | {"arch": {"name": name, "kwargs": kwargs}, "input": inputs, "score": score}


def _read(path, convert):
    try:
        state = tensors.read(path, modules=convert is not None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one, or give its path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint such as "
                        f"runs/seg/exp/best.pt, and check its permissions") from None
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise UserError(f"{path}: {reason}; use another checkpoint (runs keep best.pt, last.pt and last.pt.prev)") from None
    return checked(convert(state) if convert else state, path)


def checked(state, path):
    """A checkpoint as `tensors.read` gives it -> the same, as today's scripts write it. Raises UserError for what no run
    writes."""
    if not {"task", "arch", "model"} <= state.keys():
        raise UserError(f"{path}: holds no net of this project; published weights go to train_*.py --weights")
    for name, tensor in tensors.walk(state):
        if not tensor.float().isfinite().all():  # 1e300 becomes infinite in the net
            raise UserError(f"{path}: tensor {name} is not finite; use an earlier checkpoint")
    state = convert(state, path)
    for key, kind in SCHEMA.items():
        if key in state and not _is(state[key], kind):
            raise UserError(OTHER_VERSION.format(path) + f" (its {key} is {show(state[key])})")
    return state


_COUNT, _NUMBER, _WEIGHTS = range(2**63), (int, float), {str: torch.Tensor}
_LISTS, _FLAGS = [], {}  # of numbers, texts, and lists and dicts of them
_FLAGS[str] = (None, bool, int, float, str, _LISTS, _FLAGS)
_LISTS.append(_FLAGS[str])
SCHEMA = {  # key of a checkpoint: what its value must be, see `_is`
    "task": str, "arch": _FLAGS | {"name": str, "kwargs": _FLAGS}, "input": _FLAGS,
    "args": _FLAGS | {"tile": (None, _COUNT), "overlap": _NUMBER, "canvas_border": _NUMBER,
                     "zoom": [_NUMBER, _NUMBER], "letters_per_image": [int, int], "border": [str]},
    "classes": (range(1, 2**31), [str]),
    "category_ids": [_COUNT], "single_label": bool, "threshold": (None, float, [float]), "score": (None, str),
    "model": _WEIGHTS, "ema": (None, _WEIGHTS), "swa": (None, _WEIGHTS), "ema_steps": _COUNT, "swa_count": _COUNT,
    "step": _COUNT, "steps_per_epoch": range(1, 2**63), "history": [{str: Real}], "sums": {str: _NUMBER},
    "optimizer": dict, "scaler": {str: _NUMBER}}


def _is(value, kind):
    """Whether a value is of a type, a whole number of a range, one of several kinds (a tuple), a list of a kind [kind]
    or of several in this order [kind, kind], a dict {str: kind}, in which some names may have a kind of their own, or
    None. A float is finite."""
    match kind:
        case tuple():
            return any(_is(value, one) for one in kind)
        case list():
            return isinstance(value, (list, tuple)) and len(kind) in (1, len(value)) and all(
                map(_is, value, kind * len(value)))
        case dict():
            return isinstance(value, dict) and all(
                _is(key, str) and _is(one, kind.get(key, kind.get(str))) for key, one in value.items())
        case range():
            return type(value) is int and value in kind
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, kind or type(None))


# ---- weights ---------------------------------------------------------------------------------------------------------
def load_weights(model, state, path):
    """Loads the EMA weights if the run has them, else the trained ones, into `model`, and returns it.

    Raises UserError with what differs when they belong to another net.
    """
    load_strict(model, state.get("ema") or state["model"], path)
    return model


def load_strict(model, weights, path):
    """Loads weights that have exactly the names and shapes of the model's. Else raises UserError with what differs, and
    loads nothing. A model without memory (of torch's meta device) is only compared."""
    own = model.state_dict()
    ours, theirs = ({name: tuple(t.shape) for name, t in state.items()} for state in (own, weights))
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
                    or not tensors.fits(weights[name], own[name]))
    if differ:
        first = f"{differ[0]} {theirs.get(differ[0], 'missing')} instead of {ours.get(differ[0], 'nothing')}"
        raise UserError(f"{path}: weights of another net ({len(differ)} tensors differ, such as {first}); use the "
                        f"flags that it was trained with")
    if not any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict(weights)
