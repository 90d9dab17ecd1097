"""utils/metrics/ensemble.py against brute force; --fit-weights and --ensemble of predict.py from files to files."""
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data import cls, folds
from tests.conftest import write_dirty
from tests.test_bad_input_cls import FLAGS as CPU
from tests.test_bad_input_cls import weights as net_at
from tests.test_scripts_cls import results, table_of
from tests.test_scripts_det import ranks
from utils.metrics import ensemble
from utils.train import checkpoint
from utils.errors import UserError

FLAGS = [*CPU, "--amp", "off"]


def members(seed, count=3, images=60, classes=4, *, single_label=False, digits=None):
    """-> probs (M, N, C) of members of different skill, labels (N, C)."""
    rng = np.random.default_rng(seed)
    labels = np.eye(classes)[rng.integers(0, classes, images)] if single_label else \
        rng.integers(0, 2, (images, classes)).astype(float)
    skill = rng.uniform(0, 2, (count, 1, 1))
    z = skill * (2 * labels - 1) + rng.normal(0, 1.5, (count, images, classes)) + rng.normal(0, 1, (count, 1, classes))
    probs = np.exp(z) / np.exp(z).sum(2, keepdims=True) if single_label else 1 / (1 + np.exp(-z))
    return probs if digits is None else probs.round(digits), labels


def right(probs, labels, weights, single_label=False):
    """Hits, counted in plain Python from fractions of sums."""
    count = 0
    for n in range(labels.shape[0]):
        said = [sum(w * float(p) for w, p in zip(weights, probs[:, n, c])) / sum(weights)
                for c in range(labels.shape[1])]
        if single_label:
            count += said.index(max(said)) == labels[n].tolist().index(1)
        else:
            count += sum((p > 0.5) == (y == 1) for p, y in zip(said, labels[n]))
    return count


# ---- weights ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("single_label", [False, True])
def test_hits_and_average(single_label):
    probs, labels = members(0, single_label=single_label)
    for weights in ((1, 1, 1), (0, 0.5, 3), (2, 0, 0)):
        mean = ensemble.average(probs, weights)
        np.testing.assert_allclose(mean, sum(w * p for w, p in zip(weights, probs)) / sum(weights), rtol=1e-12)
        assert ensemble.hits(mean, labels, single_label) == right(probs, labels, weights, single_label)
    assert ensemble.hits(np.array([[0.5, 0.6], [0.2, 0.3]]), np.array([[0, 0], [0, 1]])) == 2
    assert ensemble.hits(np.array([[0.5, 0.6], [0.2, 0.3]]), np.array([[1, 0], [0, 1]]),
                         thresholds=np.array([0.4, 0.25])) == 3


@pytest.mark.parametrize("seed", range(6))
def test_weights_that_no_single_change_improves(seed):
    single_label = seed % 2 == 1
    probs, labels = members(seed, single_label=single_label)
    found = ensemble.fit_weights(probs, labels, single_label)
    assert found.shape == (3,) and set(found) <= set(ensemble.FACTORS)
    score = right(probs, labels, found, single_label)
    assert score >= right(probs, labels, (1, 1, 1), single_label)
    for m, factor in itertools.product(range(3), ensemble.FACTORS):
        other = [factor if i == m else w for i, w in enumerate(found)]
        if sum(other):
            assert right(probs, labels, other, single_label) <= score
    assert (ensemble.fit_weights(probs, labels, single_label) == found).all()


@pytest.mark.parametrize("seed", [10, 12, 43])
def test_of_equally_good_neighbours_the_weights_are_the_most_equal(seed):
    probs, labels = members(seed, count=4, images=30)
    found = ensemble.fit_weights(probs, labels, False)
    for m, factor in itertools.product(range(4), ensemble.FACTORS):
        other = np.where(np.arange(4) == m, factor, found)
        if right(probs, labels, other) == right(probs, labels, found):
            assert np.var(other / other.sum()) >= np.var(found / found.sum()) - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_two_members_get_the_best_pair_there_is(seed):
    probs, labels = members(seed + 10, count=2, images=200)
    found = ensemble.fit_weights(probs, labels, False)
    grid = [pair for pair in itertools.product(ensemble.FACTORS, repeat=2) if 1.0 in pair]
    assert right(probs, labels, found) >= max(right(probs, labels, pair) for pair in grid)


