"""Nets by name, as --net and --encoder give it: with a classifier, or as the encoder of another net."""
from nets import efficientnet, hrnet, regnet, repvgg

# _tv: with the padding that torchvision's weights were trained with; without it TensorFlow's, for timm's weights
NAMES = (*regnet.VARIANTS, *(f"efficientnetv2_{v}" for v in efficientnet.VARIANTS),
         *(f"efficientnetv2_{v}_tv" for v in "sml"), *(f"repvgg_{v}" for v in repvgg.VARIANTS),
         *(f"hrnet_{v}" for v in hrnet.VARIANTS))


def make(name, in_chans=3, num_classes=None, *, stem_stride=2, grad_checkpoint=False, **drop):
    """`forward(x)` -> logits (B, num_classes), `features(x)` -> maps with `.channels` and `.strides`. num_classes=None:
    an encoder, without what only the logits need.

    stem_stride is RegNetX's; the other stems halve the resolution. drop: EfficientNetV2's drop_rate, drop_path_rate.
    Raises ValueError for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"unknown net {name!r}; there are {', '.join(NAMES)}")
    kind, _, variant = name.partition("_")
    if kind == "efficientnetv2":
        padding = "symmetric" if variant.endswith("_tv") else "same"
        return efficientnet.EfficientNetV2(variant.removesuffix("_tv"), in_chans, num_classes, padding=padding,
                                           grad_checkpoint=grad_checkpoint, **drop)
    if kind == "hrnet":
        return hrnet.HRNet(variant, in_chans, num_classes, grad_checkpoint=grad_checkpoint, **drop)
    if kind == "repvgg":
        return repvgg.RepVGG(variant, in_chans, num_classes, grad_checkpoint=grad_checkpoint, **drop)
    return regnet.RegNetX(in_chans, name, num_classes, stem_stride=stem_stride, grad_checkpoint=grad_checkpoint, **drop)
