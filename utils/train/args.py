"""The flags that mean the same in every script, and what happens between the command line and the run."""
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError, BooleanOptionalAction, Namespace
from types import NoneType

import torch

from utils import losses
from utils.errors import Parser, UserError
from utils.files import show, write_json
from utils.train import dist, engine, optim, runs
from utils.train.loggers import make_loggers
from utils.train.state import State
from utils.train.swa import SWA, swa_epochs, with_swa

# the types that a stored flag may have, by the type of its default; None: of all other flags
TYPES = {bool: bool, int: (int, float), float: (int, float), list: (list, tuple, NoneType),
         None: (NoneType, bool, int, float, str, list, tuple)}
# a resumed run keeps its weights, its split and its input
KEPT = ("weights", "freeze", "recipe", "preset", "folds", "fold", "groups", "drop_noisy", "bands", "pixel_scale",
        "mean_planes", "resize")


def int_range(low, high=2**31):
    """argparse type: an integer from low to high."""
    return _range(int, "whole number", low, high)


def float_range(low, high=1e9):
    """argparse type: a finite number from low to high."""
    return _range(float, "number", low, high)


def _range(convert, name, low, high):
    def parse(text):
        value = convert(text)
        if not low <= value <= high:  # NaN is not, either
            raise ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = name  # argparse shows it
    return parse


fraction = float_range(0, 1)  # argparse type: a probability, or a share of something
positive = int_range(1, 10**6)  # argparse type: a number of epochs, passes or parts


def band_list(text):
    """argparse type: "1-7", "7,5,3" -> 1-based band numbers; "all" -> None."""
    if text == "all":
        return None
    bands = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        first, last = int(first), int(last if dash else first)
        if not 1 <= first <= last <= 65535:
            raise ArgumentTypeError(f"{text} is no list of bands; write 1-7, or 7,5,3, or all")
        bands += range(first, last + 1)
    return bands


def scale_list(text):
    """argparse type: "255" -> 255.0; "255,2500" -> [255.0, 2500.0]; "standard"."""
    if text == "standard":
        return text
    scales = [float_range(1e-9, 1e12)(part) for part in text.split(",")]
    return scales if len(scales) > 1 else scales[0]


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
        raise ArgumentTypeError(f"{text} names no number of samples; write noise.csv:20")
    return path, int_range(1)(count)


def frozen_part(text):
    """argparse type: "backbone", or "10" -> 10."""
    return text if text == "backbone" else int_range(1, 10**4)(text)


def weight_list(text):
    """argparse type: "balanced", or "1,20" -> [1.0, 20.0]."""
    return text if text == "balanced" else [float_range(1e-6)(number) for number in text.split(",")]


def loss_term(known):
    """argparse type: "bce" -> ("bce", 1.0), "bce=0.5" -> ("bce", 0.5)."""
    def parse(text):
        name, _, weight = text.partition("=")
        if name not in known:
            raise ArgumentTypeError(f"{name} is not one of {', '.join(known)}")
        return name, float_range(0)(weight or "1")
    parse.__name__ = "loss"
    return parse


