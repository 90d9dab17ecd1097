"""Classification: our training step and prediction against timm's net of the same name.

    python -m tests.bench.cls_speed [--net efficientnetv2_s] [--size 256] [--bs 8] [--rounds 5] [--compile]

"timm as it comes": fp32, NCHW, Adam with its default kernels, no averaged weights; prediction with batch norms. "timm,
same numerics": timm's net in our loop: our precision, channels-last, fused Adam, EMA; prediction in our precision and
memory format, but with its batch norms. Ours: the step as train_cls.py does it, prediction as predict.py does it (batch
norms fused; compiled, the weights are constants, for timm's net too). All in turn, `rounds` times. The fastest round
counts: noise only adds.
"""
import argparse

import timm
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import nets
from tests.bench.timing import clock, in_turn, prepared, show, training_step
from utils import losses
from utils.train import dist, optim
from utils.train.state import precision

CLASSES, PLAIN, SAME = 26, "timm as it comes", "timm, same numerics"


def make(name, ours):
    """The net with the recipe's dropout; timm calls EfficientNetV2 with TensorFlow's padding tf_..."""
    drop = {"drop_rate": 0.5, "drop_path_rate": 0.2} if name.startswith("efficientnetv2") else {}
    torch.manual_seed(0)
    if ours:
        return nets.make(name, 1, CLASSES, **drop)
    name = f"tf_{name}" if name.startswith("efficientnetv2") else name
    return timm.create_model(name, in_chans=1, num_classes=CLASSES, **drop)


def trainer(model, our_way, x, y, device, amp):
    """-> a function that does one step and returns the seconds of (forward and loss, backward, optimizer)."""
    layout = torch.channels_last if our_way else torch.contiguous_format
    model.train().to(device, memory_format=layout)
    x, y = x.to(device, memory_format=layout), y.to(device)
    if our_way:
        optimizer = optim.make_optimizer("adam", optim.param_groups(model, 1e-5), lr=1e-3, eps=1e-6)
        ema = optim.make_ema(model, 1000)
    else:
        optimizer, ema = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5), None
    dtype = precision(amp, device) if our_way else None

    def loss():
        logits = model(x)
        return losses.bce(logits, y) if our_way else binary_cross_entropy_with_logits(logits, y)
    return training_step(loss, model, optimizer, device, dtype=dtype, ema=ema)


def predictors(name, x, device, compiled, amp):
    """-> {name: function that predicts the batch and returns seconds per image}."""
    def timed(net, dtype, layout, compile=False):
        net.eval().to(device, dtype, memory_format=layout)
        if compile:
            net.compile()

        def run():
            began = clock(device)
            with torch.inference_mode():
                net(x.to(device, dtype, memory_format=layout)).float().sigmoid().cpu()
            return (clock(device) - began) / len(x)
        return run

    ours = precision(amp, device) or torch.float32, torch.channels_last
    made = {PLAIN: timed(make(name, False), torch.float32, torch.contiguous_format)}
    for compile in (False, True)[:1 + compiled]:
        made[SAME + ", --compile" * compile] = timed(make(name, False), *ours, compile)
        made["ours" + ", --compile" * compile] = timed(prepared(make(name, True).eval(), device, compile, amp), *ours)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=[n for n in nets.NAMES if not n.endswith("_tv")],
                        default="efficientnetv2_s")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="prediction with --compile too (minutes to build)")
    parser.add_argument("--amp", default="auto", help="ours: auto, or off for fp32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = dist.setup(args.device)
    torch.backends.cudnn.benchmark = True  # as engine.seed_everything
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}, precision "
          f"{precision(args.amp, device)}, {args.net}, {args.size} x {args.size}, batch {args.bs}")
    torch.manual_seed(0)
    x, y = torch.randn(args.bs, 1, args.size, args.size), torch.randint(0, 2, (args.bs, CLASSES)).float()

    steps = {PLAIN: trainer(make(args.net, False), False, x, y, device, args.amp),
             SAME: trainer(make(args.net, False), True, x, y, device, args.amp),
             "ours": trainer(make(args.net, True), True, x, y, device, args.amp)}
    taken = show("training", in_turn(steps, args.rounds), args.bs, PLAIN)
    print(f"training ratio of ours to {SAME}: {taken[SAME] / taken['ours']:.2f}")

    best = {name: min(taken) for name, taken in
            in_turn(predictors(args.net, x, device, args.compile, args.amp), args.rounds).items()}
    for name, taken in best.items():
        print(f"prediction {name}: {1 / taken:.2f} img/s, ratio {best[PLAIN] / taken:.2f}", flush=True)
    print(f"prediction ratio of ours to {SAME}: {best[SAME] / best['ours']:.2f}")


if __name__ == "__main__":
    main()
