"""A second device on a machine without one: CPU tensors that say they are on cuda:0 and refuse to meet others.

With `installed()` everything that asks for the device "cuda" gets tensors of the class `There`, which hold a tensor of
the CPU. An operation on them is computed by the CPU. As on a GPU it is an error to mix both kinds (but for numbers,
indices and copies), to make a numpy array of such a tensor, or to draw from a generator of the other device.
"""
import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from utils.train import dist

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
MIXED = {aten.copy_, aten._to_copy, aten.index, aten._index_put_impl_, aten.index_put, aten.index_put_}


class There(torch.Tensor):
    computing = False  # whether gradients are being computed

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=held.device, requires_grad=requires_grad)
        made.held = held
        return made

    def __repr__(self):
        return f"There({self.held})"

    def __reduce_ex__(self, protocol):  # saved, it is a tensor like any other
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = There(self.held.clone(), self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if not isinstance(x, There) and x.ndim]
        allowed = cls.computing or func._overloadpacket in MIXED and isinstance(tensors[0], There)
        if strangers and not allowed:
            shapes = ", ".join(f"{tuple(x.shape)} {'there' if isinstance(x, There) else 'cpu'}" for x in tensors)
            raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
        inner = tree_map_only(There, lambda x: x.held, (args, kwargs))
        out = tree_map_only(torch.Tensor, There, func(*inner[0], **inner[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)


def _is_there(device):
    return device is not None and not isinstance(device, (int, torch.Tensor, torch.dtype)) \
        and str(device).startswith("cuda")


class Pretend(TorchFunctionMode):
    """Answers for the device, and for what asks for it by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return DEVICE if isinstance(first, There) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return isinstance(first, There)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(first, There):
            raise TypeError("can't convert a tensor of the other device to numpy; use Tensor.cpu()")
        if func == torch.Tensor.tolist and isinstance(first, There):
            return first.held.tolist()
        if func == torch.Tensor.new_tensor and isinstance(first, There):
            return There(first.held.new_tensor(*tree_map_only(There, lambda x: x.held, args[1:]), **kwargs))
        if func == torch.Tensor.backward:
            There.computing = True
            try:
                return func(*args, **kwargs)
            finally:
                There.computing = False
        if func == torch.Tensor.pin_memory:
            return first
        if func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.to):
            return self.move(func, first, args[1:], kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator) and _is_there(kwargs.get("device")) \
                and not getattr(kwargs["generator"], "there", False):
            raise RuntimeError(f"{name}: a generator of the CPU for the other device")
        if _is_there(kwargs.get("device")):
            kwargs["device"] = "cpu"
            values = tree_map_only(There, lambda x: x.held, (args, kwargs))
            out = func(*values[0], **values[1])
            wanted = out.requires_grad
            return There(out.detach(), wanted)
        return func(*args, **kwargs)

    @staticmethod
    def move(func, tensor, args, kwargs):
        """Tensor.to, cpu, cuda: the device by `Across`, the rest by Tensor.to."""
        args = list(args)
        target = kwargs.pop("device", None)
        if func != torch.Tensor.to:
            target, args = "cpu" if func == torch.Tensor.cpu else DEVICE, []
        elif args and isinstance(args[0], (str, torch.device)):
            target = args.pop(0)
        elif args and isinstance(args[0], torch.Tensor):
            target, args[0] = DEVICE if isinstance(args[0], There) else "cpu", args[0].dtype
        kwargs = dict(zip(("dtype", "non_blocking", "copy"), args)) | kwargs
        there = isinstance(tensor, There) if target is None else _is_there(target)
        moved = tensor if there == isinstance(tensor, There) else Across.apply(tensor, there)
        rest = {key: value for key, value in kwargs.items() if value is not None and key != "non_blocking"}
        return torch.Tensor.to(moved, **{"dtype": moved.dtype} | rest) if rest else moved


class Across(torch.autograd.Function):
    """From one device to the other, and the gradient back."""

    @staticmethod
    def forward(ctx, tensor, there):
        ctx.there = there
        return There(tensor.detach().clone()) if there else tensor.held.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.held.clone() if ctx.there else There(grad.detach().clone())), None


@contextlib.contextmanager
def installed(monkeypatch):
    """While it is entered there is a GPU, as far as torch is asked from Python."""
    monkeypatch.setattr(dist, "setup", lambda device="auto", timeout=60: DEVICE)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 2**20)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # whose tensors cannot be held by others
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretend():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.there = _is_there(device)
        return made