def train_parser(description, task, recipes={}, **defaults):
    """A parser with the flags that all training scripts share; `description`: a text of which the first line is shown.
    recipes: {name: flags} of --recipe, which `setup_run` makes the defaults, first the competition's, then one for
    photographs that names all flags of the first. defaults: {flag: default} for all of them."""
    parser = Parser(description=description.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.recipes = recipes
    add = parser.add_argument_group("training").add_argument
    add("--data", metavar="DIR", help="folder of the data")
    if recipes:
        add("--recipe", choices=recipes, help="a set of defaults of other flags; without: photos for images of three "
            "bands of 8 bits without a place on Earth, else the competition's")
    add("--extra-data", type=extra_data, nargs="+", default=[], metavar="DIR[:WEIGHT]", help="also train on these "
        "folders, such as pseudo labels of predict.py; WEIGHT: how often their samples come, --data's being 1")
    add("--allow-bad", action="store_true", help="train even if more than 1 %% of the images or boxes cannot be used")
    add("--show-augment", action="store_true", help="only draw augmented samples into augment.png, a column per epoch")
    add("--debug", action="store_true", help="only two epochs on a few samples, to try everything out")
    add("--epochs", type=positive, help="number of epochs")
    add("--bs", type=int_range(1, 65536), help="batch size, summed over the processes")
    add("--accumulate", type=int_range(1, 65536), default=1, help="batches per optimizer step")
    add("--imgsz", type=int_range(16, 65536), help="side of the net's input in training, in pixels")
    add("--lr", type=float_range(0, 100), help="initial learning rate")
    add("--optimizer", choices=optim.OPTIMIZERS, default="adamw")
    add("--schedule", choices=optim.SCHEDULES, default="cosine", help="learning rate over the run")
    add("--period", type=positive, default=10, help="epochs between restarts or steps; patience of plateau")
    add("--lr-floor", type=fraction, default=1e-3, help="lowest learning rate, as a fraction of --lr")
    add("--momentum", type=float_range(0, 0.9999), default=0.9, help="momentum of sgd, beta1 of the others")
    add("--warmup-epochs", type=float_range(0), default=0.0, help="epochs of linear warm-up")
    add("--weight-decay", type=float_range(0, 10), default=0.01, help="weight decay; norms and biases have none")
    add("--clip", type=float_range(0), default=0.0, help="largest gradient norm; 0: no limit")
    add("--swa", type=fraction, default=0.0, help="SWA: average the weights over this last fraction of the "
        "run, such as 0.25, into swa.pt")
    add("--swa-lr", type=float_range(0, 100), default=0.2, help="SWA learning rate, as a fraction of --lr")
    add("--ema", action=BooleanOptionalAction, default=True, help="average the weights over the steps, and "
        "evaluate the average")
    add("--weights", metavar="FILE|NAME", help="start from a checkpoint or published weights, such as timm:regnetx_002")
    add("--freeze", type=frozen_part, metavar="N|backbone", help="the first N layers, or the backbone, keep the weights "
        "and running statistics of --weights")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on with a run (without PATH, the newest one); its "
        "flags hold, except --device and those that are given again")
    add("--patience", type=int_range(0), default=0, help="stop after so many epochs without a better score; 0: never")
    add("--seed", type=int_range(0), default=0, help="seed of weights, order and augmentation")

    add = parser.add_argument_group("input and augmentation").add_argument
    add("--bands", type=band_list, default="all", help="such as 1-7 or 7,5,3; all: those of the first image")
    add("--pixel-scale", type=scale_list, metavar="N|N,N,...|standard", help="pixel values are divided by it, or by one "
        "number per band; standard: minus the mean of each band, divided by the standard deviation; without: 65535 for "
        "uint16, 255 for uint8, else 1")
    add_augmentation(add)
    add_shares(add, {"mixup": "probability that images are blended",
                     "gridmask": "probability that an image loses a grid of squares",
                     "cutout": "probability that an image loses one square"})
    add("--cutout-size", type=float_range(0.01, 0.99), default=0.5, help="side of that square, share of the image's")
    add("--label-smoothing", type=float_range(0, 0.99), default=0.0, help="share of the labels that is spread evenly "
        "over the classes")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: slow start, faster steps on GPUs")
    add("--grad-checkpoint", action="store_true", help="compute activations anew in the backward pass: less memory, "
        "about a third slower")
    add("--sync-bn", action="store_true", help="batch norm over the batch of all processes")
    add("--workers", type=int_range(0, 256), default=2, help="loader processes per training process")
    add("--timeout", type=float_range(1), default=60, metavar="SECONDS", help="end the run when a loader worker or "
        "another process gives no sign of life for so long; for a step and a first batch five times as long")
    add("--cache", choices=("ram", "disk"), help="keep decoded images")
    add("--deterministic", action="store_true", help="bitwise repeatable on GPUs too (CPUs always are)")

    add = parser.add_argument_group("records").add_argument
    add("--project", default=f"runs/{task}", metavar="DIR", help="folder of the runs")
    add("--name", default="exp", help="folder of this run in it; numbered when it exists")
    add("--folds", metavar="N|F|FILE", help="N folds, a held-out fraction F, or a split's JSON file; 0: train on "
        "everything; without: the data's own validation part, else 5")
    add("--groups", metavar="CSV", help="groups of the samples (place, person, film); a group stays on one side of the "
        "split")
    add("--drop-noisy", type=noise_list, metavar="CSV:K", help="do not train on the K worst samples of a noise.csv: "
        "python -m utils.report noise RUN ...")
    add("--fold", type=int_range(0), default=0, help="fold to validate on")
    add("--save-period", type=int_range(0), default=10, help="also keep a checkpoint every so many epochs; 0: none")
    add("--tensorboard", action="store_true", help="write TensorBoard scalars into the run folder")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    parser.set_defaults(**defaults)
    return parser


