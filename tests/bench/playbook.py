"""The tables of the playbook in docs/results.md: every technique against the baseline, on real data, over seeds.

    python -m tests.bench.playbook --data DIR --out runs/playbook --jobs 2 --only water bccd letters

DIR holds `water` (tiles in the wildfire layout, groups.csv), `bccd` (blood cells in the parking-lot layout) and
`letters` (train.csv.gz and test.csv.gz: glyphs and their writers in the competition's layout). A row is one command
with more flags; runs that are there already are not run again, so that a campaign can be stopped and gone on with. The
score is that of the last epoch (no epoch is chosen by it): IoU without flips, AP, share of the images whose class is
right. What predict.py can do is measured with the baseline's weights, its files compared with the labels.
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

from data import labels, seg
from utils.metrics.average_precision import DetectionAP

BASE = {
    "water": "train_seg.py --data {data}/water --pixel-scale 10000 --groups {data}/water/groups.csv --imgsz 64 --bs 8 "
             "--epochs 8 --repeat 1 --schedule cosine --loss lovasz_elu bce=1 --gain 1 --decoder 64 48 32 16",
    "bccd": "train_det.py --data {data}/bccd --variant n --imgsz 160 --bs 16 --epochs 15",
    "letters": "train_cls.py --data {out}/glyphs --groups {out}/glyphs/writers.csv --folds 5 --net repvgg_a0 --loss ce "
               "--imgsz 32 --bs 32 --optimizer adamw --weight-decay 0.01 --lr 2e-3 --no-rot90 --epochs 2",
}
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SCORE = {"water": "iou", "bccd": "ap", "letters": "acc"}
TASK = {"water": "seg", "bccd": "det", "letters": "cls"}
ROWS = {
    "water": ["", "--loss dice focal", "--loss lovasz_elu", "--gain 0", "--mixup 0.5", "--cutmix 0.5",
              "--gridmask 0.5", "--p-object 0.5", "--aux-cls 0.5", "--swa 0.25", "--encoder efficientnetv2_b0",
              "--cutout 0.5", "--label-smoothing 0.1", "--optimizer radam", "--no-ema", "--schedule restarts",
              "--encoder repvgg_a0", *(f"--encoder hrnet_{w}" for w in ("w18_small", "w18", "w32")), "--resize",
              "--schedule plateau --period 2", "--schedule flat", "--optimizer sgd --lr 0.02 --weight-decay 5e-4",
              "--class-weights balanced"],
    "bccd": ["", "--mixup 0.15", "--swa 0.25", "--gridmask 0.5", "--cutout 0.5", "--close-mosaic 3",
             "--schedule plateau --period 3", "--schedule cosine", "--image-weights",
             "--optimizer radam", "--optimizer adam --weight-decay 5e-4",
             "--optimizer sgd --lr 0.02 --weight-decay 5e-4", "--no-ema", "--tile 320 --epochs 4"],
    "letters": ["", "--label-smoothing 0.1", "--mixup 0.5", "--cutmix 0.5", "--gridmask 0.5",
                "--net efficientnetv2_b0 --drop 0 --drop-path 0", "--cutout 0", "--swa 0.5",
                "--no-ema", "--schedule plateau --period 1", "--schedule flat",
                "--optimizer radam", "--optimizer adam --weight-decay 1e-5",
                "--optimizer sgd --lr 0.05 --weight-decay 5e-4", "--class-weights balanced"],
}
PREDICT = {  # with the baseline's weights of each seed; EPOCHS: its last three, of letters both
    "water": ["", "--tta hflip", "--tta hflip vflip", "--tta hflip vflip rot90", "--tta scale",
              "--tta hflip vflip rot90 scale", *(f"--tta hflip vflip --merge {how}" for how in (
                  "gmean", "max", "min", "tsharpen", "sum --threshold 0.99")), "--detector DETECTOR",
              "--detector DETECTOR --conf 0.05", "--weights EPOCHS"],
    "bccd": ["", "--tta", "--tta hflip", "--tta hflip scale", "--tta hflip scale --merge wbf", "--imgsz 192",
             "--iou 0.5", "--tile 320", "--weights EPOCHS"],
    "letters": ["", "--tta scale", "--tta rot180", "--tta hflip", "--tta scale --merge gmean", "--imgsz 40",
                "--weights EPOCHS"],
}
DETECTOR = "train_det.py --data {data}/water --pixel-scale 10000 --variant n --imgsz 128 --bs 16 --epochs 20"
TOGETHER = {  # with the weights of all seeds at once
    "water": ["", "--tta hflip vflip"], "bccd": ["", "--tta hflip scale"], "letters": [""]}
SIZES = {"water": "--imgsz 96", "bccd": "--imgsz 192", "letters": "--imgsz 40"}  # also a row of the first table


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
    """A row of the first table. -> its score, None if the training failed."""
    folder = folder_of(out, task, flags, seed)
    run_training(task, flags, seed, folder, data, out)
    try:
        score = json.loads((folder / "results.json").read_text())["last"][SCORE[task]]
        if "--swa" in flags:
            score = torch.load(folder / "swa.pt", weights_only=True)["swa_scores"][SCORE[task]]
    except OSError:
        score = None
    print(f"{folder.name}: {score}", flush=True)
    return score


def run_training(task, flags, seed, folder, data, out):
    kept = flags or "--save-period 1"  # the baseline's epochs are averaged in the end
    run_command(f"{BASE[task]} {kept} --seed {seed}".format(data=data, out=out), folder)


def run_command(command, folder):
    """Trains unless the run is there."""
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = command.split()
        command += ["--workers", 0, "--cache", "ram", "--project", folder.parent, "--name", folder.name]
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run([sys.executable, *map(str, command)], stdout=log, stderr=log, env=ENV)


def train_detector(run, data):
    """Detect, crop, segment: a detector of the masks' objects, which holds out what the segmentation does."""
    folder = run.with_name(f"{run.name}-detector")
    split = json.loads((run / "folds.json").read_text())
    written = run.with_name(f"{run.name}-detector.json")
    written.write_text(json.dumps({f"train_img/{name}.tif": fold for name, fold in split.items()}))
    seed = json.loads((run / "args.json").read_text())["seed"]
    run_command(f"{DETECTOR.format(data=data)} --folds {written} --seed {seed}", folder)


