"""The flags that mean the same in every script, and what happens between the command line and the run."""
import argparse
import copy
import math

from utils.pictures import charts, table
from utils.train import dist, optim, runs
from utils.errors import Parser, UserError
from utils.files import write_json
from utils.train.swa import SWA, with_swa


KEPT = ("weights", "preset", "folds", "fold", "groups", "drop_noisy")  # a resumed run's start and split


def int_range(low, high=2**31):
    """argparse type: an integer from low to high."""
    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = "whole number"
    return parse


def float_range(low, high=1e9):
    """argparse type: a finite number from low to high."""
    def parse(text):
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    parse.__name__ = "number"
    return parse


def band_list(text):
    """argparse type: "1-7", "7,5,3" -> 1-based band numbers; "all" -> None."""
    if text == "all":
        return None
    bands = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        first, last = int(first), int(last if dash else first)
        if not 1 <= first <= last <= 65535:
            raise argparse.ArgumentTypeError(f"{text} is no list of bands; write 1-7, or 7,5,3, or all")
        bands += range(first, last + 1)
    return bands


def extra_data(text):
    """argparse type: "more" -> ("more", 1.0), "more:0.5" -> ("more", 0.5)."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float_range(1e-6)(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def noise_list(text):
    """argparse type: "noise.csv:20" -> ("noise.csv", 20)."""
    path, colon, count = text.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text} names no number of samples; write noise.csv:20")
    return path, int_range(1)(count)


def loss_term(known):
    """argparse type: "bce" -> ("bce", 1.0), "bce=0.5" -> ("bce", 0.5)."""
    def parse(text):
        name, _, weight = text.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(known)}")
        return name, float_range(0)(weight or "1")
    parse.__name__ = "loss"
    return parse


def train_parser(description, task, **defaults):
    """A parser with the flags that all training scripts share; `defaults`: the competition's recipe."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("training").add_argument
    add("--data", metavar="DIR", help="the data's folder")
    add("--extra-data", type=extra_data, nargs="+", default=[], metavar="DIR[:WEIGHT]", help="also train on "
        "these: data of others, pseudo labels of predict.py; a weight says how often they come, beside 1")
    add("--show-augment", action="store_true", help="only draw what training would see: augment.png, samples by epochs")
    add("--debug", action="store_true", help="two epochs on a few samples, to see that all works and the loss falls")
    add("--epochs", type=int_range(1, 10**6), help="passes over the (repeated) data")
    add("--bs", type=int_range(1, 65536), help="global batch size, shared by the processes")
    add("--accumulate", type=int_range(1, 65536), default=1, help="batches per optimizer step")
    add("--imgsz", type=int_range(16, 65536), help="side of the network's input in training, pixels")
    add("--lr", type=float_range(0, 100), help="initial learning rate")
    add("--optimizer", choices=optim.OPTIMIZERS, default="adamw")
    add("--lookahead", type=int_range(0, 10**6), default=0, metavar="K", help="slow weights follow every K steps; 0: none")
    add("--schedule", choices=optim.SCHEDULES, default="cosine", help="learning rate over the run")
    add("--period", type=int_range(1, 10**6), default=10, help="epochs of a restart, a step, or a plateau's patience")
    add("--lr-floor", type=float_range(0, 1), default=1e-3, help="the schedule's lowest share of the initial learning rate")
    add("--momentum", type=float_range(0, 0.9999), default=0.9, help="of sgd; beta1 of the others")
    add("--warmup-epochs", type=float_range(0), default=0.0, help="linear warmup")
    add("--weight-decay", type=float_range(0, 10), default=0.01, help="not on norms and biases")
    add("--clip", type=float_range(0), default=0.0, help="largest gradient norm; 0: no limit")
    add("--swa", type=float_range(0, 1), default=0.0, help="average the weights over this last share of the run, such as "
        "0.25: swa.pt")
    add("--swa-lr", type=float_range(0, 100), default=0.2, help="share of --lr that is held then, or cycles come down from")
    add("--swa-cycle", type=int_range(0, 10**6), default=0, help="epochs of a cycle down to --lr-floor; 0: constant rate")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="average the weights over steps")
    add("--weights", metavar="FILE|NAME", help="start from published or own weights, such as timm:regnetx_002")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on with a run (the newest one without PATH); "
        "its flags hold, except --device and those given again")
    add("--patience", type=int_range(0), default=0, help="stop after so many epochs without a better score; 0: never")
    add("--seed", type=int_range(0), default=0, help="of weights, order and augmentation")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: slow start, faster steps on GPUs")
    add("--grad-checkpoint", action="store_true", help="less memory, about a third slower")
    add("--sync-bn", action="store_true", help="batch norm over the global batch of all processes")
    add("--workers", type=int_range(0, 256), default=2, help="loader processes per training process")
    add("--cache", choices=("ram", "disk"), help="keep decoded images")
    add("--deterministic", action="store_true", help="bitwise repeatable on GPUs too (CPUs always are)")

    add = parser.add_argument_group("records").add_argument
    add("--project", default=f"runs/{task}", metavar="DIR", help="where runs go")
    add("--name", default="exp", help="the run's folder in it; numbered when it exists")
    add("--folds", default="5", metavar="N|F|FILE", help="N folds, a held-out fraction F, or a split's JSON file; "
        "0 trains on everything")
    add("--groups", metavar="CSV", help="the samples' groups (place, person, film), each on one side of the split")
    add("--drop-noisy", type=noise_list, metavar="CSV:K", help="do not train on the K worst samples of a noise.csv: "
        "python -m utils.report noise RUN ...")
    add("--fold", type=int_range(0), default=0, help="the fold to validate on")
    add("--save-period", type=int_range(0), default=10, help="also keep a checkpoint every so many epochs; 0: none")
    add("--tensorboard", action="store_true", help="write TensorBoard scalars into the run folder")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    parser.set_defaults(**defaults)
    return parser


