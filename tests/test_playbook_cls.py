"""What train_cls.py and predict.py offer beyond the recipe: mixing, thresholds, pseudo labels, --debug, records."""
import csv
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
import train_cls
from data import cls
import nets
from tests.conftest import TINY_CLS, write_dirty
from tests.harness import differences, read
from tests.test_bad_input_cls import FLAGS, weights
from tests.test_scripts_cls import direct, pictures, results, squares, table_of  # noqa: F401, pictures is a fixture
from utils import report
from utils.pictures import table
from utils.train import checkpoint
from utils.errors import Stopped, UserError

PREDICT = [*FLAGS, "--amp", "off", "--source", "in"]


@pytest.fixture(scope="module")
def folds(dirty, tmp_path_factory):
    """Two folds of one split, two epochs each; the folder that they lie in."""
    folder = tmp_path_factory.mktemp("folds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for fold in (0, 1):
            patch.setattr("sys.argv", ["train_cls.py", "--data", str(dirty), *TINY_CLS, "--epochs", "2", "--folds", "3",
                                       "--fold", str(fold), "--name", f"fold{fold}", "--lr", "0.01", "--no-ema",
                                       "--save-period", "1"])
            train_cls.main()
    return folder / "runs/cls"


def eval_model(run, name, root):
    """-> the held-out files of a run, and what a checkpoint of it says about them: (N, classes) float64."""
    state = checkpoint.load(run / name)
    fold_of = json.loads((run / "folds.json").read_text())
    files = [root / file for file, fold in fold_of.items() if fold == state["args"]["fold"]]
    inputs = cls.Input(**state["input"])
    views = cls.AugmentedImages(cls.Images(files, np.zeros((len(files), 1)), bands=inputs.bands), inputs.imgsz)
    net = checkpoint.load_weights(nets.build(state["arch"]).eval(), state, name)
    with torch.no_grad():
        z = net(inputs(cls.collate([views[i] for i in range(len(files))])))
    return files, (z.softmax(1) if state["single_label"] else z.sigmoid()).double().numpy()


def edited(path, factor=1.0, centre=None, **changes):
    """A checkpoint again, with other logits: (logits - centre) * factor. centre: (classes,)"""
    state = torch.load(path, weights_only=True)
    head = [name for name, tensor in state["model"].items() if tensor.ndim == 2][-1].removesuffix(".weight")
    if centre is not None:
        state["model"][f"{head}.bias"] -= torch.as_tensor(centre, dtype=torch.float32)
    for part in ("weight", "bias"):
        state["model"][f"{head}.{part}"] *= factor
    torch.save(state | changes, path)
    return path


def minded(path, files, factor=40.0, **options):
    """A checkpoint of a net that has learned nothing but says yes to half of the files, and no to the others."""
    probs = direct(weights(path, imgsz=64, in_chans=2, bands=(3, 1), **options), files, bands=(3, 1))
    z = np.log(probs) if options.get("single_label") else np.log(probs / (1 - probs))
    return edited(path, factor, np.sort(z, 0)[[1, 2]].mean(0))


# ---- mixing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [["--mixup", 1, "--optimizer", "radam"],
                                   ["--cutmix", 1, "--gridmask", 1, "--loss", "focal"]], ids=lambda f: f[0][2:])
def test_mixed_runs_are_what_they_say_and_resume_to_the_same_bits(script, dirty, monkeypatch, flags):
    flags, seen, stop = ["--data", dirty, *TINY_CLS, "--bs", 6, "--epochs", 2, "--folds", 0, *flags], [], iter(())
    mix = train_cls.mix.for_labels

    def watched(x, labels, **options):
        if next(stop, False):
            os.kill(os.getpid(), signal.SIGTERM)
        found = mix(x, labels, **options)
        seen.append((x, labels, *found, [k for k, p in options.items() if p == 1]))
        return found

    monkeypatch.setattr(train_cls.mix, "for_labels", watched)
    script(train_cls, *flags, "--name", "straight")
    for x, labels, mixed, soft, kinds in seen:
        assert kinds == [f"p_{kind}" for kind in ("mixup", "cutmix", "gridmask") if f"--{kind}" in flags]
        assert soft.dtype == torch.float32 and soft.shape == labels.shape
        assert (x != mixed).flatten(1).any(1).all() and 0 <= soft.min() and soft.max() <= 1
    assert any((labels != soft).any() for _, labels, _, soft, _ in seen) and len(seen) == 4
    stop = iter([False, False, True])
    with pytest.raises(Stopped):
        script(train_cls, *flags, "--name", "broken")
    assert checkpoint.load("runs/cls/broken/last.pt")["step"] == 3
    script(train_cls, "--resume", "runs/cls/broken")
    straight, broken = (read(f"runs/cls/{name}/last.pt") for name in ("straight", "broken"))
    assert differences(straight, broken) == [] and straight["step"] == 4
    assert all(np.isfinite(row["loss"]) for row in straight["history"])