def test_weights_that_are_known():
    labels = np.random.default_rng(0).integers(0, 2, (50, 3)).astype(float)
    knows, wrong, half = 0.2 + 0.6 * labels, 0.9 - 0.8 * labels, np.full_like(labels, 0.5)
    assert ensemble.fit_weights([wrong, knows], labels, False).tolist() == [1, 1.5]  # -0.4 + 1.5 * 0.3 > 0
    assert ensemble.fit_weights([knows, 1 - labels], labels, False).tolist() == [2, 1]  # 2 * 0.3 - 0.5 > 0
    assert ensemble.fit_weights([0.45 + 0.1 * labels, 1 - labels], labels, False)[1] == 0
    # equal weights where nothing is to be gained, whatever else would do as well
    assert ensemble.fit_weights([knows, half, knows], labels, False).tolist() == [1, 1, 1]
    assert ensemble.fit_weights([knows] * 4, labels, False).tolist() == [1] * 4
    assert ensemble.fit_weights([wrong], labels, False).tolist() == [1]
    tensors = torch.tensor(np.stack([wrong, knows])), torch.tensor(labels)
    assert ensemble.fit_weights(*tensors, False).tolist() == [1, 1.5]


def test_the_order_of_members_is_their_names_only():
    probs, labels = members(4, count=3, images=300)
    found = ensemble.fit_weights(probs, labels, False)
    turned = ensemble.fit_weights(probs[::-1], labels, False)[::-1]
    assert len(set(found)) > 1 and found.tolist() == turned.tolist()


@pytest.mark.parametrize("shape", [(2, 5), (0, 5, 3), (2, 5, 4), (2, 4, 3)])
def test_weights_of_other_shapes(shape):
    with pytest.raises(ValueError, match="members"):
        ensemble.fit_weights(np.zeros(shape), np.zeros((5, 3)), False)


# ---- thresholds ------------------------------------------------------------------------------------------------------
def best_by_trial(scores, labels):
    """-> most hits of any threshold 0..1 (all scores, their neighbours and both ends are tried)."""
    tried = {0.0, 1.0, 0.5, *scores, *(float(np.nextafter(s, 0)) for s in scores if s > 0)}
    return max(sum((s > t) == (y == 1) for s, y in zip(scores, labels)) for t in tried)


@pytest.mark.parametrize("seed, digits", [(0, None), (1, 1), (2, 2), (3, 0), (4, 1)])
def test_thresholds_are_the_best_of_all(seed, digits):
    (probs, *_), labels = members(seed, images=40, classes=6, digits=digits)
    found = ensemble.fit_thresholds(probs, labels)
    assert found.shape == (6,) and ((0 <= found) & (found <= 1)).all()
    for c, t in enumerate(found):
        most = best_by_trial(probs[:, c].tolist(), labels[:, c].tolist())
        assert ((probs[:, c] > t) == (labels[:, c] == 1)).sum() == most
        if ((probs[:, c] > 0.5) == (labels[:, c] == 1)).sum() == most:
            assert t == 0.5
    assert ensemble.hits(probs, labels, False, found) >= ensemble.hits(probs, labels)


