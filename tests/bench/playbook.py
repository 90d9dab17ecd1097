"""The table of the playbook in docs/results.md: every technique against the baseline, on real data, over seeds.

    python -m tests.bench.playbook --data DIR --out runs/playbook --jobs 2 --only water bccd letters

DIR holds `water` (tiles in the wildfire layout, groups.csv), `bccd` (blood cells in the parking-lot layout) and
`letters` (train.csv.gz and test.csv.gz: glyphs and their writers in the competition's layout). A row is one command
with more flags; runs that are there already are not run again, so that a campaign can be stopped and gone on with. The
score is that of the last epoch (no epoch is chosen by it): IoU without flips, AP, share of the images whose class is
right.
"""
import argparse
import csv
import gzip
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

BASE = {
    "water": "train_seg.py --data {data}/water --scale 10000 --groups {data}/water/groups.csv --imgsz 64 --bs 8 "
             "--epochs 8 --repeat 1 --schedule cosine --loss lovasz_elu bce=1 --gain 1 --decoder 64 48 32 16",
    "bccd": "train_det.py --data {data}/bccd --variant n --imgsz 160 --bs 16 --epochs 15",
    "letters": "train_cls.py --data {out}/glyphs --groups {out}/glyphs/writers.csv --folds 5 --net repvgg_a0 --loss ce "
               "--imgsz 32 --bs 32 --optimizer adamw --weight-decay 0.01 --lr 2e-3 --no-rot90 --epochs 2",
}
SCORE = {"water": "iou", "bccd": "ap", "letters": "acc"}
ROWS = {
    "water": ["", "--loss dice focal", "--loss dice topk", "--loss lovasz_elu", "--gain 0", "--mixup 0.5",
              "--cutmix 0.5", "--gridmask 0.5", "--cutout 0.5", "--p-object 0.5", "--presence 0.5", "--lookahead 5",
              "--swa 0.25", "--optimizer adamp", "--optimizer radam", "--encoder efficientnetv2_b0",
              "--encoder hrnet_w18_small"],
    "bccd": ["", "--head anchor", "--mixup 0.15", "--gridmask 0.5", "--cutout 0.5", "--lookahead 5", "--swa 0.25",
             "--optimizer adamp"],
    "letters": ["", "--label-smoothing 0.1", "--mixup 0.5", "--cutmix 0.5", "--snapmix 0.5", "--gridmask 0.5",
                "--cutout 0", "--lookahead 5", "--net efficientnetv2_b0 --drop 0 --drop-path 0"],
}


def write_glyphs(source, out):
    """The letters as pictures of 28 x 28, with a table of their classes and one of their writers."""
    if (out / "writers.csv").exists():
        return
    (out / "train").mkdir(parents=True, exist_ok=True)
    labels, writers = [("name", "letter")], [("name", "writer")]
    for part in ("train", "test"):
        with gzip.open(source / f"{part}.csv.gz", "rt") as file:
            for i, row in enumerate(csv.DictReader(file)):
                pixels = np.array([row[str(k)] for k in range(784)], np.uint8).reshape(28, 28)
                name = f"{part}{i:05d}"
                Image.fromarray(pixels).save(out / "train" / f"{name}.png")
                labels.append((name, row["letter"]))
                writers.append((f"train/{name}.png", row["digit"]))
    for name, rows in (("train.csv", labels), ("writers.csv", writers)):
        with open(out / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)


def folder_of(out, task, flags, seed):
    return out / task / f"{re.sub('[^a-z0-9.]+', '-', flags).strip('-') or 'baseline'}-{seed}"


def train(task, flags, seed, data, out):
    """Runs one training unless it is there. -> its score, None if it failed."""
    folder = folder_of(out, task, flags, seed)
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = f"{BASE[task]} {flags}".format(data=data, out=out).split()
        command += ["--seed", seed, "--workers", 0, "--cache", "ram", "--project", folder.parent, "--name", folder.name]
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run([sys.executable, *map(str, command)], stdout=log, stderr=log,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        score = json.loads((folder / "results.json").read_text())["last"][SCORE[task]]
        if "--swa" in flags:
            score = torch.load(folder / "swa.pt", weights_only=True)["swa_scores"][SCORE[task]]
    except OSError:
        score = None
    print(f"{folder.name}: {score}", flush=True)
    return score


def minutes(folder):
    with open(folder / "results.csv", newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60


def table(task, rows, seeds, out, scores):
    """Markdown: the scores, their mean and standard deviation, the mean and the standard deviation of the differences
    from the baseline of the same seed."""
    heads = [f"{task}: {SCORE[task]}", *(f"seed {s}" for s in seeds), "mean (sd)", "against it (sd)", "minutes"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * (len(seeds) + 4) + "|")
    base = scores[task, rows[0]]
    for flags in rows:
        own = scores[task, flags]
        if None in own or None in base:
            continue
        gain = [a - b for a, b in zip(own, base)]
        spread = (lambda v: f"{statistics.stdev(v):.3f}") if len(seeds) > 1 else (lambda v: "")
        taken = statistics.mean(minutes(folder_of(out, task, flags, s)) for s in seeds)
        cells = [f"`{flags}`" if flags else "baseline", *(f"{v:.3f}" for v in own),
                 f"{statistics.mean(own):.3f} ({spread(own)})", f"{statistics.mean(gain):+.3f} ({spread(gain)})",
                 f"{taken:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/playbook"))
    parser.add_argument("--only", nargs="+", choices=list(BASE), default=list(BASE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--rows", type=int, help="only so many of each task")
    args = parser.parse_args()
    write_glyphs(args.data / "letters", args.out / "glyphs")
    rows = {task: ROWS[task][:args.rows] for task in args.only}
    jobs = [(task, flags) for task in args.only for flags in rows[task]]
    with ThreadPoolExecutor(args.jobs) as pool:
        for task in args.only:
            (args.out / task).mkdir(parents=True, exist_ok=True)
        futures = {job: [pool.submit(train, *job, seed, args.data, args.out) for seed in args.seeds] for job in jobs}
        scores = {job: [future.result() for future in trained] for job, trained in futures.items()}
    for task in args.only:
        table(task, rows[task], args.seeds, args.out, scores)


if __name__ == "__main__":
    main()
