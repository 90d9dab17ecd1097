"""Detection: our training step, prediction and validation against the same net run as the 2022 system ran it.

    python -m tests.bench.det_speed [--variant s] [--size 640] [--bs 4] [--rounds 5] [--head free anchor] [--compile]

"as in 2022": the anchor head in fp32, NCHW, unfused SGD, memory as glibc gives it; prediction in fp32 with batch norms.
Its loss is ours, so that the ratio owes nothing to that. Ours: train_det.py's way (autocast where the hardware has
bf16, channels-last, fused optimizer, EMA, freed memory kept) and prediction as predict.py does it. All in turn,
`rounds` times. The fastest round counts: noise only adds. Validation: what shares suppression and the metric have. Nets
at their start find nothing and random outputs overwhelm suppression, so those here are trained for --brief steps on the
very rectangles that they are to find.
"""
import argparse
import copy

import torch

from data import det
from nets.yolo import BINS, YOLOv5
from tests.bench.timing import clock, in_turn, prepared, show, training_step, with_plain_memory
from train_det import GAINS
from utils.metrics.average_precision import DetectionAP
from utils.losses import detection as losses_det
from utils.ops import boxes, decide
from utils.train import dist, optim
from utils.train.state import autocast, precision

NAMES = ["red", "green", "blue"]
OLD = "as in 2022"


def rectangles(count, size):
    """-> raw images (count, 3, size, size) uint8, channels-last, noise with 8 rectangles each; rows (n, 6) of image,
    class, x1, y1, x2, y2."""
    g = torch.Generator().manual_seed(0)
    raw, rows = torch.randint(80, 150, (count, size, size, 3), dtype=torch.uint8, generator=g), []
    for i in range(count):
        for _ in range(8):
            w, h = torch.randint(size // 16, size // 4, (2,), generator=g).tolist()
            x, y, label = (int(torch.randint(n, (), generator=g)) for n in (size - w, size - h, 3))
            raw[i, y:y + h, x:x + w, label] = 230
            rows.append((i, label, x, y, x + w, y + h))
    return raw.permute(0, 3, 1, 2), torch.tensor(rows, dtype=torch.float32)


def loss_of(model, x, targets):
    head = model.head
    if hasattr(head, "anchors"):
        weights = {name: GAINS["anchor"][name] for name in ("box", "obj", "cls")}
        return losses_det.anchor_loss(model(x), targets, head.anchors, head.strides, **weights)[0]
    weights = {name: GAINS["free"][name] for name in ("box", "dfl", "cls")}
    return losses_det.free_loss(model(x), targets, head.strides, BINS, **weights)[0]


def trainer(model, ours, raw, targets, device, amp):
    """-> a function that does one step and returns the seconds of (forward and loss, backward, optimizer)."""
    layout = torch.channels_last if ours else torch.contiguous_format
    model.train().to(device, memory_format=layout)
    if ours:
        optimizer = optim.make_optimizer("adamw", optim.param_groups(model, 0.05), lr=2e-3)
        ema = optim.make_ema(model, 1000)
    else:
        optimizer, ema = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.937, nesterov=True, foreach=False,
                                         fused=False), None
    x = (raw.to(device).float() / 255).contiguous(memory_format=layout)
    targets, dtype = targets.to(device), precision(amp, device) if ours else None
    return training_step(lambda: loss_of(model, x, targets), model, optimizer, device, dtype=dtype, ema=ema)


def predictors(nets, arch, raw, device, compiled, bs, amp):
    """-> {name: function that predicts the images and returns seconds per image}. nets: {head: trained briefly}."""
    def timed(function):
        def run():
            began = clock(device)
            with torch.inference_mode():
                for start in range(0, len(raw), bs):
                    function(raw[start:start + bs])
            return (clock(device) - began) / len(raw)
        return run

    limits = dict(conf=0.01, iou=0.7, max_det=300)  # of predict.py
    inputs, made = det.Input([1, 2, 3], 255.0, raw.shape[2]), {}
    if "anchor" in nets:
        before = YOLOv5(**arch, head="anchor").eval()
        before.load_state_dict(nets["anchor"].state_dict())
        before.to(device, memory_format=torch.contiguous_format)
        made[OLD] = with_plain_memory(timed(
            lambda x: boxes.nms(before(x.to(device).contiguous().float() / 255), **limits)))
    for head, net in nets.items():
        for compile in (False, True)[:1 + compiled]:
            ours = prepared(copy.deepcopy(net).eval(), device, compile, amp)
            made[f"ours, {head}{', --compile' * compile}"] = timed(
                lambda x, net=ours: decide.detect(net, inputs(x.to(device)), **limits))
    return made