def _given(parser, argv):
    """{flag: value} of the flags that stand on a command line; None: this process's."""
    unset = object()
    blank = Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    return {flag: value for flag, value in vars(parser.parse_args(argv, blank)).items() if value is not unset}


def add_shares(add, texts, most={}):
    """Adds flags that are 0 by default. texts: {flag: its help}. most: {flag: its highest value}, 1 for all others."""
    for flag, text in texts.items():
        add(f"--{flag}", type=float_range(0, most.get(flag, 1)), default=0.0, metavar="F", help=text)


def add_augmentation(add):
    """Adds the flags of `data.augment.view` and `data.augment.colour`. add: `add_argument` of a parser or a group."""
    texts = {"hflip": "probability of mirroring left and right", "vflip": "probability of mirroring up and down",
             "translate": "largest shift, share of the size",
             "hue": "largest change of hue, share of the circle (three bands)",
             "saturation": "saturation times 1 - F to 1 + F (three bands)", "value": "brightness times 1 - F to 1 + F",
             "degrees": "largest rotation", "shear": "largest shear, degrees",
             "gain": "random brightness, octaves either way",
             "crop-padding": "a view lies anywhere in the picture, which is padded to this times the view where it is "
                             "smaller; 0: in its middle"}
    add_shares(add, texts, {"degrees": 180, "shear": 80, "gain": 10, "crop-padding": 10})
    add("--rot90", action=BooleanOptionalAction, default=False, help="random quarter turns")
    add("--zoom", type=float_range(0.05, 20), nargs=2, default=[1.0, 1.0], metavar=("LOW", "HIGH"), help="random zoom, "
        "log-uniform: below 1 a view shows more, above 1 less")
    add("--zoom-linear", action=BooleanOptionalAction, default=False, help="draw the zoom uniformly")
    add("--aspect", type=float_range(1, 10), default=1.0, help="largest stretch of width against height, either way")
    add("--p-affine", type=fraction, default=1.0, metavar="P", help="probability of zoom, aspect, degrees, shear and "
        "translate")
    add("--border", choices=("constant", "reflect", "wrap"), nargs="+", default=["constant"], help="beyond the picture; "
        "of several one at random")


def setup_run(parser, argv=None, *, needs={}, check=lambda args: None, photographs=lambda data: False):
    """What a training script begins with: flags, then device and process group, then the run folder.

    needs: {flag: flags that do nothing without it}. check(args): raises UserError for flags that are wrong together.
    Flags are refused before there is a run folder; with --resume, it is the flags of the resumed run that are checked.
    photographs(--data): whether the data are photographs, which decides where no --recipe is given.
    Returns (args, torch.device, the run folder's Path, the checkpoint to go on from or None).
    """
    recipes = {name: _given(parser, text.split()) for name, text in parser.recipes.items()}
    first = next(iter(recipes), None)
    parser.set_defaults(recipe=first, **recipes.get(first, {}))
    given, args = _given(parser, argv), parser.parse_args(argv)
    if recipes and args.resume is None:
        name = given.get("recipe") or list(recipes)[photographs(args.data)]
        parser.set_defaults(**recipes[name])
        args = parser.parse_args(argv, Namespace(recipe=name))

    def check_all(args):
        _check_flags(parser, args, given, {"swa": ("swa_lr",), "cutout": ("cutout_size",),
                                           "weights": ("freeze",)} | needs)
        check(args)

    if args.resume is None:
        check_all(args)
    device = dist.setup(args.device, args.timeout)
    args, folder, resume = begin_run(parser, args, given, check_all)
    for name, flags in parser.recipes.items():
        dist.print0(f"recipe {name}{' (in use)' if name == args.recipe else ''}: {flags}")
    return args, device, folder, resume


