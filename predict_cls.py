"""predict.py --task cls: the competition's submission, probabilities, weighted ensembles of checkpoints and tables."""
import csv
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import cls, folds, images
from data.loader import eval_loader
from nets import backbones
from nets.blocks import fuse
from utils import checkpoint, dist, engine, ensemble, geometry, runs
from utils.errors import UserError

OTHER_VERSION = "{}: made by another version of this project; use that, or train again"


def predict_cls(args, device, paths, states):
    check(args, paths, states)
    names, exclusive = states[0]["classes"], states[0]["exclusive"]
    tables = [read_probabilities(path, names) for path in args.probs or ()]
    shares, thresholds = args.ensemble_weights or [1.0] * (len(paths) + len(tables)), args.threshold
    if args.ensemble:
        shares, thresholds = ensemble.read(args.ensemble, paths, names, exclusive)
        paths, states, shares = zip(*(member for member in zip(paths, states, shares) if member[2] > 0))
    data = Path(states[0]["args"]["data"])
    competition = data / "test_dirty_mnist_2nd"
    files = images.find_sources(args.source, competition if competition.is_dir() else data / "test")
    keys = [str(int(file.stem)) if file.stem.isdecimal() else file.stem for file in files]
    file_of = dict(zip(keys, files))  # of several with one number the last
    twice = next((file for key, file in zip(keys, files) if file_of[key] != file), None)
    if twice:
        raise UserError(f"{twice}: another image has the number {int(twice.stem)} too; predict them in two runs")
    for path, table in zip(args.probs or (), tables):
        missing = next((key for key in keys if key not in table), None)
        if missing:
            raise UserError(f"{path}: has no row for {missing}; predict the same images")
    known, labels = held_out(paths, states) if args.fit_weights else ([], None)
    nets = [load_net(path, state, known + files) for path, state in zip(paths, states)]
    out = runs.new_folder(args.out, Path(paths[0]).parent / "predict")

    members = [probabilities(args, device, net, state, known + files, Path(path).parent.name)
               for net, path, state in zip(nets, paths, states)]
    if args.fit_weights:
        shares, thresholds = fit([member[:len(known)] for member in members], labels, exclusive)
        if dist.rank() == 0:
            ensemble.write(out / "ensemble.json", paths, shares, names, () if exclusive else thresholds)
    members = [member[len(known):] for member in members]
    members += [np.array([table[key] for key in keys]) for table in tables]
    probs = ensemble.average(members, shares)
    if dist.rank() == 0:
        decided = np.eye(len(names), dtype=int)[probs.argmax(1)] if exclusive else (probs > thresholds).astype(int)
        header = ["index", *names]
        write_rows(out / "submission.csv", header, [[key, *row] for key, row in zip(keys, decided.tolist())])
        rows = [[key, *(f"{p:.6f}" for p in row)] for key, row in zip(keys, probs)]
        write_rows(out / "probabilities.csv", header, rows)
        print(f"{len(files)} images: {out}")


def check(args, paths, states):
    """Whether the checkpoints and the flags of an ensemble go together."""
    for path, state in zip(paths, states):
        if not {"classes", "exclusive", "bands", "scale", "norm", "imgsz", "args"} <= state.keys():
            raise UserError(OTHER_VERSION.format(path))
    for path, state in zip(paths, states):
        if state["classes"] != states[0]["classes"]:
            raise UserError(f"{path}: has the classes {', '.join(state['classes'])}, {paths[0]} others; an ensemble "
                            f"needs the same")
    given = [f"--{flag.replace('_', '-')}" for flag in ("fit_weights", "ensemble", "ensemble_weights")
             if getattr(args, flag)]
    if len(given) > 1:
        raise UserError(f"{given[0]}, {given[1]}: both say how the checkpoints are weighted; leave one out")
    tables = len(args.probs or ())
    if tables and given and not args.ensemble_weights:
        raise UserError(f"{given[0]}: is for checkpoints, --probs come without their held-out images; give "
                        f"--ensemble-weights instead")
    if args.ensemble_weights and len(args.ensemble_weights) != len(paths) + tables:
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {len(paths)} checkpoints and {tables} "
                        f"tables; give one each")