def validate(model, raw, targets, device, bs, amp):
    """-> seconds of the (net, suppression, DetectionAP) for all images, detections per image, scores."""
    metric, spent, count = DetectionAP(len(NAMES)), [0.0] * 3, 0
    model.eval()
    for start in range(0, len(raw), bs):
        times = [clock(device)]
        with torch.inference_mode(), autocast(device, precision(amp, device)):
            rows = model((raw[start:start + bs].to(device).float() / 255).contiguous(memory_format=torch.channels_last))
            times.append(clock(device))
            found = boxes.nms(rows, conf=0.001, iou=0.65, max_det=300)
        times.append(clock(device))
        truths = [targets[targets[:, 0] == k, 1:].roll(-1, 1) for k in range(start, start + len(found))]
        metric.update(found, truths)
        times.append(clock(device))
        spent = [s + b - a for s, a, b in zip(spent, times, times[1:])]
        count += sum(map(len, found))
    began = clock(device)
    scores = metric.compute()
    return [*spent[:2], spent[2] + clock(device) - began], count / len(raw), scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="s")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--head", nargs="+", choices=("anchor", "free"), default=["anchor", "free"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="to predict and to validate on")
    parser.add_argument("--brief", type=int, default=40, help="training steps at half the size, before prediction")
    parser.add_argument("--compile", action="store_true", help="prediction with --compile too (minutes to build)")
    parser.add_argument("--amp", default="auto", help="ours: auto, or off for fp32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = dist.setup(args.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, precision "
          f"{precision(args.amp, device)}, variant {args.variant}, {args.size} x {args.size}, batch {args.bs}")
    torch.manual_seed(0)
    arch = {"variant": args.variant, "num_classes": len(NAMES)}
    raw, targets = rectangles(args.images, args.size)
    batch = raw[:args.bs], targets[targets[:, 0] < args.bs]

    steps = {OLD: with_plain_memory(trainer(YOLOv5(**arch, head="anchor"), False, *batch, device, args.amp))}
    steps |= {f"ours, {head}": trainer(YOLOv5(**arch, head=head), True, *batch, device, args.amp) for head in args.head}
    show("training", in_turn(steps, args.rounds), args.bs, OLD)

    nets = {head: YOLOv5(**arch, head=head) for head in dict.fromkeys(("anchor", *args.head))}
    small, rows = rectangles(args.bs, args.size // 64 * 32)
    for net in nets.values():
        step = trainer(net, True, small, rows, device, args.amp)
        for _ in range(args.brief):
            step()
    best = {name: min(taken) for name, taken in
            in_turn(predictors(nets, arch, raw, device, args.compile, args.bs, args.amp), args.rounds).items()}
    for name, taken in best.items():
        print(f"prediction {name}: {1 / taken:.2f} img/s, ratio {best[OLD] / taken:.2f}", flush=True)
    for head in args.head:
        runs = [validate(nets[head], raw, targets, device, args.bs, args.amp) for _ in range(3)]
        (net, nms, ap), count, scores = min(runs, key=lambda run: sum(run[0]))
        net, nms, ap = (1000 * seconds / len(raw) for seconds in (net, nms, ap))
        total = net + nms + ap
        print(f"validation {head}: net {net:.1f} ms/img, suppression {nms:.2f} ms/img ({nms / total:.1%}), DetectionAP "
              f"{ap:.2f} ms/img ({ap / total:.1%}); {count:.0f} detections per image, AP50 {scores['ap50']:.2f}")


if __name__ == "__main__":
    main()
