"""State dicts of files in which a whole module was pickled, such as YOLOv5's releases, without the module's code.

    state = unpickle.read_module("yolov5s.pt")        {"model.0.conv.weight": tensor, ...}

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other class or function that a
pickle names. Here each of these names stands for a class that does nothing but keep a module's parameters, buffers and
submodules. So nothing that the file names is imported or called.
"""
import zipfile

import torch
from torch import nn

_PARTS = "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"  # of nn.Module, for state_dict()


class _Inert(nn.Module):
    """Stands for any object of a pickle: accepts all arguments and keeps only what a state dict is made of."""

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        super().__init__()  # a pickle makes modules without __init__
        if isinstance(state, dict):
            self.__dict__.update({name: state[name] for name in _PARTS if name in state})


def read_module(path):
    """The module under "ema" (if it is not None) or "model", or the file's only content -> its state dict.

    Returns {name: tensor} in the order of `Module.state_dict()`: parameters and persistent buffers in the file's dtypes
    (fp16 in the releases) on the CPU; tensors that shared memory still share it.
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
