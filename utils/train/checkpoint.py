"""Checkpoints: plain dicts of tensors, numbers, strings, lists and dicts, which are never half written.

A file is written beside its target, synced, read back, and only then renamed; the file that it replaces is kept as
`NAME.prev` on request. What is read is checked: its bytes and tensors (utils/tensors.py), then every value, see SCHEMA.
"""
import math
import os
import zipfile
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
                    torch.save(state | {"digest": tensors.digest(state)}, file)
                    file.flush()
                    os.fsync(file.fileno())
                tensors.check_records(temporary)
            except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
                while error.__context__ and not isinstance(error, OSError):
                    error = error.__context__  # torch's writer hides the system's reason behind one of its own
                raise error if isinstance(error, OSError) else OSError(str(error))
            if keep_previous and path.exists():
                os.replace(path, f"{path}.prev")
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


def load(path):
    """Reads a checkpoint on the CPU; falls back to `path + ".prev"` when the newer file is damaged.

    Executes nothing in the file. Raises UserError naming the file when there is no valid one.
    """
    path = os.fspath(path)
    try:
        return _read(path)
    except UserError as error:
        if not os.path.exists(f"{path}.prev"):
            raise
        state = _read(f"{path}.prev")
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


def _read(path):
    try:
        state = tensors.read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one, or give its path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint such as "
                        f"runs/seg/exp/best.pt, and check its permissions") from None
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise UserError(f"{path}: {reason}; use another checkpoint (runs keep best.pt, last.pt and last.pt.prev)") from None
    if not {"task", "arch", "model"} <= state.keys():
        raise UserError(f"{path}: holds no net of this project; published weights go to train_*.py --weights")
    if state.pop("digest", None) not in (None, tensors.digest(state)):
        raise UserError(f"{path}: its tensors were changed or exchanged; use another checkpoint")
    for name, tensor in tensors.walk(state):
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} is not finite; use an earlier checkpoint")
    state = convert(state, path)
    for key, right in SCHEMA.items():
        if key in state and not right(state[key]):
            raise UserError(f"{path}: its {key} is {show(state[key])}, which no run writes; use another checkpoint")
    if not _in_step(state):
        raise UserError(f"{path}: step {state['step']} does not belong to its history; use another checkpoint")
    return state


# ---- what the values must be -----------------------------------------------------------------------------------------
def _is_text(value):
    return isinstance(value, str)


def _is_count(value):
    return type(value) is int and value >= 0


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value, depth=5):
    """Values as flags have them: None, numbers, text, and lists and dicts of them, not nested more than they are there."""
    if isinstance(value, (list, tuple, dict)):
        children = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(child, depth - 1) for child in children)
    return value is None or _is_text(value) or isinstance(value, bool) or _is_number(value) and math.isfinite(value)


def _is_dict(right):
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(right, value.values()))


def _is_list(right):
    return lambda value: isinstance(value, list) and all(map(right, value))


def _or_none(right):
    return lambda value: value is None or right(value)


def _is_threshold(value):
    return all(_is_number(number) and 0 <= number <= 1 for number in (value if isinstance(value, list) else [value]))


_is_weights, _is_flags = _is_dict(torch.is_tensor), _is_dict(_is_plain)
SCHEMA = {  # key of a checkpoint: whether a value is right. What stands in "arch" and "input", their classes check
    "task": _is_text, "arch": lambda value: _is_flags(value) and value.keys() == {"name", "kwargs"}
    and _is_text(value["name"]) and isinstance(value["kwargs"], dict),
    "input": _is_flags, "args": _is_flags, "model": _is_weights, "ema": _or_none(_is_weights),
    "swa": _or_none(_is_weights), "threshold": _or_none(_is_threshold), "score": _or_none(_is_text),
    "classes": lambda value: value and (_is_count(value) or _is_list(_is_text)(value)),
    "category_ids": _is_list(_is_count), "single_label": lambda value: isinstance(value, bool),
    "step": _is_count, "steps_per_epoch": lambda value: _is_count(value) and value, "ema_steps": _is_count,
    "swa_count": _is_count, "history": _is_list(_is_dict(_is_number)), "sums": _is_dict(_is_number),
    "optimizer": lambda value: isinstance(value, dict),
    "scaler": _is_dict(_is_number),
}


def _in_step(state):
    """Whether the optimizer steps done lie in the epoch after those of the history."""
    if not {"step", "steps_per_epoch", "history"} <= state.keys():
        return True
    return 0 <= state["step"] - len(state["history"]) * state["steps_per_epoch"] <= state["steps_per_epoch"]


# ---- weights ---------------------------------------------------------------------------------------------------------
def load_weights(model, state, path):
    """Loads the EMA weights if the run has them, else the trained ones, into `model`, and returns it.

    Raises UserError with what differs when they belong to another net.
    """
    load_strict(model, state.get("ema") or state["model"], path)
    return model


def average(paths, states):
    """Several checkpoints of one net -> one checkpoint with the mean of their weights and buffers, a model soup
    (Wortsman et al. 2022, arXiv 2203.05482); its threshold is the mean too. Raises UserError for different nets."""
    weights = [state.get("ema") or state["model"] for state in states]
    kinds = [[*(state.get(key) for key in ("arch", "classes", "single_label", "input")),
              {name: tensor.shape for name, tensor in part.items()}] for state, part in zip(states, weights)]
    for path, kind in zip(paths, kinds):
        if kind != kinds[0]:
            raise UserError(f"{path}: is another net than {paths[0]}, and --soup averages weights of one net; leave it "
                            f"out")
    mean = {name: torch.stack([part[name].double() for part in weights]).mean(0).to(tensor.dtype)
            for name, tensor in weights[0].items()}
    found = [state["threshold"] for state in states if state.get("threshold") is not None]
    threshold = torch.tensor(found, dtype=torch.float64).mean(0).tolist() if found else None
    return states[0] | {"model": mean, "ema": None, "threshold": threshold}


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
