"""Photographs: ours against what people use instead, with a row per change, as a table.

    python -m tests.bench.photographs --data /data --out runs/photographs --only street weather --seeds 0 1 2
    python -m tests.bench.photographs ... --rows ours peer          # some rows; runs that are there are not run again

DATA holds `street` (train_img, train_mask, groups.csv: the group 0006R0 validates, all others train) and `weather` (a
folder per class below train; fold 0 of five validates). Peers: segmentation-models-pytorch's UNet on regnetx_002 with
cross-entropy, and timm's regnetx_002, trained as their users do: crops or random resized crops, hflip, (colour jitter),
AdamW 1e-3, cosine, ImageNet's normalisation. Every row sees the same files and sizes, and as many epochs, of --times as
many of ours. The score is that of the last epoch, with the mirrored view (ours of weather without it): mean IoU,
accuracy. Seconds are CPU time of all: reading, training, a validation after every epoch, the last one with the view.
Of the peers the training alone is told too. Set OMP_NUM_THREADS=1 where other programs run.
"""
import argparse
import csv
import functools
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data import cls, folds, images, seg
from utils.metrics.segmentation import MeanIoU
from utils.ops import geometry

EPOCHS = {"street": {"smoke": 1, "short": 8, "long": 40}, "weather": {"smoke": 1, "short": 30, "long": 150}}
BASE = {
    "street": "train_seg.py --data {data}/street --classes 11 --ignore 11 --imgsz 160 --folds {out}/street.json",
    "weather": "train_cls.py --data {data}/weather --net regnetx_002 --imgsz 128 --bs 32 --folds {out}/weather.json",
}
ROWS = {  # what is changed of the recipe `photos`
    "street": {
        "ours": "", "wildfire": "--recipe wildfire --bands all --bs 16 --repeat 1 --schedule cosine --loss lovasz ce",
        "padding": "--crop-padding 2 --border reflect wrap", "quarter turns": "--rot90", "zoom": "--zoom 0.7 1.5",
        "little zoom": "--zoom 0.8 1.25", "zoom in": "--zoom 1 1.5", "no colour": "--hue 0 --saturation 0 --value 0",
        "cross-entropy": "--loss ce", "mean planes": "--mean-planes", "conv0": "--conv0 32 32", "stem 1":
        "--stem-stride 1", "standard": "--pixel-scale standard", "no ema": "--no-ema",
        "warm-up": "--warmup-epochs 1", "batch 16": "--bs 16", "batch 4": "--bs 4", "flat": "--schedule flat",
        "balanced": "--class-weights balanced", "fp32": "--amp off", "lr": "--lr 2e-3"},
    "weather": {
        "ours": "", "dirty-mnist": "--recipe dirty-mnist", "quarter turns": "--rot90",
        "no crop": "--zoom 1 1 --aspect 1", "strong crop": "--zoom 1 3.5", "no colour":
        "--hue 0 --saturation 0 --value 0", "cutout": "--cutout 0.5 --cutout-size 0.3", "warm-up": "--warmup-epochs 2", "adam": "--optimizer adam "
        "--weight-decay 1e-5", "no ema": "--no-ema", "bare": "--zoom 1 1 --aspect 1 --hue 0 --saturation 0 --value 0"},
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_splits(data, out):
    """street.json and weather.json, {name: fold}: 0 validates."""
    with open(data / "street/groups.csv", newline="") as file:
        split = {row["id"]: int(row["group"] != "0006R0") for row in csv.DictReader(file)}
    (out / "street.json").write_text(json.dumps(split))
    table = cls.read(data / "weather")
    names = [str(file.relative_to(data / "weather")) for file in table.files]
    fold_of = folds.assign(names, [0.2] * 5, strata=cls.strata(table.labels))
    (out / "weather.json").write_text(json.dumps({name: int(fold != 0) for name, fold in fold_of.items()}))


def ours(task, flags, seed, epochs, data, out):
    """A run of our script -> (score, seconds)."""
    name = f"{task}-{flags or 'ours'}-{epochs}-{seed}".replace(" ", "_").replace("--", "").replace("/", "")
    folder = out / name
    if not (folder / "results.json").exists():
        command = [*BASE[task].format(data=data, out=out).split(), *flags.split(), "--epochs", epochs, "--seed", seed,
                   "--project", out, "--name", name, "--device", "cpu", "--save-period", 0, "--cache", "ram"]
        before = cpu_seconds(resource.RUSAGE_CHILDREN)
        with open(out / f"{name}.log", "w") as log:
            subprocess.run([sys.executable, *map(str, command)], stdout=log, stderr=log, check=False)
        if (folder / "results.json").exists():
            (folder / "cpu.txt").write_text(str(cpu_seconds(resource.RUSAGE_CHILDREN) - before))
    try:
        results = json.loads((folder / "results.json").read_text())
        seconds = float((folder / "cpu.txt").read_text())
    except OSError:
        return None
    return (results["last with flips"]["miou"] if task == "street" else results["last"]["acc"]), seconds


def cpu_seconds(whose=resource.RUSAGE_SELF):
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


class Photographs(Dataset):
    """Bytes in RAM under a transform of image (and mask)."""

    def __init__(self, items, transform):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.transform(*self.items[i])


def peer(task, seed, epochs, data, out):
    """smp's UNet or timm's classifier, as their users train them -> (score, seconds, seconds of training)."""
    kept = out / f"{task}-peer-{epochs}-{seed}.json"
    if not kept.exists():
        torch.manual_seed(seed)
        begin = cpu_seconds()
        score, training = (street_peer if task == "street" else weather_peer)(epochs, data, out)
        kept.write_text(json.dumps([score, cpu_seconds() - begin, training]))
    return tuple(json.loads(kept.read_text()))


def fit(model, loader, loss_of, epochs, evaluate):
    """AdamW 1e-3, weight decay 0.01, cosine; every epoch is validated -> (the last score, seconds of training)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    training = 0
    for epoch in range(epochs):
        begin = cpu_seconds()
        model.train()
        for batch in loader:
            optimizer.zero_grad(set_to_none=True)
            loss_of(*batch).backward()
            optimizer.step()
            schedule.step()
        training += cpu_seconds() - begin
        model.eval()
        with torch.inference_mode():
            score = evaluate(mirrored=epoch == epochs - 1)
    return score, training


def street_peer(epochs, data, out):
    import segmentation_models_pytorch as smp
    split, samples = json.loads((out / "street.json").read_text()), seg.read(data / "street", classes=11, ignore=11)
    parts = [[(images.read_picture(image, [1, 2, 3]), seg.read_mask(mask, 11, 11))
              for name, (image, mask) in zip(samples.names, samples.pairs) if bool(split[name]) is trained]
             for trained in (True, False)]
    normal = v2.Normalize(MEAN, STD)

    def crop(image, mask, size=160):
        y, x = (int(torch.randint(side - size + 1, ())) for side in mask.shape)
        image, mask = image[:, y:y + size, x:x + size], mask[y:y + size, x:x + size]
        if torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return normal(image.float() / 255), mask.long()

    model = smp.Unet("tu-regnetx_002", encoder_weights=None, in_channels=3, classes=11)
    loader = DataLoader(Photographs(parts[0], crop), 16, shuffle=True, drop_last=True)

    def evaluate(mirrored):
        metric = MeanIoU(11, seg.IGNORE)
        for image, mask in parts[1]:
            x = normal(image.float() / 255)[None]
            height, width = x.shape[2:]
            x = F.pad(x, (0, -width % 32, 0, -height % 32), mode="reflect")
            probs = model(x).softmax(1)
            if mirrored:
                probs = probs + model(x.flip(-1)).softmax(1).flip(-1)
            metric.update(probs[..., :height, :width].argmax(1), mask[None])
        return metric.compute()["miou"]

    return fit(model, loader, lambda x, mask: F.cross_entropy(model(x), mask, ignore_index=seg.IGNORE), epochs,
               evaluate)


def weather_peer(epochs, data, out):
    import timm
    table, split = cls.read(data / "weather"), json.loads((out / "weather.json").read_text())
    trained = [bool(split[str(file.relative_to(data / "weather"))]) for file in table.files]
    items = [(geometry.resize(images.read_picture(file, [1, 2, 3]).contiguous(), (192, 192)), int(row.argmax()))
             for file, row in zip(table.files, table.labels)]
    after = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose([v2.RandomResizedCrop(128, (0.35, 1), antialias=True), v2.RandomHorizontalFlip(),
                            v2.ColorJitter(0.4, 0.4, 0.4), *after])
    plain = v2.Compose([v2.Resize((128, 128), antialias=True), *after])
    parts = [[item for item, is_trained in zip(items, trained) if is_trained is wanted] for wanted in (True, False)]
    model = timm.create_model("regnetx_002", num_classes=len(table.names))
    loader = DataLoader(Photographs(parts[0], lambda x, y: (augmented(x), y)), 32, shuffle=True, drop_last=True)

    def evaluate(mirrored):
        right = []
        for x, y in DataLoader(Photographs(parts[1], lambda x, y: (plain(x), y)), 32):
            probs = model(x).softmax(1)
            if mirrored:
                probs = probs + model(x.flip(-1)).softmax(1)
            right += (probs.argmax(1) == y).tolist()
        return float(np.mean(right))

    return fit(model, loader, lambda x, y: F.cross_entropy(model(x), y), epochs, evaluate)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds street and weather")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--only", nargs="+", choices=BASE, default=list(BASE))
    parser.add_argument("--rows", nargs="+", help="names of rows, and peer; without: all")
    parser.add_argument("--budget", choices=("smoke", "short", "long"), default="short", help="1 epoch, about 6 or 30 "
                        "minutes on 2 cores")
    parser.add_argument("--times", type=float, default=1.0, help="our epochs in place of one of the peer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_splits(args.data, args.out)
    for task in args.only:
        print(f"| {task}, {args.budget} | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean | seconds |")
        print(f"|---|{'---|' * (len(args.seeds) + 2)}")
        epochs = EPOCHS[task][args.budget]
        rows = {"peer": functools.partial(peer, task)} | {
            name: functools.partial(ours, task, flags) for name, flags in ROWS[task].items()}
        for name, run in rows.items():
            if args.rows and name not in args.rows:
                continue
            count = epochs if name == "peer" else round(epochs * args.times)
            found = [run(seed, count, args.data, args.out) for seed in args.seeds]
            scores = ["failed" if pair is None else f"{pair[0]:.3f}" for pair in found]
            good = [pair for pair in found if pair]
            mean, *seconds = (statistics.mean(column) for column in zip(*good)) if good else (float("nan"),) * 2
            seconds = ", training ".join(f"{value:.0f}" for value in seconds)
            print(f"| {name}, {count} epochs | {' | '.join(scores)} | {mean:.3f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