def held_out(paths, states):
    """-> the images that the runs of all checkpoints validated on (files), their labels (N, classes).

    Only images that no member was trained on are fair to all: UserError where the runs held out different ones.
    """
    found = []
    for path, state in zip(paths, states):
        settings, split = state["args"], Path(path).parent / "folds.json"
        if not {"data", "labels", "images", "fold"} <= settings.keys():
            raise UserError(OTHER_VERSION.format(path))
        if not split.exists():
            raise UserError(f"{split}: missing, so no images are known that {path} was not trained on; give "
                            f"--ensemble-weights instead of --fit-weights")
        table = cls.read(settings["data"], table=settings["labels"], folder=settings["images"])
        if table.names != state["classes"]:
            raise UserError(f"{settings['data']}: has other classes than {path}; bring back the data it was trained on")
        names = [os.path.relpath(file, settings["data"]) for file in table.files]  # as train_cls.split
        out = set(folds.split(folds.read(split, names), settings["fold"])[1])
        found.append({file.resolve(): (file, row) for file, name, row in zip(table.files, names, table.labels)
                      if name in out})
        if found[-1].keys() != found[0].keys():
            raise UserError(f"{path}: its run held out other images than that of {paths[0]}; give --ensemble-weights "
                            f"instead of --fit-weights (equal ones for the folds of one split)")
    files, labels = zip(*found[0].values())
    return list(files), np.stack(labels)


def fit(members, labels, exclusive):
    """Held-out probabilities -> weights (members,), thresholds (classes,), or 0.5 where classes are exclusive."""
    shares = ensemble.fit_weights(members, labels, exclusive)
    probs = ensemble.average(members, shares)
    thresholds = 0.5 if exclusive else ensemble.fit_thresholds(probs, labels)
    count = len(labels) if exclusive else labels.size
    before = ensemble.hits(ensemble.average(members, np.ones(len(members))), labels, exclusive) / count
    after = ensemble.hits(probs, labels, exclusive, thresholds) / count
    if dist.rank() == 0:
        print(f"fitted to {len(labels)} held-out images: weights {' '.join(f'{share:g}' for share in shares)}, "
              f"accuracy {before:.4f} -> {after:.4f} (of these very images: optimistic)")
    return shares, thresholds


def load_net(path, state, files):
    """The checkpoint's net, after a look at whether the files have its bands."""
    try:
        net = backbones.make(**state["arch"]["kwargs"])
    except (TypeError, ValueError, KeyError):
        raise UserError(OTHER_VERSION.format(path)) from None
    checkpoint.load_weights(net, state, path)
    cls.check_bands(files, state["bands"])
    return fuse(net)


def probabilities(args, device, net, state, files, name):
    """One net's probabilities (N, classes) of all files, the same on every rank."""
    dtype = engine.precision(args.amp, device) or torch.float32
    net.to(device, dtype, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    imgsz = args.imgsz or state["imgsz"]
    blank = np.zeros((len(files), len(state["classes"])), np.float32)
    data = cls.Views(cls.Images(files, blank, bands=state["bands"], limit=2 * imgsz), imgsz)
    loader = eval_loader(data, args.bs, workers=args.workers, device=device, collate=cls.collate)
    turns = [geometry.rot90(k, imgsz, imgsz) for k in range(4 if args.tta else 1)]
    probs = np.zeros((len(files), len(state["classes"])))
    progress = tqdm(total=len(files), desc=name, unit="img", disable=dist.rank() > 0)
    with torch.inference_mode(), progress as bar:
        for batch in loader:
            batch = engine.to_device(batch, device)
            for turn in turns:
                x = cls.see(batch, imgsz, state["scale"], *state["norm"], turn=turn)
                logits = net(x.to(dtype, memory_format=torch.channels_last)).float()
                found = logits.softmax(1) if state["exclusive"] else logits.sigmoid()
                probs[batch["index"].cpu().numpy()] += found.double().cpu().numpy() / len(turns)
            bar.update(len(batch["index"]) * dist.world_size())
    return sum(dist.gather(probs))  # every rank has filled its own rows


def read_probabilities(path, names):
    """probabilities.csv of an earlier run -> {index: row}."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        if header[1:] != names:
            raise UserError(f"{path}: has other columns than the checkpoint's classes; give one of this task")
        table = {row[0]: np.array([float(v) for v in row[1:]]) for row in rows}
        wrong = next((k for k, row in table.items() if row.shape != (len(names),) or not np.isfinite(row).all()), None)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{path}: not a readable table of probabilities ({error}); give a probabilities.csv") from None
    if wrong is not None:
        raise UserError(f"{path}: the row {wrong} is damaged; predict again")
    return table


def write_rows(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
