"""The playbook's tables of what comes between two trainings: pseudo labels, folds together, wrong labels.

    python -m tests.bench.relabelling --data DIR --out runs/playbook --only water letters

The sets and commands are those of tests.bench.playbook. For each seed the places, writers or images are dealt anew: a
quarter to test on, another with labels, the other half without. Scores are predict.py's, on the test quarter, with the
last epoch's weights. For the second table, 15 % of the samples that are not tested on get the label of another one.
"""
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.files import write_csv
from tests.bench.playbook import SCORE, campaign, predict, run_prediction, run_training, table, write_glyphs
from utils.pictures import review

MORE = {"water": "--ignore 254", "bccd": "", "letters": ""}  # for pseudo labels
SURE = {"water": 0.9, "bccd": 0.5, "letters": 0.9}  # few boxes have more, after so short a training
EPOCHS = {"water": 8, "bccd": 15, "letters": 2}
KNOWN = "the labelled quarter"
ROWS = [KNOWN, "as many steps as with the other half", "pseudo labels of the other half",
        "the other half's true labels", "folds 0, 1, 2, the mean of their scores", "folds 0, 1, 2 together"]
NOISY = "15 % wrong labels"
NOISE_ROWS = [NOISY, "the worst left out", "the worst labelled anew", "no wrong labels"]


def read(task, data, out):
    """-> [(image, label, group)]; a label is a mask's file, an image's annotations, or a letter."""
    if task == "water":
        with open(data / "water/groups.csv", newline="") as file:
            return [(data / f"water/train_img/{row['id']}.tif", data / f"water/train_mask/{row['id']}.tif",
                     row["group"]) for row in csv.DictReader(file)]
    if task == "bccd":
        known = json.loads((data / "bccd/train/label/Train.json").read_text())
        return [(data / "bccd/train/images" / image["file_name"],
                 (image, [a for a in known["annotations"] if a["image_id"] == image["id"]], known["categories"]),
                 image["file_name"]) for image in known["images"]]
    with open(out / "glyphs/train.csv", newline="") as file, open(out / "glyphs/writers.csv", newline="") as writers:
        return [(out / f"glyphs/train/{name}.png", letter, writer) for (name, letter), (_, writer) in zip(
            list(csv.reader(file))[1:], list(csv.reader(writers))[1:])]


def write(task, items, root):
    """The items as a folder that the task's command reads: ROOT/water, ROOT/bccd or ROOT/glyphs."""
    def link(file, name):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(file.resolve())

    for image, label, _ in items:
        link(image, {"water": "water/train_img/", "bccd": "bccd/train/images/", "letters": "glyphs/train/"}[task]
             + image.name)
        if task == "water":
            link(label, f"water/train_mask/{image.name}")
    if task == "water":
        write_csv(root / "water/groups.csv", ["id", "group"], [(image.stem, group) for image, _, group in items])
    elif task == "bccd":
        (root / "bccd/train/label").mkdir(parents=True, exist_ok=True)
        (root / "bccd/train/label/Train.json").write_text(json.dumps({
            "images": [label[0] | {"id": i, "file_name": image.name} for i, (image, label, _) in enumerate(items)],
            "annotations": [a | {"image_id": i} for i, (_, label, _) in enumerate(items) for a in label[1]],
            "categories": items[0][1][2]}))
    else:
        write_csv(root / "glyphs/train.csv", ["name", "label"], [(image.stem, letter) for image, letter, _ in items])
        write_csv(root / "glyphs/writers.csv", ["name", "writer"], [
            (f"train/{image.name}", writer) for image, _, writer in items])
    return root


def measure(task, seed, data, out):
    """-> {row: score} of both tables, and the share of the samples ranked worst that are wrong."""
    rng = np.random.default_rng(seed)
    items = read(task, data, out)
    groups = rng.permutation(sorted({group for *_, group in items}))
    quarter = -(-len(groups) // 4)
    test, known, rest = ([item for item in items if item[2] in part] for part in (
        set(groups[:quarter]), set(groups[quarter:2 * quarter]), set(groups[2 * quarter:])))
    files = [image for image, *_ in test]
    root = out / "labels" / f"{task}-{seed}"
    name = {"water": "water", "bccd": "bccd", "letters": "glyphs"}[task]

    def train(run, source, flags=""):
        """A training on the set in root/source."""
        run_training(task, flags, seed, root / run, root / source, root / source)
        return root / run

    def score(run, *runs):
        return predict(task, "", [run, *runs], files, root / f"predicted/{run.name}-{len(runs)}", data, out)

    write(task, known, root / "known"), write(task, rest, root / "rest")
    longer = f"--epochs {2 * EPOCHS[task]}"  # a quarter is soon seen
    folds = [train(f"fold{k}", "known", f"{longer} --fold {k}") for k in range(3)]
    alone = [score(fold) for fold in folds]
    run_prediction(task, f"--pseudo {SURE[task]}", folds[:1], ["--source", *(image for image, *_ in rest)],
                   root / "pseudo")
    steps = f"--epochs {round(2 * EPOCHS[task] * (len(rest) / len(known) + 0.8) / 0.8)}"
    scores = dict(zip(ROWS, (
        alone[0], score(train("steps", "known", steps)),
        score(train("with-pseudo", "known", f"{longer} {MORE[task]} --extra-data {root}/pseudo/pseudo")),
        score(train("with-true", "known", f"{longer} --extra-data {root}/rest/{name}")),
        float(np.mean(alone)), score(*folds))))

    right = known + rest
    chosen = rng.permutation(len(right))[:round(0.15 * len(right))]
    wrong = list(right)
    for i, other in zip(chosen, np.roll(chosen, 1)):
        wrong[i] = (right[i][0], right[other][1], right[i][2])
    write(task, right, root / "right"), write(task, wrong, root / "wrong")
    folds = [train(f"wrong{k}", "wrong", f"--folds 3 --fold {k}") for k in range(3)]
    ranked = review.rank_samples(folds)
    write_csv(root / "noise.csv", list(ranked[0]), [list(row.values()) for row in ranked])
    worst = f"{root}/noise.csv:{len(chosen)}"
    anew = []
    for fold in folds:
        run_prediction(task, f"--noisy {worst} --pseudo 0.5", [fold], [], root / f"anew-{fold.name}")
        anew.append(f"{root}/anew-{fold.name}/pseudo")
    left_out = f"--folds 3 --drop-noisy {worst}"
    scores |= dict(zip(NOISE_ROWS, (
        score(folds[0]), score(train("left-out", "wrong", left_out)),
        score(train("anew", "wrong", f"{left_out} {MORE[task]} --extra-data {' '.join(anew)}")),
        score(train("right0", "right", "--folds 3")))))
    bad = {right[i][0].name for i in chosen}
    return scores, np.mean([Path(row["name"]).name in bad for row in ranked[:len(chosen)]])


def main():
    args = campaign(__doc__).parse_args()
    write_glyphs(args.data / "letters", args.out / "glyphs")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {task: [pool.submit(measure, task, seed, args.data, args.out) for seed in args.seeds]
                   for task in args.only}
        for task, of_seeds in futures.items():
            found = [future.result() for future in of_seeds]
            for rows in (ROWS, NOISE_ROWS):
                table(f"{task}: {SCORE[task]}", rows, args.seeds, {row: [s[row] for s, _ in found] for row in rows})
            print("\nwrong labels among those ranked worst:", *(f"{share:.2f}" for _, share in found))


if __name__ == "__main__":
    main()
