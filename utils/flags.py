"""What the flags of predict.py may not be together. Raises UserError in one line, before anything is read."""
import os

from utils.errors import UserError
from utils.train.args import word


def check_task(args, known):
    """known: {flag: (tasks that have it, its default)}. A flag of another task is refused, unless --detector has it."""
    for flag, (tasks, default) in known.items():
        used = args.task in tasks or args.detector and flag in ("imgsz", "conf", "iou", "max_det")
        if vars(args)[flag] != default and not used:
            raise UserError(f"{word(flag)}: does nothing for --task {args.task}; leave it out")
    # test-time augmentation
    if args.merge and (args.merge == "wbf") != (args.task == "det"):
        raise UserError(f"--merge {args.merge}: not for --task {args.task}; wbf is for boxes, the others are for "
                        f"probabilities")
    if args.merge and args.tta is None:
        raise UserError("--merge: says how the views of --tta are merged; give that too")
    # of single labels too: normalising to a sum of 1 turns only sum into a mean, which is there already
    if args.pseudo and args.merge in ("sum", "max", "min", "tsharpen"):
        raise UserError(f"--pseudo: the results of --merge {args.merge} are no probabilities; take mean or gmean")
    if (args.rle or args.ids) and not args.submission and args.task != "det":
        raise UserError("--rle, --ids: are for --submission; give that too")
    if args.tta_scales and "scale" not in (args.tta or ()):
        raise UserError("--tta-scales: are the sizes of --tta scale; give that too")


def check_ensemble(args, paths):
    """Whether the flags of an ensemble go together. paths: the checkpoints; none: --probs without --weights."""
    for flag in () if paths else ("source", "noisy", "tta", "soup", "pseudo", "fit_weights", "ensemble", "imgsz",
                                  "submission"):
        if getattr(args, flag) not in (None, False):
            raise UserError(f"{word(flag)}: does nothing for --probs without --weights; leave it out")
    if args.noisy and (args.source or len(paths) > 1):
        raise UserError("--noisy: is for one checkpoint, instead of --source; give one --weights and no --source")
    given = [word(flag) for flag in ("fit_weights", "ensemble", "ensemble_weights") if getattr(args, flag)]
    if len(given) > 1:
        raise UserError(f"{given[0]}, {given[1]}: both say how the checkpoints are weighted; leave one out")
    if args.fit_weights and len(set(map(os.path.realpath, paths))) < len(paths):
        raise UserError("--fit-weights: one of the checkpoints is given twice; leave it out once")
    count, tables = 1 if args.soup else len(paths), len(args.probs or ())
    if len(paths) + tables == 1 and (args.soup or args.ensemble_weights):
        raise UserError(f"{'--soup' if args.soup else '--ensemble-weights'}: is for several checkpoints; leave it out, "
                        f"or give more")
    if args.soup and given and not (args.ensemble_weights and tables):
        raise UserError(f"--soup: makes one net of the checkpoints, there is nothing to weight; leave it out, or "
                        f"{given[0]}")
    if args.threshold is not None and (args.fit_weights or args.ensemble):
        raise UserError(f"--threshold: {given[0]} brings thresholds of its own; leave one out")
    if tables and given and not args.ensemble_weights:
        raise UserError(f"{given[0]}: is for checkpoints, --probs come without their held-out images; give "
                        f"--ensemble-weights instead")
    if args.ensemble_weights and len(args.ensemble_weights) != count + tables:
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {count} checkpoints and {tables} "
                        f"tables; give one each")