def setup_run(parser, argv=None, *, needs=None):
    """Parses, joins the process group, opens the run. Returns (args, device, run folder, state or None).

    needs: {flag: others that do nothing without it}; UserError where one of those is given alone.
    With --resume the run's own flags hold; those given again on the command line override, and are reported.
    """
    args, given = parser.parse_args(argv), vars(_given(parser, argv))
    needs = {"swa": ("swa_lr", "swa_cycle")} | (needs or {})
    if args.resume is None:  # else beside the run's own
        _check_flags(parser, args, given, needs)
    device = dist.setup(args.device)
    folder, state = runs.open_run(args.project, args.name, args.resume)
    if state:
        stored = {k: v for k, v in state["args"].items() if k in vars(args)}
        stored["device"] = args.device  # it may be another machine
        for flag in KEPT:
            if args.resume is not None and flag in given and given[flag] != stored.get(flag):
                raise UserError(f"--{flag.replace('_', '-')}: a resumed run keeps its own; leave it out, or start a "
                                f"new run")
        for flag, value in given.items():
            if flag != "resume" and stored.get(flag) != value and dist.rank() == 0:
                print(f"--{flag.replace('_', '-')}: {value} instead of the run's {stored.get(flag)}")
        args = argparse.Namespace(**{**vars(args), **stored, **given})
        _check_flags(parser, args, given, needs)
    if args.debug:
        args.epochs, args.warmup_epochs, args.swa, args.patience = 2, 0.0, 0.0, 0
    if args.bs % dist.world_size():
        raise UserError(f"--bs {args.bs}: not divisible by the {dist.world_size()} processes; make it a multiple")
    if dist.rank() == 0:
        if not state:  # else in engine.fit, when it has been accepted
            write_json(folder / "args.json", vars(args))
        table.write_note(folder, vars(parser.parse_args([])))
        print(f"{'resuming' if state else 'run'}: {folder}" + (f" at step {state['step']}" if state else ""))
    return args, device, folder, state


def _check_flags(parser, args, given, needs):
    """UserError for a flag of those given that does nothing beside the others. What a resumed run had is left as it is.
    """
    for flag, others in needs.items():
        idle = [other for other in others if other in given and given[other] != parser.get_default(other)]
        if idle and not getattr(args, flag):
            idle, missing = (name.replace("_", "-") for name in (idle[0], flag))
            raise UserError(f"--{idle}: does nothing without --{missing}; leave it out, or give both")
    for flag, waits in {"patience": args.patience, "schedule plateau": args.schedule == "plateau",
                        "fold": args.fold}.items():
        if waits and _is_zero(args.folds) and given.keys() & {flag.split()[0], "folds"}:
            raise UserError(f"--{flag}: does nothing with --folds 0, which holds nothing out; leave one out")
    mixing = {flag: getattr(args, flag) for flag in ("mixup", "cutmix", "snapmix") if hasattr(args, flag)}
    if mixing.keys() & given.keys() and sum(mixing.values()) > 1 + 1e-9:
        raise UserError(f"{', '.join(f'--{flag}' for flag in mixing)}: happen instead of one another, their shares "
                        f"exceed 1 in all; lower one")


def _is_zero(folds):
    """Whether --folds is 0, as data.folds.parse_folds reads it: no validation."""
    try:
        return float(folds) == 0
    except (TypeError, ValueError):  # None, a file
        return False


def training(args, folder, model, loader, *, part=1.0, weight_decay=None, eps=1e-8):
    """-> the keyword arguments of engine.fit that the shared flags decide: optimizer, schedule, averages, records.

    part: share of a pass over the data that the loader's epoch is; --epochs, --period, --warmup-epochs and --swa-cycle
    count passes. weight_decay: in place of --weight-decay.
    """
    steps, epochs = -(-len(loader) // args.accumulate), round(args.epochs / part)
    decay = args.weight_decay if weight_decay is None else weight_decay
    optimizer = optim.make_optimizer(args.optimizer, optim.param_groups(model, decay), lr=args.lr,
                                     momentum=args.momentum, eps=eps)
    schedule = optim.make_schedule(args.schedule, steps_per_epoch=steps, epochs=epochs, floor=args.lr_floor,
                                   period=round(args.period / part), warmup_epochs=args.warmup_epochs / part)
    swa, first = dict(epochs=epochs, share=args.swa, cycle=round(args.swa_cycle / part)), dist.rank() == 0
    return dict(
        optimizer=optim.lookahead(optimizer, args.lookahead), epochs=epochs,
        schedule=with_swa(schedule, steps_per_epoch=steps, lr=args.swa_lr, floor=args.lr_floor, **swa),
        ema=optim.make_ema(model, steps * epochs) if args.ema else None, swa=SWA(model, **swa) if args.swa else None,
        loggers=charts.make_loggers(folder, tensorboard=args.tensorboard and first, wandb=args.wandb and first,
                                  config=vars(args)),
        **{name: vars(args)[name] for name in ("accumulate", "clip", "amp", "compile", "seed", "patience",
                                               "save_period")})


def _given(parser, argv):
    """Only the flags that stand on the command line."""
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    bare._defaults = {}
    return bare.parse_args(argv)