def begin_run(parser, args, given={}, check=lambda args: None):
    """Opens the run folder of `args`, writes down its flags, and seeds the initialisation of the net -> (args, folder,
    the checkpoint to go on from or None).

    When a run is resumed, its own flags hold. given: {flag: value} that override them, which is reported, and `check`
    is called with the result. A script may begin further runs, each with a name of its own: when torchrun restarts the
    script, each of them goes on in its folder.
    """
    folder, resume = runs.open_run(args.project, args.name, args.resume)
    if resume:
        stored = {flag: value for flag, value in _present_names(resume["args"]).items() if flag in vars(args)}
        for flag, value in stored.items():
            if not isinstance(value, TYPES.get(type(parser.get_default(flag)), TYPES[None])):
                raise UserError(f"--resume: the checkpoint has {word(flag)} {show(value)}, which no run has; use another "
                                f"one")
        stored |= {"device": args.device, "timeout": args.timeout}  # it may be another machine
        for flag, value in given.items():
            if flag == "resume" or value == stored.get(flag):
                continue
            if flag in KEPT:
                raise UserError(f"{word(flag)}: a resumed run keeps its own; leave it out, or start a new run")
            dist.print0(f"{word(flag)}: {value} instead of the run's {stored.get(flag)}")
        args = Namespace(**vars(args) | stored | given)
        check(args)
    if args.debug:
        args.epochs, args.warmup_epochs, args.swa, args.patience = 2, 0.0, 0.0, 0
    if dist.is_main():
        if not resume:  # else engine.fit writes them, when it has accepted the checkpoint
            write_json(folder / "args.json", vars(args))
        runs.record_start(folder)
        print(f"resuming: {folder} at step {resume['step']}" if resume else f"run: {folder}")
    engine.seed_everything(args.seed, args.deterministic)
    return args, folder, resume


def word(flag):
    """The flag as it stands on the command line."""
    return f"--{flag.replace('_', '-')}"


def _present_names(flags):
    """The flags of a run, which may be of an earlier edition, under the names that they have now."""
    old = [("allow_bad", "allow_bad_labels"), ("hflip", "flip"), ("vflip", "flip"), ("hflip", "flip_lr"),
           ("vflip", "flip_ud")]
    if "pixel_scale" not in flags:
        old += [("pixel_scale", "band_scale" if "band_scale" in flags else "scale"), ("aux_cls", "presence")]
        if "net" in flags:  # classification: --cutout was the side of a square that half of the images lost
            side = flags.get("cutout", 0)
            flags = flags | ({"cutout": 0.5, "cutout_size": side} if side else {"cutout": 0.0})
    if "hsv" in flags:  # detection
        colour = dict(zip(("hue", "saturation", "value"), flags["hsv"]))
        flags = flags | colour | {"zoom": [1 - flags["scale"], 1 + flags["scale"]]}
    return flags | {name: flags[before] for name, before in old if before in flags}


def check_batch(args, side, largest):
    """UserError where the batches of a process are single images that have a single pixel in the net's coarsest map.
    side: of the images, pixels. largest: of the images that have such a map."""
    if side <= largest and args.bs == dist.world_size():
        raise UserError(f"--imgsz {args.imgsz} --bs {args.bs}: batch norm would see a single pixel; raise one of them")


