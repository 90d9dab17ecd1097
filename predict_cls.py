"""predict.py --task cls: the competition's submission, probabilities, weighted ensembles of checkpoints and tables."""
import csv
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import cls, images
from data.loader import eval_loader
from nets import backbones
from nets.blocks import fuse
from utils import checkpoint, dist, engine, geometry, runs
from utils.errors import UserError


def predict_cls(args, device, paths, states):
    names, exclusive = states[0]["classes"], states[0]["exclusive"]
    for path, state in zip(paths, states):
        if state["classes"] != names:
            raise UserError(f"{path}: has the classes {', '.join(state['classes'])}, {paths[0]} others; an ensemble "
                            f"needs the same")
    tables = [read_probabilities(path, names) for path in args.probs or ()]
    shares = args.ensemble_weights or [1.0] * (len(paths) + len(tables))
    if len(shares) != len(paths) + len(tables):
        raise UserError(f"--ensemble-weights: {len(shares)} for {len(paths)} checkpoints and {len(tables)} tables; "
                        f"give one each")
    data = Path(states[0]["args"]["data"])
    competition = data / "test_dirty_mnist_2nd"
    files = images.find_sources(args.source, competition if competition.is_dir() else data / "test")
    keys = [str(int(file.stem)) if file.stem.isdecimal() else file.stem for file in files]
    for path, table in zip(args.probs or (), tables):
        missing = next((key for key in keys if key not in table), None)
        if missing:
            raise UserError(f"{path}: has no row for {missing}; predict the same images")
    out = runs.new_folder(args.out, Path(paths[0]).parent / "predict")

    members = [probabilities(args, device, path, state, files) for path, state in zip(paths, states)]
    members += [np.array([table[key] for key in keys]) for table in tables]
    probs = sum(share * member for share, member in zip(shares, members)) / sum(shares)
    if dist.rank() == 0:
        decided = np.eye(len(names), dtype=int)[probs.argmax(1)] if exclusive else (probs > args.threshold).astype(int)
        header = ["index", *names]
        write_rows(out / "submission.csv", header, [[key, *row] for key, row in zip(keys, decided.tolist())])
        rows = [[key, *(f"{p:.6f}" for p in row)] for key, row in zip(keys, probs)]
        write_rows(out / "probabilities.csv", header, rows)
        print(f"{len(files)} images: {out}")


def probabilities(args, device, path, state, files):
    """One checkpoint's probabilities (N, classes) of all files, the same on every rank."""
    dtype = engine.precision(args.amp, device) or torch.float32
    try:
        net = backbones.make(**state["arch"]["kwargs"])
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{path}: made by another version of this project; use that, or train again") from None
    checkpoint.load_weights(net, state, path)
    fuse(net).to(device, dtype, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    cls.check_bands(files, state["bands"])
    imgsz = args.imgsz or state["imgsz"]
    blank = np.zeros((len(files), len(state["classes"])), np.float32)
    data = cls.Views(cls.Images(files, blank, bands=state["bands"], limit=2 * imgsz), imgsz)
    loader = eval_loader(data, args.bs, workers=args.workers, device=device, collate=cls.collate)
    turns = [geometry.rot90(k, imgsz, imgsz) for k in range(4 if args.tta else 1)]
    probs = np.zeros((len(files), len(state["classes"])))
    progress = tqdm(total=len(files), desc=Path(path).parent.name, unit="img", disable=dist.rank() > 0)
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