# ---- thresholds ------------------------------------------------------------------------------------------------------
def test_checkpoints_keep_the_thresholds_of_their_own_evaluation(folds, dirty):
    """Per class no threshold has more right labels; 0.5 where that has as many."""
    header, keys, rows = table_of(dirty / "dirty_mnist_2nd_answer.csv")
    stored = []
    for name in ("epoch_1.pt", "epoch_2.pt", "last.pt", "best.pt"):
        files, probs = eval_model(folds / "fold0", name, dirty)
        labels = np.array([rows[keys.index(str(int(file.stem)))] for file in files])
        stored.append(checkpoint.load(folds / "fold0" / name)["threshold"])
        for p, y, threshold in zip(probs.T, labels.T, stored[-1]):
            hits = {t: int(((p > t) == y).sum()) for t in (threshold, 0.5, 0, *p)}
            assert hits[threshold] == max(hits.values()) and (threshold == 0.5 or hits[0.5] < hits[threshold])
            assert np.abs(p - threshold).min() > 1e-6 or threshold == 0.5  # between two scores
        assert len(stored[-1]) == len(header) - 1 == 4
    assert stored[1] == stored[2] != stored[0] and stored[3] in stored[:2] and set(stored[1]) != {0.5}


def test_prediction_takes_the_stored_thresholds(script, pictures):  # noqa: F811
    one, two = minded("one.pt", pictures, 5.0), minded("two.pt", pictures, 5.0, seed=1)
    probs = [direct(path, pictures, bands=(3, 1)) for path in (one, two)]
    low, high = np.sort(probs[0], 0)[[0, 1]].mean(0), np.sort(probs[1], 0)[[3, 4]].mean(0)
    edited(one, threshold=low.tolist())
    edited(two, threshold=high.tolist())
    edited(weights("old.pt", imgsz=64, in_chans=2, bands=(3, 1)))  # a checkpoint from before there were any
    assert "threshold" not in torch.load("old.pt", weights_only=True)
    old, mean = direct("old.pt", pictures, bands=(3, 1)), np.mean(probs, 0)
    for names, flags, want, threshold in (
            (["one"], [], probs[0], low), (["two"], [], probs[1], high), (["one"], ["--threshold", 0.5], probs[0], 0.5),
            (["one", "two"], [], mean, (low + high) / 2), (["old"], [], old, 0.5),
            (["old", "one"], [], (old + probs[0]) / 2, low)):
        out = f"out-{'-'.join(names)}{len(flags)}"
        script(predict, *PREDICT, "--weights", *(f"{name}.pt" for name in names), *flags, "--out", out)
        _, found, decided = results(out)
        sure = np.abs(want - threshold) > 1e-4
        np.testing.assert_allclose(found, want, atol=5e-5)
        assert ((decided == 1) == (want > threshold))[sure].all() and sure.mean() > 0.7
    decided = {name: results(f"out-{name}")[2].sum(0).tolist() for name in ("one0", "two0")}
    assert decided == {"one0": [4] * 4, "two0": [1] * 4}