def debug_sizes(args):
    """-> how many samples are trained on and validated on at most: a few with --debug."""
    return (8 * args.bs, args.bs) if args.debug else (10**9, 10**9)


def _check_flags(parser, args, given, needs):
    """UserError for flags that the processes cannot share, and for given ones that have no effect beside the others."""
    if args.bs % dist.world_size():
        raise UserError(f"--bs {args.bs}: not divisible by the {dist.world_size()} processes; make it a multiple")
    for flag, others in needs.items():
        for other in others:
            if not getattr(args, flag) and given.get(other, parser.get_default(other)) != parser.get_default(other):
                raise UserError(f"{word(other)}: does nothing without {word(flag)}; leave it out, or give both")
    no_validation = set(str(args.folds)) <= set("0.")  # 0, 0.0
    for flag, waits in {"patience": args.patience, "schedule plateau": args.schedule == "plateau",
                        "fold": args.fold}.items():
        if no_validation and waits and given.keys() & {flag.split()[0], "folds"}:
            raise UserError(f"--{flag}: does nothing with --folds 0, which holds nothing out; leave one out")
    if given.keys() & {"mixup", "cutmix"} and args.mixup + getattr(args, "cutmix", 0) > 1 + 1e-9:
        raise UserError("--mixup, --cutmix: are mutually exclusive, and their probabilities exceed 1 in total; lower "
                        "one")


def class_weights(args, names, counts, negatives=None):
    """-> [weight per class] of --class-weights, which are printed, or None without the flag. `balanced` becomes numbers
    in `args`, which checkpoints keep. counts, negatives: of `losses.balanced`."""
    if args.class_weights == "balanced":
        args.class_weights = losses.balanced(counts, negatives)
    weights = args.class_weights
    if weights and len(weights) != len(names):
        raise UserError(f"--class-weights: has {len(weights)} numbers for {len(names)} classes; give one per class")
    if weights:
        dist.print0("weights in the loss: " + ", ".join(
            f"{name} ({count:,}) {weight:.4g}" for name, count, weight in zip(names, counts, weights)))
    return weights


def training(args, folder, model, loader, device, *, part=1.0, lr_factor=1, decay_divisor=1, eps=1e-8):
    """What the shared flags decide -> (State, the keyword arguments of engine.fit: epochs, records, ...).

    The model is moved to the device, and its batch norms are synchronised with --sync-bn: see `State.model`.
    part: share of a pass over the data that the loader's epoch is; --epochs, --period and --warmup-epochs count
    passes. lr_factor, decay_divisor: of --lr and --weight-decay. eps: of Adam and its relatives.
    """
    model = model.to(device, memory_format=torch.channels_last)
    model = dist.sync_batch_norm(model, device) if args.sync_bn else model
    dist.print0(f"{sum(p.numel() for p in model.parameters()):,} parameters; {device}")
    steps, epochs = -(-len(loader) // args.accumulate), round(args.epochs / part)
    optimizer = optim.make_optimizer(args.optimizer, optim.param_groups(model, args.weight_decay / decay_divisor),
                                     lr=args.lr * lr_factor, momentum=args.momentum, eps=eps)
    schedule = optim.make_schedule(args.schedule, steps_per_epoch=steps, epochs=epochs, floor=args.lr_floor,
                                   period=round(args.period / part), warmup_epochs=args.warmup_epochs / part)
    averaged = swa_epochs(epochs, args.swa)
    schedule = with_swa(schedule, averaged, steps_per_epoch=steps, lr=args.swa_lr)
    state = State(model, optimizer, schedule, device=device, amp=args.amp, accumulate=args.accumulate, clip=args.clip,
                  ema=optim.make_ema(model, steps * epochs) if args.ema else None,
                  swa=SWA(model, averaged) if averaged else None, compile=args.compile)
    loggers = make_loggers(folder, tensorboard=args.tensorboard, wandb=args.wandb,
                           config=vars(args)) if dist.is_main() else []
    return state, dict(epochs=epochs, seed=args.seed, patience=args.patience, save_period=args.save_period,
                       loggers=loggers)
