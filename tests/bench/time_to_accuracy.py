"""How long our training takes until it is as good as the peer's at its end, on the same split and machine.

    python -m tests.bench.time_to_accuracy --data DIR --only water letters --seeds 0 1 2
    pip install ultralytics; python -m tests.bench.time_to_accuracy --data DIR --only cells

DIR is as in tests/bench/playbook.py. Peers: segmentation-models-pytorch's UNet (tests/bench/peer_smp.py, 40 epochs);
timm's tf_efficientnetv2_b0 on letters of 32 pixels as its users train it (fp32, AdamW 1e-3, cosine, small turns and
shifts, 5 epochs); Ultralytics' yolov5n.yaml on the blood cells with its defaults (320 pixels, batch 16, 30 epochs),
whose boxes our metric scores. Ours is validated every epoch; the first epoch that reaches the peer's last score counts.
All epochs are timed with their validations, the start is not. Set OMP_NUM_THREADS=1 where other programs run.
"""
import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data import cls, folds, images, labels
from tests.bench.photographs import Photographs
from tests.bench.playbook import held_out, write_glyphs
from utils.metrics.average_precision import DetectionAP

OURS = {
    "water": "train_seg.py --data {data}/water --pixel-scale 10000 --imgsz 128 --groups {data}/water/groups.csv "
             "--epochs 40 --bs 16 --repeat 1 --schedule cosine --workers 0 --cache ram --loss lovasz_elu bce=1 "
             "--gain 1",
    "letters": "train_cls.py --data {out}/glyphs --groups {out}/glyphs/writers.csv --folds 5 --net efficientnetv2_b0 "
               "--loss ce --imgsz 32 --bs 128 --optimizer adamw --weight-decay 0.01 --lr 4e-3 --no-rot90 --cutout 0 "
               "--drop 0 --drop-path 0 --epochs 5 --workers 0 --cache ram",
    "cells": "train_det.py --data {data}/bccd --variant n --imgsz 320 --bs 16 --epochs 30 --workers 0 --cache ram",
}
SCORE = {"water": "iou", "letters": "acc", "cells": "ap"}


def ours(task, seed, args):
    """-> [(score, seconds, steps)] of the epochs."""
    folder = args.out / f"{task}-{seed}"
    if not (folder / "results.json").exists():
        command = f"{OURS[task].format(data=args.data, out=args.out)} --seed {seed} --device cpu --save-period 0"
        with open(args.out / f"{task}-{seed}.log", "w") as log:
            subprocess.run([sys.executable, *command.split(), "--project", args.out, "--name", f"{task}-{seed}"],
                           stdout=log, stderr=log, check=True)
    steps = torch.load(folder / "last.pt", weights_only=True)["steps_per_epoch"]
    with open(folder / "results.csv", newline="") as file:
        return [(float(row[SCORE[task]]), float(row["seconds"]), steps) for row in csv.DictReader(file)]


def peer(task, seed, args):
    """-> (the last epoch's score, seconds). Kept in a file."""
    kept = args.out / f"{task}-peer-{seed}.json"
    if not kept.exists():
        train = {"water": water_peer, "letters": letters_peer, "cells": cells_peer}[task]
        kept.write_text(json.dumps(train(seed, args)))
    return json.loads(kept.read_text())


def water_peer(seed, args):
    command = f"-m tests.bench.peer_smp --data {args.data}/water --groups {args.data}/water/groups.csv --scale 10000"
    out = subprocess.run([sys.executable, *command.split(), "--seed", str(seed)], stdout=subprocess.PIPE, text=True,
                         check=True).stdout
    return float(re.search(r"last epoch iou ([\d.]+)", out)[1]), sum(map(float, re.findall(r"seconds ([\d.]+)", out)))