@pytest.mark.parametrize("scores, labels, threshold", [
    ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.25),
    ([0.4, 0.3, 0.2, 0.1], [1, 1, 0, 0], 0.25),
    ([0.6, 0.7, 0.8, 0.9], [0, 0, 0, 1], 0.85),
    ([0.6, 0.7, 0.8, 0.9], [0, 0, 0, 0], 0.95),  # none: between the highest and 1
    ([0.2, 0.3, 0.4, 0.3], [1, 1, 1, 1], 0.1),   # all: between 0 and the lowest
    ([0.3, 0.4, 0.6, 0.9], [0, 0, 1, 1], 0.5),   # the default, though not in the middle of (0.4, 0.6) alone
    ([0.1, 0.2, 0.7, 0.8], [0, 1, 1, 1], 0.15),
    ([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], 0.35),  # 0.15 and 0.35 are as good: nearest to 0.5
    ([0.6, 0.7, 0.8, 0.9], [0, 1, 0, 1], 0.65),
    ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], 0.5),   # all, none and two others are as good as the default
    ([0.3, 0.3, 0.3, 0.4], [1, 0, 0, 1], 0.35),  # equal scores go together
    ([1.0, 1.0, 0.6], [1, 1, 0], 0.8),
    ([1.0, 1.0, 1.0, 0.9], [0, 0, 0, 0], 1.0),
    ([0.0, 0.0, 0.1, 0.2], [1, 1, 0, 0], 0.5)])
def test_thresholds_that_are_known(scores, labels, threshold):
    found = ensemble.fit_thresholds(np.array(scores)[:, None], np.array(labels)[:, None])
    assert found == pytest.approx([threshold], abs=1e-12)


def test_neighbouring_numbers_are_kept_apart():
    for low in (0.3, 0.7, 1 - 2**-53):
        scores = np.array([low, np.nextafter(low, 2)])[:, None]
        for labels in ([[0], [1]], [[1], [1]], [[0], [0]]):
            found = ensemble.fit_thresholds(scores, np.array(labels))
            assert ensemble.hits(scores, np.array(labels), False, found) == 2 or labels == [[1], [1]] and low < 0.5


def test_thresholds_of_no_images_and_of_other_shapes():
    assert ensemble.fit_thresholds(np.zeros((0, 3)), np.zeros((0, 3))).tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="images, classes"):
        ensemble.fit_thresholds(np.zeros((4, 3)), np.zeros((4, 2)))


# ---- the file --------------------------------------------------------------------------------------------------------
def test_a_file_gives_back_what_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thresholds = np.array([1 / 3, 0.1 + 0.2, 0.5])
    ensemble.write("e.json", ["a/best.pt", Path("b/best.pt")], np.array([0.0, 1.5]), "xyz", thresholds)
    assert json.loads(Path("e.json").read_text()) == {
        "weights": {"a/best.pt": 0.0, "b/best.pt": 1.5}, "thresholds": {"x": 1 / 3, "y": 0.1 + 0.2, "z": 0.5},
        "flags": ""}
    # in the order that is asked for
    shares, found = ensemble.read("e.json", [tmp_path / "b/best.pt", "./a/../a/best.pt"], list("zxy"), False)
    assert shares == [1.5, 0.0] and found.tolist() == [0.5, 1 / 3, 0.1 + 0.2]
    ensemble.write("one.json", ["a", "b"], [1, 2], "xyz")
    assert ensemble.read("one.json", ["b", "a"], list("xyz"), True) == ([2, 1], 0.5)
    with pytest.raises(UserError, match="one.json: was fitted with the classes .., not ..x"):
        ensemble.read("one.json", ["b", "a"], list("xyz"), False)


GOOD = {"weights": {"a": 1.0, "b": 2.0}, "thresholds": {"x": 0.5, "y": 0.25}}
SAYS = {"not a fitted ensemble": ["", "{", "[]", "3", "null", "\xff", "[" * 100000, "{}", '{"weights": {}}', '"text"',
                                  GOOD | {"weights": [1, 2]}, GOOD | {"weights": 3}, GOOD | {"thresholds": None},
                                  GOOD | {"weights": None}] + [GOOD | {"weights": {"a": value, "b": 1}}
                                  for value in (-1, "1", None, float("nan"), float("inf"), 10**400, 1e10, [1])] + [
                                  GOOD | {"thresholds": {"x": value, "y": 0.5}} 
                                  for value in (-0.1, "0", None, float("nan"))] + [
                                  GOOD | {"weights": {"a": 0, "b": 0}}, GOOD | {"weights": {}}],
        "was fitted with the checkpoints": [GOOD | {"weights": {"a": 1}}, GOOD | {"weights": {"a": 1, "c": 1}},
                          GOOD | {"weights": {"a": 1, "b": 1, "c": 1}}],
        "was fitted with the flags": [GOOD | {"flags": flags} for flags in ("--tta", "--imgsz\n48", 7, None, ["--tta"])],
        "was fitted with the classes": [GOOD | {"thresholds": {}}, GOOD | {"thresholds": {"x": 0.5, "z": 0.5}},
                          GOOD | {"thresholds": {"x": 0.5, "y": 0.5, "z": 0.5}}]}