# ---- pseudo labels and extra data ------------------------------------------------------------------------------------
def test_rows_where_all_classes_are_sure(script, pictures, capsys):  # noqa: F811
    net = minded("net.pt", pictures)
    probs = direct(net, pictures, bands=(3, 1))
    doubt = np.maximum(probs, 1 - probs).min(1)
    least = float(np.sort(doubt)[[1, 2]].mean())
    script(predict, *PREDICT, "--weights", net, "--out", "out", "--pseudo", least)
    kept = [i for i in range(5) if doubt[i] >= least]
    with open("out/pseudo/train.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "a", "b", "c", "d"] and len(kept) == 3
    assert rows == [[pictures[i].name, *map(str, (probs[i] > 0.5).astype(int))] for i in kept]
    assert {p.name: p.resolve() for p in Path("out/pseudo/train").iterdir()} == {
        pictures[i].name: pictures[i].resolve() for i in kept}
    assert "pseudo labels of 3 images: train_cls.py --extra-data out/pseudo" in capsys.readouterr().out


def watch(monkeypatch):
    """Lists that the training's images (files, labels) and loaders will be put into."""
    sources, loaders, Images, make = [], [], cls.Images, train_cls.train_loader
    monkeypatch.setattr(train_cls.cls, "Images", lambda files, labels, **options: sources.append((files, labels))
                        or Images(files, labels, **options))
    monkeypatch.setattr(train_cls, "train_loader", lambda *args, **options: loaders.append(make(*args, **options))
                        or loaders[-1])
    return sources, loaders


def test_training_maps_classes_by_name_and_draws_by_weight(script, tmp_path, pictures, monkeypatch, capsys):  # noqa: F811
    net = minded("net.pt", pictures)  # of the classes a, b, c, d
    probs = direct(net, pictures, bands=(3, 1))
    script(predict, *PREDICT, "--weights", net, "--out", "out", "--pseudo", 0.5)
    root = write_dirty(tmp_path / "data", train=9, test=0, classes=5)
    table = root / "dirty_mnist_2nd_answer.csv"
    table.write_text(table.read_text().replace("index,a,b,c,d,e", "index,d,b,e,a,c"))
    own = table_of(table)[2]
    sources, loaders = watch(monkeypatch)
    script(train_cls, "--data", root, *TINY_CLS, "--folds", 3, "--extra-data", "out/pseudo:3")
    assert "11 images to train, 3 to validate; 5 classes" in capsys.readouterr().out
    (files, labels), _ = sources
    for file, row in zip(files[:6], labels):
        assert row.tolist() == own[int(file.stem)].tolist()
    yes = dict(zip((path.name for path in pictures), probs > 0.5))
    for file, row in zip(files[6:], labels[6:]):
        a, b, c, d = yes[file.name]
        assert row.tolist() == [d, b, 0, a, c] and file.parent == Path("out/pseudo/train")
    assert len(files) == 11 and len(set(map(tuple, labels[6:].tolist()))) > 1
    count, sampler = Counter(), loaders[0].batch_sampler
    for epoch in range(600):
        sampler.set_epoch(epoch)
        count.update((sampler.order() % 11).tolist())
    shares = np.array([count[i] for i in range(11)]) / count.total()
    assert shares == pytest.approx(np.array([1] * 6 + [3] * 5) / 21, rel=0.12)


@pytest.mark.parametrize("kinds", [2, 1])
def test_pseudo_labels_of_exclusive_classes(script, pictures, monkeypatch, kinds):  # noqa: F811
    """Also when the net is sure of pictures of one class only."""
    net = weights("net.pt", imgsz=64, in_chans=2, bands=(3, 1), single_label=True, classes=("red", "blue"))
    z = np.log(direct(net, pictures, bands=(3, 1)))
    edited(net, 100.0, (np.sort(z, 0)[[1, 2]].mean(0) if kinds == 2 else (0, 50)))
    probs = direct(net, pictures, bands=(3, 1))
    script(predict, *PREDICT, "--weights", net, "--out", "out", "--pseudo", 0.5)
    with open("out/pseudo/train.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["name", "label"], *([path.name, ("red", "blue")[k]] for path, k in zip(pictures, probs.argmax(1)))]
    assert len({label for _, label in rows[1:]}) == kinds
    squares(Path("photos"), train=6, test=0)  # blue, green, red
    sources, _ = watch(monkeypatch)
    script(train_cls, "--data", "photos", *TINY_CLS, "--folds", 0, "--loss", "ce", "--extra-data", "out/pseudo")
    (files, labels), = sources
    assert np.array(labels)[6:].tolist() == [[0, 0, 1] if k == 0 else [1, 0, 0] for k in probs.argmax(1)]


def test_extra_data_that_does_not_fit(refused, dirty, tmp_path):
    write_dirty(tmp_path / "more", train=3, test=0, classes=6)
    squares(tmp_path / "photos", train=6, test=0)
    train = [*TINY_CLS, "--data", dirty, "--extra-data"]
    refused(train_cls, *train, "more:2", says=["more: ", "class e", "training data"])
    refused(train_cls, *train, "photos", says=["photos: ", "training data"])
    refused(train_cls, *train, "nowhere", says="nowhere: no such folder")
    table = cls.Samples([], np.zeros((0, 2), np.float32), ["b", "a"], False)
    extra = cls.Samples(["x", "y"], np.array([[1], [0]], np.float32), ["a"], False)
    assert cls.with_names(extra, table, "z").labels.tolist() == [[0, 1], [0, 0]]
    # in a small table every row may happen to have one class
    assert cls.with_names(extra._replace(single_label=True), table, "z").single_label is False
    with pytest.raises(UserError, match="one label per image or several"):
        cls.with_names(extra, table._replace(single_label=True), "z")


# ---- debug -----------------------------------------------------------------------------------------------------------
def test_debug_of_many_validations_an_epoch(script, dirty):
    """Of a few images an epoch has fewer parts."""
    script(train_cls, "--data", dirty, *TINY_CLS, "--folds", 3, "--debug", "--val-interval", 0.01, "--lr", 0.01)
    assert len(list(csv.DictReader(open("runs/cls/exp/results.csv")))) == 4  # two epochs in two parts each


def test_debug_runs_two_short_epochs(script, tmp_path, capsys):
    root = write_dirty(tmp_path / "data", train=60, test=0, side=16)
    script(train_cls, "--data", root, *TINY_CLS, "--debug", "--epochs", 30, "--lr", 0.003)
    out, rows = capsys.readouterr().out, list(csv.DictReader(open("runs/cls/exp/results.csv")))
    assert "32 images to train, 4 to validate" in out and len(rows) == 2


# ---- records ---------------------------------------------------------------------------------------------------------
def test_samples_are_the_mean_log_likelihoods(script, folds, dirty, tmp_path):
    squares(tmp_path / "photos", train=9, test=0)
    script(train_cls, "--data", "photos", *TINY_CLS, "--folds", 3, "--loss", "ce")
    header, keys, rows = table_of(dirty / "dirty_mnist_2nd_answer.csv")
    for run, root, names in ((folds / "fold0", dirty, header[1:]),
                             (tmp_path / "runs/cls/exp", Path("photos"), ["blue", "green", "red"])):
        files, probs = eval_model(run, "last.pt", root)
        with open(run / "samples.csv", newline="") as file:
            samples = list(csv.DictReader(file))
        assert [row["name"] for row in samples] == list(map(str, files))
        for row, file, p in zip(samples, files, probs):
            if root is dirty:
                y = rows[keys.index(str(int(file.stem)))]
                score = np.mean([np.log(p[k] if y[k] else 1 - p[k]) for k in range(4)])
                said = [name for name, value in zip(names, p) if value > 0.5]
                true = [name for name, value in zip(names, y) if value]
            else:
                true, said = [file.parent.name], [names[p.argmax()]]
                score = np.log(p[names.index(true[0])])
            assert float(row["score"]) == pytest.approx(score, abs=1e-4)
            assert (row["labels"], row["predicted"]) == (" ".join(true), " ".join(said))


def test_noise_and_the_table_of_two_folds(script, folds, capsys):
    script(report, "noise", folds / "fold0", folds / "fold1")
    with open("noise.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held = [row | {"run": str(folds / f"fold{k}")} for k in (0, 1)
            for row in csv.DictReader(open(folds / f"fold{k}/samples.csv", newline=""))]
    held.sort(key=lambda row: (float(row["score"]), row["name"]))
    assert [(row["name"], row["score"], row["run"]) for row in rows] == [
        (row["name"], row["score"], row["run"]) for row in held]
    assert len({row["name"] for row in rows}) == len(rows) == 8
    assert f"noise.csv: {len(rows)} samples" in capsys.readouterr().out
    flags = {Path(row["run"]).name: row["flags"] for row in table.rows([folds])}
    script(report, folds)
    assert flags["fold1"] in capsys.readouterr().out
    assert "--fold 1" in flags["fold1"] and "--fold 1" not in flags["fold0"]
    assert all("--lr 0.01" in text and "--momentum" not in text for text in flags.values())