def letters_peer(seed, args, epochs=5, batch=32):
    import timm
    torch.manual_seed(seed)
    glyphs = args.out / "glyphs"
    table = cls.read(glyphs)
    names = [str(file.relative_to(glyphs)) for file in table.files]
    fold_of = folds.assign(names, [0.2] * 5, strata=cls.strata(table.labels),
                           groups=folds.read_groups(glyphs / "writers.csv", names))
    items = [(images.read(file).expand(3, -1, -1), int(row.argmax())) for file, row in zip(table.files, table.labels)]
    after = [v2.Resize((32, 32), antialias=True), v2.ToDtype(torch.float32, scale=True),
             v2.Normalize([0.5] * 3, [0.5] * 3)]
    augmented, plain = v2.Compose([v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1)), *after]), v2.Compose(after)
    parts = [[item for item, name in zip(items, names) if (fold_of[name] > 0) is trained] for trained in (True, False)]
    model = timm.create_model("tf_efficientnetv2_b0", num_classes=len(table.names))
    loader = DataLoader(Photographs(parts[0], lambda x, y: (augmented(x), y)), batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule, began = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader)), time.monotonic()
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in DataLoader(
                Photographs(parts[1], lambda x, y: (plain(x), y)), 64)]
    return torch.cat(right).mean().item(), time.monotonic() - began


def cells_peer(seed, args, epochs=30):
    from ultralytics import YOLO
    data, root = labels.read(args.data / "bccd", cache=args.out), args.out.absolute() / f"cells-yolo-{seed}"
    held = {file.name for file in held_out(args.out / f"cells-{seed}")}
    for part in ("train", "val"):
        (root / part / "images").mkdir(parents=True, exist_ok=True)
        (root / part / "labels").mkdir(exist_ok=True)
    for file, (height, width), rows, classes in zip(data.files, data.sizes, data.boxes, data.classes):
        part = root / ("val" if file.name in held else "train")
        shutil.copy(file, part / "images")
        x1, y1, x2, y2 = rows.T / [[width], [height], [width], [height]]
        lines = zip(classes.tolist(), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        (part / "labels" / f"{file.stem}.txt").write_text("".join(f"{' '.join(map(str, line))}\n" for line in lines))
    (root / "data.yaml").write_text(json.dumps({"path": str(root), "train": "train/images", "val": "val/images",
                                                "names": dict(enumerate(data.names))}))
    YOLO("yolov5n.yaml").train(data=str(root / "data.yaml"), imgsz=320, batch=16, epochs=epochs, cache=True, seed=seed,
                               workers=0, device="cpu", plots=False, project=str(root), name="run")
    with open(root / "run/results.csv", newline="") as file:
        seconds = float(list(csv.DictReader(file))[-1]["time"])
    model, metric = YOLO(root / "run/weights/last.pt"), DetectionAP(len(data.names))
    for file, rows, classes in zip(data.files, data.boxes, data.classes):
        if file.name in held:
            found = model.predict(file, imgsz=320, conf=0.001, iou=0.65, max_det=300, verbose=False)[0].boxes.data
            truth = torch.cat((torch.from_numpy(rows), torch.from_numpy(classes)[:, None]), 1)
            metric.update([found.cpu()], [truth.float()])
    return metric.compute()["ap"], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"))
    parser.add_argument("--only", nargs="+", choices=OURS, default=["water", "letters"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "letters" in args.only:
        write_glyphs(args.data / "letters", args.out / "glyphs")
    print("| | the peer's score | its minutes | ours at the end | our minutes, steps to that | share of its time |")
    print("|---|---|---|---|---|---|", flush=True)
    for task in args.only:
        for seed in args.seeds:
            epochs = ours(task, seed, args)
            score, seconds = peer(task, seed, args)
            first = next((i for i, (own, *_) in enumerate(epochs, 1) if own >= score), None)
            spent = sum(took for _, took, _ in epochs[:first])
            reached = f"{spent / 60:.2f}, {first * epochs[0][2]}" if first else "never"
            print(f"| {task}, seed {seed} | {score:.3f} | {seconds / 60:.2f} | {epochs[-1][0]:.3f} | {reached} | "
                  f"{spent / seconds if first else float('nan'):.2f} |", flush=True)


if __name__ == "__main__":
    main()
