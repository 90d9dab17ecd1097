"""train_cls.py and predict.py --task cls from files to files: chains, records, flags, ensembles, several processes."""
import csv
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_cls
from data.samples import letters
import nets
from tests.conftest import TINY_CLS, write_dirty
from tests.harness import differences, read
from tests.test_bad_input_cls import FLAGS as CPU
from tests.test_bad_input_cls import weights
from tests.test_scripts_det import ranks
from utils.pictures import cells
from utils.train import checkpoint
from utils.errors import Stopped, UserError

FLAGS = [*CPU, "--amp", "off"]
COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


def last(name="exp"):
    return checkpoint.load(f"runs/cls/{name}/last.pt")


def table_of(path):
    """A CSV of ours -> header, keys, values (N, classes)."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return header, [row[0] for row in rows], np.array([[float(v) for v in row[1:]] for row in rows])


def results(out):
    """-> keys, probabilities, decisions; both tables have the same header and keys."""
    header, keys, probs = table_of(Path(out, "probabilities.csv"))
    assert table_of(Path(out, "submission.csv"))[:2] == (header, keys) and header[0] == "index"
    return keys, probs, table_of(Path(out, "submission.csv"))[2]


def squares(root, *, train=48, test=12, size=32):
    """A folder per colour with pictures of a square of that colour on dark noise; test/ has them without a name."""
    rng = np.random.default_rng(0)
    for i in range(train + test):
        name = list(COLOURS)[i % 3]
        picture = rng.integers(0, 80, (size, size, 3)).astype(np.uint8)
        x, y = rng.integers(0, size // 2, 2)
        picture[y:y + size // 2, x:x + size // 2] = COLOURS[name]
        path = Path(root, f"train/{name}/{i}.png" if i < train else f"test/{name}_{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return Path(root)


# ---- from files to the submission ------------------------------------------------------------------------------------
def test_the_competition_from_letters_to_a_weighted_ensemble(script, tmp_path, capsys):
    letters.letters(tmp_path, train=8, test=5)
    flags = [*TINY_CLS, "--imgsz", 48, "--folds", 2]  # --data: the folder's name is the default
    for fold in (0, 1):
        script(train_cls, *flags, "--fold", fold, "--name", f"fold{fold}", "--lr", 0.01)
    runs = [Path(f"runs/cls/fold{fold}") for fold in (0, 1)]
    assert [json.loads((run / "folds.json").read_text()) for run in runs][0] == json.loads(
        (runs[1] / "folds.json").read_text())
    assert not last("fold0")["single_label"] and last("fold0")["history"][-1]["acc"] > 0
    for run in runs:
        script(predict, *FLAGS, "--weights", run / "last.pt", "--tta")
    pair = [run / "last.pt" for run in runs]
    script(predict, *FLAGS, "--weights", *pair, "--tta", "--ensemble-weights", 1.5, 1, "--out", "both",
           "--threshold", 0.5)
    (keys, one, _), (_, two, _), (_, both, decided) = map(results, (runs[0] / "predict", runs[1] / "predict", "both"))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(both, (1.5 * one + two) / 2.5, atol=1.5e-6)
    assert keys == ["50000", "50001", "50002", "50003", "50004"] and both.shape == (5, 26)
    wanted = Path("resources/sample_submission.csv").read_text().splitlines()
    lines = Path("both/submission.csv").read_text().splitlines()
    assert lines[0] == wanted[0] and [x.split(",")[0] for x in lines] == [x.split(",")[0] for x in wanted]
    sure = np.abs(both - 0.5) > 1e-6
    assert ((decided == 1) == (both > 0.5))[sure].all() and set(",".join(lines[1:]).split(",")[1:26]) <= {"0", "1"}
    assert "5 images: both" in capsys.readouterr().out
    script(predict, *FLAGS, "--weights", pair[0], "--out", "plain")
    assert np.abs(results("plain")[1] - one).max() > 1e-4  # the turns were looked at


def test_a_run_learns_colours_and_leaves_its_records(script, tmp_path, monkeypatch):
    drawn, draw = {}, cells.as_picture
    monkeypatch.setattr(cells, "as_picture", lambda title, rows: drawn.update({title: rows}) or draw(title, rows))
    squares("photos", train=72)
    script(train_cls, "--data", "photos", *TINY_CLS, "--bs", 12, "--epochs", 8, "--lr", "3e-3", "--no-ema", "--loss",
           "ce", "--folds", 4, "--save-period", 4, "--cutout", 0)
    run = Path("runs/cls/exp")
    assert {path.name for path in run.iterdir()} >= {
        "last.pt", "best.pt", "epoch_4.pt", "epoch_8.pt", "results.csv", "results.png", "results.json", "folds.json",
        "args.json", "train_batch.png", "samples.csv", "review.png", "run.json"}
    rows = list(csv.DictReader(open(run / "results.csv")))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    found = json.loads((run / "results.json").read_text())
    assert found["last"]["acc"] > 0.9 and found["last"]["acc"] == pytest.approx(float(rows[-1]["acc"]), abs=1e-6)
    assert drawn == {"Classes": [{"class": name} | c for name, c in found["classes"].items()]}
    folds = json.loads((run / "folds.json").read_text())
    held_out = [name for name, fold in folds.items() if fold == 0]
    assert Counter(Path(name).parent.name for name in held_out) == {"blue": 6, "green": 6, "red": 6}
    assert {name: c["images"] for name, c in found["classes"].items()} == {"blue": 6, "green": 6, "red": 6}
    assert not any(os.path.isabs(name) for name in folds)
    script(predict, *FLAGS, "--tta", "--out", "out")
    keys, probs, decided = results("out")
    names = table_of("out/submission.csv")[0][1:]
    assert (decided.sum(1) == 1).all() and (decided.argmax(1) == probs.argmax(1)).all() and len(keys) == 12
    assert np.mean([names[k] == key.split("_")[0] for k, key in zip(decided.argmax(1), keys)]) > 0.9
    np.testing.assert_allclose(probs.sum(1), 1, atol=3e-6)


def test_the_checkpoint_says_what_prediction_needs(script, dirty, capsys):
    script(train_cls, "--data", dirty, *TINY_CLS)
    state = torch.load("runs/cls/exp/last.pt", weights_only=True)
    assert (state["task"], state["classes"], state["single_label"]) == ("cls", ["a", "b", "c", "d"], False)
    assert state["input"].pop("seen")["dtype"] == "uint8"
    assert state["input"] == {"bands": [1], "pixel_scale": 255.0, "pixel_mean": [], "imgsz": 32, "mean": [0.5],
                              "std": [0.5]}
    assert state["arch"] == {"name": "regnetx_002", "kwargs": {"in_chans": 1, "num_classes": 4}}
    assert state["score"] == "acc" and len(state["threshold"]) == 4
    nets.build(state["arch"]).load_state_dict(state["model"])
    assert set(state["history"][-1]) >= {"acc", "exact", "map", "loss"}
    out = capsys.readouterr().out
    assert "9 images to train, 3 to validate; 4 classes; " in out or "10 images to train, 2 to validate" in out


# ---- flags of training -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, parts", [
    (["--loss", "bce", "focal=2", "--label-smoothing", 0.1, "--amp", "bf16", "--workers", 1],
     {"bce": 1, "focal": 2}),
    (["--loss", "focal", "--net", "repvgg_a0", "--grad-checkpoint"], {}),
    (["--folds", 0, "--no-rot90", "--hflip", 0.5, "--cutout", 0, "--p-affine", 1, "--cache", "ram"], {})])
def test_flags(script, dirty, flags, parts):
    script(train_cls, "--data", dirty, *TINY_CLS, *flags)
    row = last()["history"][-1]
    assert np.isfinite(row["loss"]) and ("acc" in row) == (0 not in flags[1:2]) and last()["step"] == (
        3 if flags[1] == 0 else -(-(12 - sum(v == 0 for v in json.loads(
            Path("runs/cls/exp/folds.json").read_text()).values())) // 4))
    assert {k for k in row if k.endswith("_loss")} == {f"{k}_loss" for k in parts}
    if parts:
        assert row["loss"] == pytest.approx(sum(row[f"{k}_loss"] for k in parts), rel=1e-4)  # weighted


def test_losses_are_what_they_are_called():
    torch.manual_seed(0)
    z, y = torch.randn(6, 4), torch.eye(4)[[0, 1, 2, 3, 3, 1]]
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    want = {"bce": bce.mean(), "focal": (bce * (y - z.sigmoid()) ** 2).mean(),
            "ce": torch.nn.functional.cross_entropy(z, y.argmax(1))}
    for name, value in want.items():
        torch.testing.assert_close(train_cls.LOSSES[name](z, y, 0.0), value)
    torch.testing.assert_close(train_cls.LOSSES["ce"](z, y, 0.2), torch.nn.functional.cross_entropy(
        z, y.argmax(1), label_smoothing=0.2))


def test_dropout_comes_from_the_recipe_or_from_the_flags(script, dirty, monkeypatch):
    seen = []
    build = nets.build
    monkeypatch.setattr(train_cls.nets, "build", lambda arch, **options: build(arch, **options) if torch.empty(
        0).is_meta else seen.append(options) or stop())
    for flags, want in (([], (0.5, 0.2)), (["--drop", 0], (0, 0.2)), (["--drop-path", 0.3], (0.5, 0.3))):
        with pytest.raises(Stopped):
            script(train_cls, "--data", dirty, *TINY_CLS, "--net", "efficientnetv2_b0", *flags)
        assert (seen[-1]["drop_rate"], seen[-1]["drop_path_rate"]) == want
    with pytest.raises(Stopped):
        script(train_cls, "--data", dirty, *TINY_CLS)
    assert not {"drop_rate", "drop_path_rate"} & set(seen[-1])


def stop():
    raise Stopped(0)


def test_validation_twice_a_pass(script, dirty, monkeypatch):
    seen, see = [], train_cls.cls.Input.__call__

    def watch(self, batch, *args):
        if torch.is_grad_enabled():
            seen.append(batch["index"].tolist())
        return see(self, batch, *args)

    monkeypatch.setattr(train_cls.cls.Input, "__call__", watch)
    script(train_cls, "--data", dirty, *TINY_CLS, "--bs", 2, "--epochs", 2, "--val-interval", 0.5, "--folds", 3)
    state = last()
    assert len(state["history"]) == 4 and state["steps_per_epoch"] == 2 and state["step"] == 8
    assert all(0 <= row["acc"] <= 1 for row in state["history"])
    steps = seen[-8:]  # before them train_batch.png is made
    for half in (0, 4):
        assert sorted(sum(steps[half:half + 4], [])) == list(range(8))
    rates = [row["lr"] for row in state["history"]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 10 * rates[-1]  # one cosine over both passes


def test_a_subset_is_trained_on_and_what_it_changes_is_told(script, tmp_path, monkeypatch, capsys):
    root = write_dirty(tmp_path / "data", train=60, test=1, side=16)
    sources, Images = [], train_cls.cls.Images
    monkeypatch.setattr(train_cls.cls, "Images", lambda files, labels, **options: sources.append((files, labels))
                        or Images(files, labels, **options))
    script(train_cls, "--data", root, *TINY_CLS, "--subset", 12, "--folds", 5)
    out = capsys.readouterr().out
    (files, labels), (held_out, _) = sources
    folds = json.loads(Path("runs/cls/exp/folds.json").read_text())
    train = [name for name, fold in folds.items() if fold != 0]
    assert {Path(f).name for f in files} <= {Path(f).name for f in train}
    assert {Path(f).name for f in held_out} == {Path(f).name for f, fold in folds.items() if fold == 0}
    rows = dict(zip(*table_of(root / "dirty_mnist_2nd_answer.csv")[1:]))
    whole = np.mean([rows[str(int(Path(name).stem))] for name in train], 0)
    part = np.mean([rows[str(int(Path(name).stem))] for name in files], 0)
    assert np.allclose(np.mean(labels, 0), part) and 10 <= len(files) <= 14
    change = dict(zip("abcdefghijklmnopqrstuvwxyz", part - whole))
    assert f"subset of {len(files)}: the classes' shares change by at most {np.abs(part - whole).max():.4f}: " in out
    assert all(f" {name} {value:+.4f}" in out for name, value in change.items()) and len(change) == len(whole)
    assert f"{len(files)} images to train, {len(held_out)} to validate" in out


def test_synthesized_images(script, tmp_path, capsys):
    letters.letters(tmp_path, train=4, test=0)
    script(train_cls, *TINY_CLS, "--bs", 2, "--synthesize", "resources/mnist_data/train.csv", "--synthesize-count", 5,
           "--folds", 2, "--val-interval", 0.34)
    state = last()
    assert "5 images to train, 2 to validate; 26 classes" in capsys.readouterr().out
    assert len(state["history"]) == 3 and state["step"] == 3 and np.isfinite(state["history"][-1]["loss"])


def test_weights_of_a_net_with_other_classes(script, dirty, tmp_path, capsys):
    script(train_cls, "--data", dirty, *TINY_CLS)
    root = write_dirty(tmp_path / "more", train=8, test=1, classes=7)
    script(train_cls, "--data", root, *TINY_CLS, "--weights", "runs/cls/exp/last.pt", "--lr", 0, "--weight-decay", 0,
           "--name", "more")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights: "))
    assert "not used: 2 (" in line and "left as initialised: 2 (" in line
    old, new = last()["ema"], last("more")["model"]
    same = [name for name, t in old.items() if t.shape == new[name].shape and "running" not in name and t.ndim]
    assert len(same) == sum(t.ndim > 0 and "running" not in name for name, t in old.items()) - 2
    assert all(torch.equal(old[name], new[name]) for name in same)


def test_a_split_fits_the_data_wherever_it_lies(script, dirty, tmp_path):
    script(train_cls, "--data", dirty, *TINY_CLS)
    (tmp_path / "moved").symlink_to(dirty)
    script(train_cls, "--data", "moved", *TINY_CLS, "--folds", "runs/cls/exp/folds.json", "--name", "two")
    assert [Path(f"runs/cls/{name}/folds.json").read_text() for name in ("exp", "two")].count(
        Path("runs/cls/exp/folds.json").read_text()) == 2


# ---- stopped, and several processes ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_stopped_amid_an_epoch_and_resumed_to_the_same_bits(script, dirty, monkeypatch):
    flags = ["--data", dirty, *TINY_CLS, "--net", "efficientnetv2_b0", "--bs", 2, "--epochs", 2, "--accumulate", 4,
             "--drop", 0.3, "--drop-path", 0.4, "--folds", 0, "--no-ema"]
    script(train_cls, *flags, "--name", "straight")
    loss, count = train_cls.LOSSES["bce"], iter(range(100))

    def stopping(*args, **options):
        if next(count) in (1, 7):  # amid the first accumulations of both epochs
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **options)

    monkeypatch.setitem(train_cls.LOSSES, "bce", stopping)
    with pytest.raises(Stopped):
        script(train_cls, *flags, "--name", "broken")
    assert last("broken")["step"] == 1
    with pytest.raises(Stopped):
        script(train_cls, "--resume", "runs/cls/broken")
    assert last("broken")["step"] == 3 and len(last("broken")["history"]) == 1
    script(train_cls, "--resume", "runs/cls/broken")
    straight, broken = (read(f"runs/cls/{name}/last.pt") for name in ("straight", "broken"))
    for state in (straight, broken):
        state["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]]
    assert straight["step"] == 4 and differences(straight, broken) == []


def test_two_processes_train_what_one_does(script, tmp_path, dirty):
    flags = ["--data", dirty, *TINY_CLS, "--sync-bn", "--no-ema", "--folds", 3, "--bs", 8, "--epochs", 2, "--optimizer",
             "sgd", "--lr", 0.01]
    script(train_cls, *flags, "--name", "one")
    out = ranks(train_cls, *flags, "--name", "two", cwd=tmp_path)
    assert "run: runs/cls/two" in out[0] and not out[1]
    one, two = last("one"), last("two")
    assert one["step"] == two["step"] == 2
    for a, b in zip(one["history"], two["history"]):
        assert [b[k] for k in ("loss", "acc", "map")] == pytest.approx([a[k] for k in ("loss", "acc", "map")], rel=1e-3)
    assert [[c["images"] for c in json.loads(Path(f"runs/cls/{name}/results.json").read_text())["classes"].values()]
            for name in ("one", "two")].count([sum(c) for c in zip(*held_out_labels(dirty, "one"))]) == 2
    torch.manual_seed(0)  # as the run's --seed
    start = nets.make("regnetx_002", 1, 4)
    states = start.state_dict(), one["model"], two["model"]
    tensors = [[net[name] for name, _ in start.named_parameters()] for net in states]
    before, one, two = (torch.cat([t.flatten().double() for t in parts]) for parts in tensors)
    step = (one - before).norm()
    assert (one - two).norm() < 2e-3 * step and step > 0.01  # rounding, and a true step


def held_out_labels(root, name):
    """The rows of the images that a run validated on."""
    rows = dict(zip(*table_of(root / "dirty_mnist_2nd_answer.csv")[1:]))
    folds = json.loads(Path(f"runs/cls/{name}/folds.json").read_text())
    return [rows[str(int(Path(file).stem))].astype(int).tolist() for file, fold in folds.items() if fold == 0]


# ---- prediction ------------------------------------------------------------------------------------------------------
def direct(path, files, *, tta=False, bands=(1,), scale=255.0):
    """What a net says about pictures of its own size, computed with torch alone."""
    state = torch.load(path, weights_only=True)
    net = nets.build(state["arch"]).eval()
    net.load_state_dict(state["model"])
    x = [np.atleast_3d(np.asarray(Image.open(file)))[..., [band - 1 for band in bands]] for file in files]
    x = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / scale - 0.5) / 0.5
    with torch.no_grad():
        said = [net(torch.rot90(x, k, (2, 3))) for k in range(4 if tta else 1)]
    return torch.stack([z.softmax(1) if state["single_label"] else z.sigmoid() for z in said]).mean(0).double().numpy()


@pytest.fixture
def pictures(tmp_path):
    """Five pictures of 64 x 64 and three bands, whose names are not in the order of their numbers."""
    rng, files = np.random.default_rng(0), []
    for name in ("9", "010", "b c", "0100", "a"):
        files.append(tmp_path / f"in/{name}.png")
        files[-1].parent.mkdir(exist_ok=True)
        picture = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(picture).save(files[-1])
    return sorted(files)


@pytest.mark.parametrize("single_label", [False, True])
def test_probabilities_are_the_nets_own(script, pictures, single_label):
    net = weights(in_chans=2, bands=(3, 1), imgsz=64, single_label=single_label)
    for tta in (False, True):
        script(predict, *FLAGS, "--weights", net, "--source", "in", "--out", f"out{tta}", "--bs", 2,
               *(["--tta"] if tta else []))
        keys, probs, decided = results(f"out{tta}")
        assert keys == [p.stem for p in pictures] and "010" in keys  # which is 10 in the competition only
        np.testing.assert_allclose(probs, direct(net, pictures, tta=tta, bands=(3, 1)), atol=2e-5)
    assert np.abs(results("outTrue")[1] - results("outFalse")[1]).max() > 1e-4


def test_sizes_and_bands_of_an_ensemble(script, pictures):
    nets = [weights("1.pt", imgsz=64, in_chans=3, bands=(1, 2, 3)), weights("2.pt", imgsz=32, seed=1),
            weights("3.pt", imgsz=64, bands=(2,), seed=2, scale=100.0)]
    for i, net in enumerate(nets):
        script(predict, *FLAGS, "--weights", net, "--source", "in", "--out", f"out{i}")
    script(predict, *FLAGS, "--weights", *nets, "--source", "in", "--out", "all")
    found = [results(f"out{i}")[1] for i in range(3)]
    np.testing.assert_allclose(found[2], direct(nets[2], pictures, bands=(2,), scale=100.0), atol=2e-5)
    np.testing.assert_allclose(results("all")[1], np.mean(found, 0), atol=2e-6)
    script(predict, *FLAGS, "--weights", *nets[1:], "--source", "in", "--out", "64", "--imgsz", 64)
    other = direct(nets[1], pictures)
    assert np.abs(other - found[1]).max() > 1e-4
    np.testing.assert_allclose(results("64")[1], (other + found[2]) / 2, atol=2e-5)
    script(predict, *FLAGS, "--weights", *nets, "--source", "in", "--out", "weighted", "--ensemble-weights", 2, 5, 1)
    np.testing.assert_allclose(results("weighted")[1], (2 * found[0] + 5 * found[1] + found[2]) / 8, atol=2e-6)


def test_thresholds(script, pictures):
    net = weights(imgsz=64)
    script(predict, *FLAGS, "--weights", net, "--source", "in", "--out", "half")
    probs = results("half")[1]
    threshold = np.sort(probs.flatten())[[7, 8]].mean()
    script(predict, *FLAGS, "--weights", net, "--source", "in", "--out", "out", "--threshold", threshold)
    assert (results("out")[2] == (probs > threshold)).all() and results("out")[2].sum() == 12
    assert (results("half")[2] == (probs > 0.5)).all()


def test_two_processes_predict_what_one_does(script, tmp_path, pictures):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3)).astype(np.uint8)).save("in/odd.jpg")
    flags = [*FLAGS, "--weights", weights(), "--source", "in", "--tta", "--bs", 2]
    script(predict, *flags, "--out", "one")
    out = ranks(predict, *flags, "--out", "two", cwd=tmp_path)
    (keys, one, _), (same, two, _) = results("one"), results("two")
    assert keys == same and len(keys) == 6 and np.abs(one - two).max() < 2e-6
    assert out[0].count("6 images: two") == 1 and not out[1]


def test_show_augment_draws_and_does_not_train(script, tmp_path):
    script(train_cls, "--data", write_dirty(tmp_path / "resources"), *TINY_CLS, "--show-augment", "--cutmix", 1)
    run = Path("runs/cls/exp")
    assert Image.open(run / "augment.png").size[0] > 6 * 32 and not (run / "last.pt").exists()


@pytest.mark.parametrize("single_label, shares", [(False, [0.5, 0.1, 0.0]), (True, [0.6, 0.399, 0.001])])
def test_the_first_guess_is_the_classes_frequency(single_label, shares):
    linear = torch.nn.Linear(64, 3)
    train_cls.init_classifier(linear, np.array([shares]), single_label)
    logits = linear(torch.randn(500, 64))
    probs = (logits.softmax(1) if single_label else logits.sigmoid()).mean(0)
    assert (probs - torch.tensor(shares).clamp(min=0.001)).abs().max() < 0.01


@pytest.mark.parametrize("interval, parts", [(0.4, 2), (0.7, 1)])
def test_an_interval_that_divides_no_pass_leaves_their_number(script, dirty, interval, parts):
    script(train_cls, "--data", dirty, *TINY_CLS, "--bs", 2, "--epochs", 2, "--val-interval", interval, "--folds", 3)
    assert len(last()["history"]) == 2 * parts and last()["step"] == 8


@pytest.mark.slow
def test_periods_are_passes_whatever_the_validations_interval(script, dirty):
    rates = {}
    for interval in (1.0, 0.5):
        script(train_cls, "--data", dirty, *TINY_CLS, "--bs", 2, "--epochs", 4, "--schedule", "step", "--period", 2,
               "--val-interval", interval, "--folds", 3, "--name", f"every{interval}")
        rates[interval] = [row["lr"] for row in last(f"every{interval}")["history"]]
    assert rates[0.5][1::2] == rates[1.0] and rates[1.0][0] == rates[1.0][1] > rates[1.0][2]


def test_a_classifier_of_other_classes_begins_anew(script, tmp_path, dirty, capsys):
    flags = [*TINY_CLS, "--folds", 3, "--lr", 0]
    script(train_cls, "--data", dirty, *flags, "--name", "first")
    nets = {}
    for name, classes in (("same", "abcd"), ("other", "wxyz")):
        root = write_dirty(tmp_path / name)
        table = root / "dirty_mnist_2nd_answer.csv"
        table.write_text(table.read_text().replace("index,a,b,c,d", "index," + ",".join(classes)))
        script(train_cls, "--data", root, *flags, "--name", name, "--weights", "runs/cls/first/last.pt")
        nets[name] = last(name)["model"]
        assert ("starts anew" in capsys.readouterr().out) == (name == "other")
    first = last("first")["model"]
    head = [name for name in first if name.startswith("head.") and name.endswith("weight")]
    assert head and all(torch.equal(nets["same"][name], first[name]) for name in head)
    assert not any(torch.equal(nets["other"][name], first[name]) for name in head)
    assert torch.equal(nets["other"]["s4.b1.conv1.conv.weight"], first["s4.b1.conv1.conv.weight"])


def test_names_that_are_no_text(script, tmp_path, dirty, capsys):
    script(train_cls, "--data", dirty, *TINY_CLS, "--bands", "1-3", "--folds", 3)
    Path("in").mkdir()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(os.path.join(b"in", b"x\xe9.jpg"), format="JPEG")
    script(predict, *FLAGS, "--source", "in", "--out", "out")
    assert [line.split(",")[0] for line in Path("out/submission.csv").read_text().splitlines()] == ["index", "x\\udce9"]
    assert len(Path("out/probabilities.csv").read_text().splitlines()) == 2


def test_synthesis_is_told_the_device(script, tmp_path, monkeypatch):
    root, seen = letters.letters(tmp_path, train=6, test=1), []
    monkeypatch.setattr(train_cls.dirty_mnist, "Synthetic", lambda *args, **options: seen.append(options) or stop())
    with pytest.raises(Stopped):
        script(train_cls, "--data", root, *TINY_CLS, "--synthesize", "letters.csv", "--bands", 1)
    assert seen[0]["device"] == "cpu"


def test_a_threshold_that_would_do_nothing(refused, script, pictures, tmp_path):
    flags = [*FLAGS, "--source", "in", "--threshold", 0.3]
    refused(predict, *flags, "--weights", weights("two.pt", single_label=True), says="--threshold: does nothing")


def test_the_default_loss_fits_the_data(script, tmp_path, dirty, monkeypatch):
    """What validation and prediction read as a softmax is trained as one."""
    for data, idle in ((squares(tmp_path / "squares", train=12, test=0), "bce"), (dirty, "ce")):
        with monkeypatch.context() as patch:
            patch.setitem(train_cls.LOSSES, idle, None)
            script(train_cls, "--data", data, *TINY_CLS, "--folds", 3)


def test_the_datas_own_validation_images(script, tmp_path, capsys):
    for part, count in (("train", 4), ("val", 3)):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (32, 32), (200 * k, 10 * i, len(part)))
                image.save(tmp_path / f"photos/{part}/{name}/{i}.png")
    script(train_cls, "--data", "photos", *TINY_CLS)
    assert "8 images to train, 6 to validate; 2 classes" in capsys.readouterr().out
    split = json.loads(Path("runs/cls/exp/folds.json").read_text())
    assert {name for name, fold in split.items() if fold == 0} == {
        f"val/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)}
    with pytest.raises(UserError, match="--fold: the data has validation images of its own"):
        script(train_cls, "--data", "photos", *TINY_CLS, "--fold", 1)
