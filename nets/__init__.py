"""Nets by name, as --net, --encoder and checkpoints give it.

A new net is a new file: class Mine in nets/mine.py is "mine.Mine". What the scripts ask of it:
    segmentation     forward(x): (B, C, H, W) -> logits (B, classes, H, W); `stride`: sides are multiples of it
    classification   forward(x) -> logits (B, num_classes), from a linear layer that is the last nn.Linear of the net
    encoder          features(x) -> maps, fine to coarse; `channels` and `strides` of these maps
    detection        see nets/yolo.py
"""
import importlib

from torch import nn

from nets import efficientnet, hrnet, regnet, repvgg

# short names of published nets: class, keyword arguments. _tv: with the padding that torchvision's weights were trained
# with; without it TensorFlow's, for timm's weights
_PUBLISHED = {
    **{name: ("regnet.RegNetX", {"variant": name}) for name in regnet.VARIANTS},
    **{f"efficientnetv2_{v}": ("efficientnet.EfficientNetV2", {"variant": v}) for v in efficientnet.VARIANTS},
    **{f"efficientnetv2_{v}_tv": ("efficientnet.EfficientNetV2", {"variant": v, "padding": "symmetric"})
       for v in "sml"},
    **{f"repvgg_{v}": ("repvgg.RepVGG", {"variant": v}) for v in repvgg.VARIANTS},
    **{f"hrnet_{v}": ("hrnet.HRNet", {"variant": v}) for v in hrnet.VARIANTS},
}
NAMES = tuple(_PUBLISHED)


def build(arch, **options):
    """{"name": of NAMES, or "module.Class" of this package, "kwargs": {...}}, as checkpoints have it, -> the net.

    options: further keyword arguments of the class that only training needs, such as grad_checkpoint=True; those that
    are off are not passed, because not every class has them. The name comes from flags and from files, so it never
    leads out of this package. Raises ValueError for a name that is no net here, TypeError for keyword arguments that the
    class does not have.
    """
    path, defaults = _PUBLISHED.get(arch["name"], (arch["name"], {}))
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(f"nets.{module}"), name, None) if module.isidentifier() else None
    except ModuleNotFoundError as error:
        if error.name != f"nets.{module}":  # a missing import of the user's own file
            raise
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == f"nets.{module}"):
        raise ValueError(f"{path}: no such net; give mine.Mine for class Mine in nets/mine.py, or one of "
                         f"{', '.join(NAMES)}")
    return found(**defaults | arch["kwargs"], **{name: value for name, value in options.items() if value})


def make(name, in_chans=3, num_classes=None, **kwargs):
    """A classifier by name: `forward(x)` -> logits (B, num_classes), `features(x)` -> maps with `.channels` and
    `.strides`. num_classes=None: an encoder, without what only the logits need. Errors: of `build`."""
    return build({"name": name, "kwargs": {"in_chans": in_chans, "num_classes": num_classes} | kwargs})