def held_out(run):
    """The files that a run has not trained on."""
    with open(run / "samples.csv", newline="") as file:
        return [Path(row["name"]) for row in csv.DictReader(file)]


def predict(task, flags, runs, files, target, data, out):
    """Runs predict.py on the files with the runs' last weights, a run or several. -> score"""
    epochs = sorted(runs[0].glob("epoch_*.pt"), key=lambda path: int(path.stem[6:]))[-3:]
    flags = flags.replace("DETECTOR", f"{runs[0]}-detector/last.pt").replace("EPOCHS", " ".join(map(str, epochs)))
    run_prediction(task, flags, runs, ["--source", *files], target)
    score = {"water": score_masks, "bccd": score_boxes, "letters": score_classes}[task](files, target, data, out)
    print(f"{target.name}: {score}", flush=True)
    return score


def run_prediction(task, flags, runs, source, target):
    shutil.rmtree(target, ignore_errors=True)
    command = ["predict.py", "--task", TASK[task], "--weights", *(run / "last.pt" for run in runs), *source,
               "--out", target, "--workers", 0, *flags.split()]
    command += [] if task == "letters" else ["--no-overlays"]
    if task == "water" and "--threshold" not in flags:
        command += ["--threshold", 0.5]  # not the one that was found on these very images
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=ENV)
    if done.returncode:
        raise SystemExit(f"{target.name}: {done.stderr}")


def score_masks(files, target, data, out):
    right, either = 0, 0
    for file in files:
        found = seg.read_mask(target / "masks" / f"{file.stem}.tif") > 0
        truth = seg.read_mask(data / "water/train_mask" / file.name) > 0
        right, either = right + int((found & truth).sum()), either + int((found | truth).sum())
    return right / either


def score_boxes(files, target, data, out):
    known = labels.read(data / "bccd", cache=out)
    metric, found = DetectionAP(len(known.names)), {file.stem: [] for file in files}
    for item in json.loads((target / "coco.json").read_text()):
        x, y, width, height = item["bbox"]
        label = known.category_ids.index(item["category_id"])
        found[item["image_id"]].append([x, y, x + width, y + height, item["score"], label])
    for i, file in enumerate(files):
        k = known.files.index(file)
        truth = np.column_stack((known.boxes[k], known.classes[k]))
        rows = torch.tensor(found[file.stem]).reshape(-1, 6)
        metric.update([rows], [torch.from_numpy(truth).float()], torch.tensor([i]))
    return metric.compute()["ap"]