@pytest.mark.parametrize("says", SAYS)
def test_files_that_cannot_be_used(says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "e.json"
    path.write_text(json.dumps(GOOD))
    assert ensemble.read(path, ["a", "b"], ["x", "y"], False)[0] == [1, 2]
    for content in SAYS[says]:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
        with pytest.raises(UserError, match=f"e.json: (.*{says}.*; .*--fit-weights|not valid JSON)") as caught:
            ensemble.read(path, ["a", "b"], ["x", "y"], False)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none.json: cannot be read"):
        ensemble.read("none.json", ["a", "b"], ["x", "y"], False)
    with pytest.raises(UserError, match="not a regular file"):
        ensemble.read(tmp_path, ["a", "b"], ["x", "y"], False)


# ---- predict.py ------------------------------------------------------------------------------------------------------
def run(name, root, *, fold=0, seed=0, single_label=False, classes="abcd", sizes=(0.5, 0.5)):
    """A run's folder with the checkpoint of a net that has learned nothing, and the split that it held out."""
    Path(name).mkdir(parents=True)
    path = net_at(f"{name}/best.pt", data=root, seed=seed, single_label=single_label, classes=classes)
    state = torch.load(path, weights_only=True)
    g = torch.Generator().manual_seed(seed)  # of different opinions about the images
    for key, value in state["model"].items():
        if key.endswith("running_mean"):
            value += 0.3 * torch.randn(value.shape, generator=g)
    state["args"] |= {"labels": None, "images": None, "fold": fold}
    torch.save(state, path)
    files = sorted(p.relative_to(root).as_posix() for p in Path(root, "dirty_mnist_2nd").iterdir())
    Path(name, "folds.json").write_text(json.dumps(folds.assign(files, sizes)))
    return path


def truth(root, name, fold=0):
    """Held-out files of a run, their labels."""
    held = [file for file, k in json.loads(Path(name, "folds.json").read_text()).items() if k == fold]
    rows = dict(zip(*table_of(Path(root, "dirty_mnist_2nd_answer.csv"))[1:]))
    return [Path(root, file) for file in held], np.array([rows[str(int(Path(file).stem))] for file in held])


@pytest.fixture
def root(tmp_path):
    return write_dirty(tmp_path / "data", train=40, test=6)


def test_fitted_on_the_images_held_out_and_used_again(script, root, tmp_path, capsys):
    pair = [run(f"runs/{name}", root, seed=seed, fold=1) for seed, name in enumerate("ab")]
    flags = [*FLAGS, "--weights", *pair, "--bs", 7]
    script(predict, *flags, "--fit-weights", "--out", "fitted")
    line = next(line for line in capsys.readouterr().out.splitlines() if "held-out" in line)
    stored = json.loads(Path("fitted/ensemble.json").read_text())
    assert list(stored["weights"]) == list(map(str, pair)) and list(stored["thresholds"]) == list("abcd")
    # the same from the outside: predict the held-out images and the test images, and fit to the tables
    held, labels = truth(root, "runs/a", 1)
    assert len(held) == 20 and not set(held) & set(truth(root, "runs/a", 0)[0])
    one, two = (member(script, net, held, f"known{i}") for i, net in enumerate(pair))
    weights = np.array(list(stored["weights"].values()))
    assert weights.tolist() == ensemble.fit_weights([one, two], labels, False).tolist()
    known = ensemble.average([one, two], weights)
    thresholds = np.array(list(stored["thresholds"].values()))
    np.testing.assert_allclose(thresholds, ensemble.fit_thresholds(known, labels), atol=2e-6)
    before = ((one + two) / 2 > 0.5) == labels
    after = (known > thresholds) == labels
    assert f"accuracy {before.mean():.4f} -> {after.mean():.4f}" in line and after.mean() > before.mean()
    assert "20 held-out images" in line and "optimistic" in line and f"weights {weights[0]:g} {weights[1]:g}" in line
    keys, probs, decided = results("fitted")
    assert keys == [str(50000 + i) for i in range(6)] and (thresholds != 0.5).any()
    tests = [member(script, net, [root / "test_dirty_mnist_2nd"], f"test{i}") for i, net in enumerate(pair)]
    np.testing.assert_allclose(probs, ensemble.average(tests, weights), atol=3e-6)
    assert (decided == (probs > thresholds)).all()
    # again from the file, in another order, from another folder's point of view
    script(predict, *FLAGS, "--weights", *[p.resolve() for p in pair[::-1]], "--ensemble", "fitted/ensemble.json",
           "--out", "again")
    assert (results("again")[2] == decided).all()
    np.testing.assert_allclose(results("again")[1], probs, atol=2e-6)
    assert not Path("again/ensemble.json").exists()
    with pytest.raises(UserError, match="fitted with the flags '', not '--tta rot180 --merge gmean'"):
        script(predict, *FLAGS, "--weights", *pair, "--ensemble", "fitted/ensemble.json", "--tta", "rot180", "--merge",
               "gmean")
    # what the file says is what counts, and what has no weight is not asked
    Path("mine.json").write_text(json.dumps({"weights": {str(pair[0]): 0, str(pair[1]): 3},
                                             "thresholds": dict(zip("dcba", (0, 1, 0, 1)))}))
    capsys.readouterr()
    script(predict, *flags, "--ensemble", "mine.json", "--out", "mine")
    np.testing.assert_allclose(results("mine")[1], tests[1], atol=2e-6)
    assert results("mine")[2].tolist() == [[0, 1, 0, 1]] * 6
    bars = capsys.readouterr().err
    assert "b:" in bars and "a:" not in bars


def test_tables_alone(script, refused, tmp_path, monkeypatch):
    """The seeds' last step: probabilities that others have written, weighted, without a net or an image."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    one, two = rng.random((2, 5, 3))
    for name, probs in {"one": one, "two": two[::-1], "sure": one / one.sum(1, keepdims=True)}.items():
        order = range(5) if name != "two" else range(4, -1, -1)  # by their names, not by their places
        Path(f"{name}.csv").write_text("index,x,y,z\n" + "".join(
            f"{i}," + ",".join(f"{p:.6f}" for p in row) + "\n" for i, row in zip(order, probs)))
    flags = ["--task", "cls", "--probs", "one.csv", "two.csv"]
    script(predict, *flags, "--ensemble-weights", 1.5, 1, "--out", "out")
    keys, probs, decided = results("out")
    np.testing.assert_allclose(probs, (1.5 * one + two) / 2.5, atol=2e-6)
    assert keys == list("01234") and (decided == (probs > 0.5)).all()
    script(predict, *flags, "--threshold", 0.3, "--out", "low")
    assert (results("low")[2] == ((one + two) / 2 > 0.3)).all()
    script(predict, "--task", "cls", "--probs", "sure.csv", "--out", "sure")
    assert (results("sure")[2] == np.eye(3)[one.argmax(1)]).all()  # rows that add up to 1: one class each
    Path("four.csv").write_text("".join(Path("one.csv").read_text().splitlines(keepends=True)[:-1]))
    for pair in (["one.csv", "four.csv"], ["four.csv", "one.csv"]):
        refused(predict, "--task", "cls", "--probs", *pair, "--out", "no", says="four.csv: has no row for 4")
    Path("twice.csv").write_text("index,x,y,z\n7,0.1,0.2,0.3\n007,0.3,0.2,0.1\n")
    Path("seven.csv").write_text("index,x,y,z\n7,0.1,0.2,0.3\n")
    refused(predict, "--task", "cls", "--probs", "twice.csv", "seven.csv", "--out", "no", says="has no row for 007")
    refused(predict, "--task", "cls", "--probs", "one.csv", "--ensemble-weights", 2, "--out", "no",
            says="--ensemble-weights: is for several")
    for flag in (["--source", "in"], ["--tta"], ["--fit-weights"], ["--soup"], ["--pseudo", 0.9]):
        refused(predict, *flags, *flag, "--out", "no", says=[flag[0], "--probs without --weights"])
    refused(predict, *flags, "--ensemble-weights", 1, "--out", "no", says="1 for 0 checkpoints and 2 tables")
    assert not Path("no").exists()
    Path("full").mkdir()
    Path("full/submission.csv").mkdir()  # what cannot be written is answered
    monkeypatch.setattr(predict.runs, "new_folder", lambda *_: Path("full"))
    refused(predict, *flags, says=["full/submission.csv: cannot be written", "make room"])


def member(script, net, files, out):
    script(predict, *FLAGS, "--weights", net, "--source", *files, "--out", out)
    return results(out)[1]


def test_one_class_an_image_has_weights_only(script, root):
    table = root / "dirty_mnist_2nd_answer.csv"
    keys = table_of(table)[1]
    table.write_text("".join(f"{key},{name}\n" for key, name in [("index", "class"), *(
        (key, "abcd"[int(key) % 4]) for key in keys)]))
    pair = [run(f"runs/{name}", root, seed=seed, single_label=True) for seed, name in enumerate("ab")]
    script(predict, *FLAGS, "--weights", *pair, "--fit-weights", "--out", "fitted")
    stored = json.loads(Path("fitted/ensemble.json").read_text())
    assert stored["thresholds"] == {}
    held = [Path(root, f) for f, k in json.loads(Path("runs/a/folds.json").read_text()).items() if k == 0]
    labels = np.eye(4)[[int(file.stem) % 4 for file in held]]
    found = ensemble.fit_weights([member(script, net, held, f"known{i}") for i, net in enumerate(pair)], labels, True)
    assert list(stored["weights"].values()) == found.tolist()
    script(predict, *FLAGS, "--weights", *pair, "--ensemble", "fitted/ensemble.json", "--out", "again")
    assert (results("again")[2] == results("fitted")[2]).all() and (results("again")[2].sum(1) == 1).all()


def test_two_processes_fit_what_one_does(script, root, tmp_path):
    pair = [run(f"runs/{name}", root, seed=seed) for seed, name in enumerate("ab")]
    flags = [*FLAGS, "--weights", *pair, "--fit-weights"]
    script(predict, *flags, "--out", "one")
    out = ranks(predict, *flags, "--out", "two", cwd=tmp_path)
    one, two = (json.loads(Path(name, "ensemble.json").read_text()) for name in ("one", "two"))
    assert one["weights"] == two["weights"] and one["thresholds"] == pytest.approx(two["thresholds"], abs=1e-5)
    assert out[0].count("held-out images") == 1 and not out[1]
    assert np.abs(results("one")[1] - results("two")[1]).max() < 2e-6


def test_runs_that_cannot_be_fitted_together(script, refused, root, tmp_path, monkeypatch):  # noqa: F811
    zero, one = run("runs/a", root), run("runs/b", root, fold=1, seed=1)
    again = run("runs/c", root, seed=2)
    alone = net_at("alone.pt", data=root)

    def fails(*flags, says):
        with pytest.raises(UserError) as caught:
            script(predict, *FLAGS, *flags, "--out", "out")
        text = str(caught.value)
        assert all(word in text for word in ([says] if isinstance(says, str) else says)), text
        assert "\n" not in text and "; " in text and not Path("out").exists()

    fit = "--fit-weights"
    refused(predict, *FLAGS, "--weights", zero, one, fit, "--out", "out", says=[
        "runs/b/best.pt: its run held out other", "runs/a", "--ensemble-weights"])
    monkeypatch.setattr(checkpoint, "load", functools.cache(checkpoint.load))
    fails("--weights", alone, fit, says=["alone.pt: made by another version"])
    state = torch.load(zero, weights_only=True)
    torch.save(state, "moved.pt")
    fails("--weights", "moved.pt", fit, says=["folds.json: missing", "moved.pt", "--ensemble-weights"])
    fails("--weights", zero, "--soup", says=["--soup: is for several"])
    softmax = run("runs/softmax", root, seed=3, single_label=True)
    for pair in ((zero, softmax), (softmax, zero)):
        fails("--weights", *pair, says=["one label per image" if pair[0] == zero else "several labels per image", "predict them apart"])
        fails("--weights", *pair, "--soup", says=["is another net"])
    Path("e.json").write_text("{}")
    fails("--weights", zero, again, fit, "--ensemble", "e.json", says=["--fit-weights, --ensemble", "leave one out"])
    fails("--weights", zero, again, fit, "--ensemble-weights", 1, 2, says=["--fit-weights, --ensemble-weights"])
    fails("--weights", zero, "--ensemble", "e.json", "--ensemble-weights", 1, says=["--ensemble, --ensemble-weights"])
    Path("t.csv").write_text("index,a,b,c,d\n")
    fails("--weights", zero, fit, "--probs", "t.csv", says=["--fit-weights: is for checkpoints", "--ensemble-weights"])
    fails("--weights", zero, "--ensemble", "e.json", "--probs", "t.csv", says=["--ensemble: is for checkpoints"])
    fails("--weights", zero, "--ensemble", "e.json", says=["e.json: not a fitted ensemble"])
    split = Path("runs/c/folds.json")
    folds_of = json.loads(split.read_text())
    for text, says in (("{", "not valid JSON"), ("{}", "has no fold for"), (json.dumps(dict.fromkeys(folds_of, 0)),
                                                                         "held out other images")):
        split.write_text(text)
        fails("--weights", zero, again, fit, says=says)
    split.write_text(json.dumps(folds_of))
    torch.save(state | {"input": state["input"] | {"bands": [3]}}, "runs/a/third.pt")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("colour.png")
    fails("--weights", Path("runs/a/third.pt"), fit, "--source", "colour.png", says=["dirty_mnist_2nd/", "has 1 bands"])
    table = root / "dirty_mnist_2nd_answer.csv"
    good = table.read_text()
    table.write_text(good.replace("index,a,b", "index,a,z"))
    fails("--weights", zero, fit, says=["data: has other classes than runs/a/best.pt"])
    table.write_text(good)
    root.rename(tmp_path / "elsewhere")
    fails("--weights", zero, fit, "--source", "elsewhere/test_dirty_mnist_2nd", says="data: no such folder")


def test_the_held_out_images_are_the_runs_own(root, tmp_path, monkeypatch):
    """One data set by two names is one; the labels go with their images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(root)
    paths = [run("runs/a", root, fold=1), run("runs/b", root, fold=1)]
    states = [torch.load(path, weights_only=True) for path in paths]
    states[1]["args"]["data"] = "link"
    files, labels = cls.held_out(paths, states)
    wanted = truth(root, "runs/a", 1)
    order = np.argsort([file.stem for file in wanted[0]])
    assert sorted(files) == sorted(wanted[0])
    assert (labels[np.argsort([file.stem for file in files])] == wanted[1][order]).all()


def test_rows_add_up_as_far_as_their_digits_tell():
    rng = np.random.default_rng(0)
    one = rng.dirichlet(np.ones(20) * 0.2, 200)
    for digits in (2, 3, 4, 6, 17):
        assert ensemble.adds_up(one.round(digits)), digits
        assert not ensemble.adds_up(rng.random((200, 3)).round(digits)), digits
    assert ensemble.adds_up(one.astype(np.float32).astype(float)) and not ensemble.adds_up(one * 0.85)