def score_classes(files, target, data, out):
    with open(out / "glyphs/train.csv", newline="") as file:
        truth = dict(list(csv.reader(file))[1:])
    with open(target / "probabilities.csv", newline="") as file:
        header, *rows = csv.reader(file)
    return statistics.mean(truth[row[0]] == header[1 + np.argmax(np.array(row[1:], float))] for row in rows)


def minutes(folder):
    with open(folder / "results.csv", newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60


def table(title, rows, seeds, scores, taken=None):
    """Markdown: {flags: scores}, their mean and standard deviation, the mean and the standard deviation of the
    differences from the first row's score of the same seed. Rows with a run that failed are left out."""
    heads = [title, *(f"seed {s}" for s in seeds), "mean (sd)", "against it (sd)", *["minutes"] * bool(taken)]
    print(f"\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    base = scores[rows[0]]

    def text(values, sign=""):
        spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}.3f}{spread}"

    for flags in rows:
        own = scores[flags]
        if None not in own and None not in base:
            name = f"`{flags}`" if flags.startswith("--") else flags or "baseline"
            cells = [name, *(f"{v:.3f}" for v in own), text(own), text([a - b for a, b in zip(own, base)], "+"),
                     *([f"{taken[flags]:.1f}"] if taken else [])]
            print(f"| {' | '.join(cells)} |")


def campaign(description):
    """-> the parser of a script that fills such tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/playbook"))
    parser.add_argument("--only", nargs="+", choices=list(BASE), default=list(BASE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    return parser


def main():
    parser = campaign(__doc__)
    parser.add_argument("--rows", type=int, help="only so many of each task")
    args = parser.parse_args()
    write_glyphs(args.data / "letters", args.out / "glyphs")
    rows = {task: ROWS[task][:args.rows] + [SIZES[task]] for task in args.only}
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {}
        for task in args.only:
            (args.out / task).mkdir(parents=True, exist_ok=True)
            futures[task] = {flags: [pool.submit(train, task, flags, seed, args.data, args.out) for seed in args.seeds]
                             for flags in rows[task]}
        scores = {task: {flags: [future.result() for future in trained] for flags, trained in of_task.items()}
                  for task, of_task in futures.items()}
    for task in args.only:
        taken = {flags: statistics.mean(minutes(folder_of(args.out, task, flags, s)) for s in args.seeds)
                 for flags in rows[task] if None not in scores[task][flags]}
        table(f"{task}: {SCORE[task]}", rows[task], args.seeds, scores[task], taken)
        folders = [folder_of(args.out, task, "", seed) for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            if task == "water":
                list(pool.map(train_detector, folders, [args.data] * len(folders)))
            futures = {flags: [pool.submit(predict, task, flags, [folder], held_out(folder), folder_of(
                args.out / "predicted", task, flags, seed), args.data, args.out)
                for folder, seed in zip(folders, args.seeds)] for flags in PREDICT[task]}
            alone = {flags: [future.result() for future in given] for flags, given in futures.items()}
        table(f"predict.py: {SCORE[task]}", PREDICT[task], args.seeds, alone)
        for flags in TOGETHER[task]:
            score = predict(task, flags, folders, held_out(folders[0]), folder_of(
                args.out / "predicted", task, flags, "all"), args.data, args.out)
            print(f"all seeds together, {flags or 'no flag'}: {score:.3f}")
        others = {"two seeds": folders[1:] + folders[:1],
                  "two sizes": [folder_of(args.out, task, SIZES[task], seed) for seed in args.seeds]}
        pairs = {name: [predict(task, "", [one, two], held_out(one), folder_of(
            args.out / "predicted", task, name, seed), args.data, args.out)
            for one, two, seed in zip(folders, seconds, args.seeds)] for name, seconds in others.items()}
        table(f"two nets together: {SCORE[task]}", ["", *pairs], args.seeds, {"": alone[""]} | pairs)


if __name__ == "__main__":
    main()
