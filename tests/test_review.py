"""utils/pictures/review.py: components against OpenCV, scores by size against sets of pixels, pages pixel by pixel."""
import csv
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_cls
import train_det
import train_seg
from tests import test_bad_input_cls, test_predict_det
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_wildfire
from tests.test_predict_det import finder  # noqa: F401, a fixture
from utils import report
from utils.pictures import charts, review
from utils.train import dist
from utils.errors import Stopped, UserError
from utils.metrics import BinaryIoU
from utils.pictures.sheets import contact_sheet
from utils.pictures.review import SegmentationReview, components, ends, page, rank, read_noise

VOID = 255


# ---- components ------------------------------------------------------------------------------------------------------
def spiral(side):
    """A path one pixel wide that winds from the corner to the middle."""
    mask, position, step = np.zeros((side, side), np.uint8), np.array([0, 0]), np.array([0, 1])

    def inside(p):
        return (p >= 0).all() and (p < side).all()

    for _ in range(4 * side):
        while inside(position + step) and not (inside(position + 2 * step) and mask[tuple(position + 2 * step)]):
            mask[tuple(position)] = 1
            position = position + step
        mask[tuple(position)] = 1
        step = np.array([step[1], -step[0]])
    return mask


def masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (40, 33)):
        for density in (0, 0.1, 0.3, 0.4, 0.5, 0.9, 1):
            yield (rng.random((height, width)) < density).astype(np.uint8)
    yield spiral(61)
    yield spiral(61).T[::-1].copy()
    yield np.eye(30, dtype=np.uint8)[::-1].copy()


def oracle(labels):
    """Components of every label by OpenCV, numbered in the order of their first pixels."""
    joined, count = np.zeros(labels.shape, int), 0
    for label in np.unique(labels[labels > 0]):
        n, numbers = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=8)
        joined[numbers > 0] = numbers[numbers > 0] + count
        count += n - 1
    _, first, inverse = np.unique(joined[joined > 0], return_index=True, return_inverse=True)
    joined[joined > 0] = first.argsort().argsort()[inverse] + 1
    return joined


@pytest.mark.parametrize("mask", list(masks()), ids=lambda m: f"{m.shape}-{m.mean():.2f}")
def test_components_are_opencvs(mask):
    assert components(torch.from_numpy(mask)).tolist() == oracle(mask).tolist()


def test_components_of_several_labels_and_of_a_batch():
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 4, (5, 24, 31)).repeat(2, 2)
    labels[2] = 0
    expected, count = [], 0
    for image in labels:
        numbers = oracle(image)
        expected.append(np.where(numbers, numbers + count, 0))
        count += numbers.max()
    found = components(torch.from_numpy(labels))
    assert found.dtype == torch.int64 and found.tolist() == np.stack(expected).tolist()
    turned = components(torch.from_numpy(labels).transpose(1, 2).contiguous().transpose(1, 2))  # another memory order
    assert torch.equal(turned, found)
    assert (components(torch.from_numpy(labels > 1))[0].numpy() == oracle((labels[0] > 1).astype(np.uint8))).all()


def test_a_winding_component_takes_few_passes(monkeypatch):
    passes, hook = [], torch.Tensor.scatter_reduce_
    monkeypatch.setattr(torch.Tensor, "scatter_reduce_", lambda *a: passes.append(1) or hook(*a))
    for mask in (spiral(121), np.ones((200, 200)), (np.random.default_rng(0).random((200, 200)) < 0.41)):
        passes.clear()
        components(torch.from_numpy(mask.astype(np.uint8)))
        assert 1 <= len(passes) <= 8


# ---- scores by size --------------------------------------------------------------------------------------------------
def scenes(count=13, classes=3, void=True):
    """Blobs of several sizes, and predictions that miss some and add some: truth, predicted (count, 40, 40)."""
    rng = np.random.default_rng(2)
    truth, predicted = np.zeros((2, count, 40, 40), np.int64)
    for t, p in zip(truth, predicted):
        for _ in range(rng.integers(1, 7)):
            (y, x), (h, w), label = rng.integers(0, 36, 2), rng.integers(1, 12, 2), rng.integers(1, classes)
            t[y:y + h, x:x + w] = label
            if rng.random() < 0.8:
                dy, dx = rng.integers(0, 4, 2)
                p[y + dy:y + dy + h, x + dx:x + dx + w] = label if rng.random() < 0.9 else 1
    truth[3] = predicted[3] = 0
    truth[4] = 0
    predicted[5] = 0
    if void:
        truth[rng.random(truth.shape) < 0.05] = VOID
    return torch.from_numpy(truth), torch.from_numpy(predicted)


def reviewed(truth, predicted, batch=4, **kwargs):
    metric = SegmentationReview(**kwargs)
    for start in range(0, len(truth), batch):
        part = slice(start, start + batch)
        metric.update(torch.arange(len(truth))[part], predicted[part], truth[part])
    return metric


def by_hand(truth, predicted, ignore):
    """[(right, predicted, actual)] of images, [(pixels, found, image)] of objects, by sets of (pixel, class)."""
    images, objects = [], []
    for i, (t, p) in enumerate(zip(truth.numpy().copy(), predicted.numpy().copy())):
        t[t == ignore], p[truth[i].numpy() == ignore] = 0, 0
        actual, guess = ({(y, x, a[y, x]) for y, x in zip(*np.nonzero(a))} for a in (t, p))
        images.append((len(actual & guess), len(guess), len(actual)))
        numbers = oracle(t)
        for k in range(1, numbers.max() + 1):
            own = {(y, x, t[y, x]) for y, x in zip(*np.nonzero(numbers == k))}
            objects.append((len(own), len(own & guess) / len(own) >= 0.5, i))
    return images, objects


@pytest.mark.parametrize("classes, void", [(2, False), (2, True), (4, True)])
def test_the_rows_of_samples(classes, void):
    truth, predicted = scenes(classes=classes, void=void)
    images, objects = by_hand(truth, predicted, VOID if void else None)
    names = [f"i{i}.png" for i in range(len(truth))]
    expected = [{"name": name, "score": r / (p + a - r) if p + a else 1.0, "area": a, "predicted": p,
                 "objects": sum(o[2] == i for o in objects), "found": sum(o[1] for o in objects if o[2] == i)}
                for i, (name, (r, p, a)) in enumerate(zip(names, images))]
    assert expected[3]["score"] == 1 and expected[4]["score"] == expected[5]["score"] == 0
    assert 0 < sum(o[1] for o in objects) < len(objects)
    for batch in (1, 4, 13):
        metric = reviewed(truth, predicted, batch, ignore=VOID if void else None)
        assert metric.samples(names) == expected


def test_scores_by_size_by_hand():
    truth, predicted = scenes()
    images, objects = by_hand(truth, predicted, VOID)
    tables = reviewed(truth, predicted, ignore=VOID).tables()
    filled = [image for image in images if image[2]]
    limit = sorted(image[2] for image in filled)[(len(filled) - 1) // 2]
    assert len(filled) % 2 and len(images) - len(filled) == 2
    expected = []
    for size, part in (("small", [i for i in filled if i[2] <= limit]), ("large", [i for i in filled if i[2] > limit])):
        r, p, a = map(sum, zip(*part))
        expected.append({"size": size, "pixels": f"{min(i[2] for i in part)} to {max(i[2] for i in part)}",
                         "images": len(part), "iou": r / (p + a - r)})
    expected.append({"size": "empty", "pixels": "0", "images": 2, "iou": 0.5})
    assert tables["Images by positive area"] == expected
    limit = np.median([pixels for pixels, _, _ in objects])
    assert tables["Objects by area"] == [
        {"size": size, "pixels": f"{min(p for p, _ in part)} to {max(p for p, _ in part)}", "objects": len(part),
         "recall": pytest.approx(sum(found for _, found in part) / len(part))}
        for size, part in (("small", [o[:2] for o in objects if o[0] <= limit]),
                           ("large", [o[:2] for o in objects if o[0] > limit]))]


def test_the_iou_is_that_of_the_metric():
    truth, predicted = (t[torch.tensor([0, 1, 2, 5, 6])] for t in scenes(classes=2))
    sides = torch.zeros(2, 200, 200, dtype=torch.long)  # as one image there is one size
    sides[:, :, :40] = torch.stack([t.reshape(200, 40) for t in (truth, predicted)])
    metric = BinaryIoU(ignore=VOID)
    metric.update(predicted.float(), truth)
    table = reviewed(sides[:1], sides[1:], ignore=VOID).tables()["Images by positive area"]
    assert len(table) == 1 and table[0]["iou"] == metric.compute()["iou"]


def test_masks_of_other_types_and_half_of_an_object():
    truth = torch.tensor([[[1, 1, 0, 1, 1, 1]]], dtype=torch.uint8)
    predicted = torch.tensor([[[1, 0, 0, 1, 0, 0]]], dtype=torch.bool)
    row, = reviewed(truth, predicted, ignore=-1).samples(["a"])
    assert row == {"name": "a", "score": 2 / 5, "area": 5, "predicted": 2, "objects": 2, "found": 1}
    for wrong in (truth[:, 0], truth[..., :5]):
        with pytest.raises(ValueError, match="must both be"):
            SegmentationReview().update([0], predicted, wrong)
    with pytest.raises(ValueError):
        SegmentationReview().update([0, 1], predicted, truth)


def test_ranks_are_gathered(monkeypatch):
    truth, predicted = scenes()
    names = [str(i) for i in range(13)]
    other = SegmentationReview(VOID)
    other.update(torch.arange(7, 13), predicted[7:], truth[7:])
    own = SegmentationReview(VOID)
    own.update(torch.arange(7).flip(0), predicted[:7].flip(0), truth[:7].flip(0))
    parts = iter((np.concatenate(other.images), np.concatenate(other.objects)))
    monkeypatch.setattr(dist, "gather", lambda value: [next(parts), value])
    whole = reviewed(truth, predicted, ignore=VOID)
    own.reduce()
    assert own.samples(names) == whole.samples(names) and own.tables() == whole.tables()


def test_nothing_to_review():
    metric = SegmentationReview().reduce()
    assert metric.samples([]) == [] and metric.tables() == {"Images by positive area": [], "Objects by area": []}
    empty = torch.zeros(2, 4, 4)
    assert reviewed(empty, empty).tables() == {
        "Images by positive area": [{"size": "empty", "pixels": "0", "images": 2, "iou": 1.0}], "Objects by area": []}


# ---- label noise -----------------------------------------------------------------------------------------------------
def runs(tmp_path, *tables):
    """Run folders with these {name: score}."""
    found = []
    for i, table in enumerate(tables):
        found.append(tmp_path / f"seg/fold{i}")
        charts.write_csv(found[-1] / "samples.csv", [{"name": n, "area": 3, "score": s, "note": "a, b"}
                                                     for n, s in table.items()])
    return found


def test_the_ranking(tmp_path):
    a, b = runs(tmp_path, {"x.png": 0.5, "y, z.png": 0.125, "both": 1.0}, {"w": 0.25, "both": 0.5, "v": 0.125})
    assert rank([a, b, str(a)]) == [
        {"rank": rank, "name": name, "score": score, "run": str(run), "picture": ""} for rank, name, score, run in (
            (1, "v", 0.125, b), (2, "y, z.png", 0.125, a), (3, "w", 0.25, b), (4, "x.png", 0.5, a),
            (5, "both", 0.75, f"{a}; {b}"))]


def test_losses_rank_as_well(tmp_path):
    run, = runs(tmp_path, {"a": -0.5, "b": -7.0, "c": -1e-5})
    assert [row["name"] for row in rank([run])] == ["b", "a", "c"]


@pytest.mark.parametrize("content", [b"", b"name,score\n", b"name\na\n", b"score\n1\n", b"name,score\na,\n",
                                     b"name,score\na,x\n", b"name,score\na,nan\n", b"name,score\na,inf\n",
                                     b"name,score\na\n", b"name,score\n,1\n", b"name,score\na,1\nb,\"2\n", b"\xff\xfe",
                                     b"name;score\na;1\n"])
def test_damaged_tables(tmp_path, content):
    a, b = runs(tmp_path, {"x": 0.5}, {"y": 0.5})
    (b / "samples.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"{b.name}/samples.csv: .*;"):
        rank([a, b])
    (tmp_path / "noise.csv").write_bytes(content.replace(b"score", b"rank"))
    with pytest.raises(UserError, match="noise.csv: .*;"):
        read_noise(tmp_path / "noise.csv")


def test_the_line_at_fault_and_missing_tables(tmp_path):
    a, b = runs(tmp_path, {"x": 0.5}, {"y": 0.5})
    (b / "samples.csv").write_text("name,score\na,1\nb,?\nc,1\n")
    with pytest.raises(UserError, match="samples.csv: line 3 has no name or no number as score;"):
        rank([b])
    (a / "samples.csv").unlink()
    with pytest.raises(UserError, match="fold0/samples.csv: no such table;"):
        rank([a])
    (a / "samples.csv").mkdir()
    with pytest.raises(UserError, match="fold0/samples.csv: cannot be read"):
        rank([a])


def test_reading_a_ranking_that_was_edited(tmp_path):
    path = tmp_path / "noise.csv"
    path.write_text("\ufeffrank,name,checked\n10,c,\n2,b,yes\n1,a,\n")  # sorted, cut and saved by a spreadsheet
    assert read_noise(path) == ["a", "b", "c"]


def test_the_command(command, refused, tmp_path):
    a, b = runs(tmp_path, {f"größe {i}.png": i / 100 for i in range(15)}, {f"b{i}.png": i / 100 for i in range(15)})
    done = command(report, "noise", a, b)
    assert done.code == 0, done.err
    head, *lines, last = done.out.splitlines()
    assert last == "no pictures: the runs have none of them" and not (tmp_path / "noise.csv.png").exists()
    assert head == "noise.csv: 30 samples, the worst are" and len(lines) == 20
    assert lines[1].split() == ["2", "0.0000", "größe", "0.png", f"({a})"]
    names = read_noise(tmp_path / "noise.csv")
    assert len(names) == 30 and names[:3] == ["b0.png", "größe 0.png", "b1.png"]
    with open(tmp_path / "noise.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "name", "score", "run", "picture"] and rows[29]["score"] == "0.14"
    refused(report, "noise", a, says="noise.csv: exists already")
    refused(report, "noise", a, "missing", "--out", "b.csv", says="missing/samples.csv: no such table")
    refused(report, "noise")


# ---- relabelling ----------------------------------------------------------------------------------------------------
CPU = ["--device", "cpu", "--amp", "off", "--workers", 0]


def ranking(path, rows):
    """A noise.csv of (rank, name, run)."""
    charts.write_csv(Path(path), [{"rank": rank, "name": str(name), "score": 0.5, "run": str(run)}
                                  for rank, name, run in rows])
    return path


def test_the_worst_of_a_run(tmp_path, monkeypatch):
    """By rank, not by row; the run given by any path that leads to it, as it is known by what it has held out."""
    monkeypatch.chdir(tmp_path)
    a, b = runs(tmp_path, dict.fromkeys("acg", 0.5), dict.fromkeys("bch", 0.5))
    path = ranking("noise.csv", [(7, "g", "x"), (10, "h", "x"), (2, "b", "x"), (1, "a", "x"), (3, "c", "x"),
                                 (4, "d", "x")])
    assert read_noise(path) == read_noise(path, 99) == ["a", "b", "c", "d", "g", "h"]
    assert read_noise(path, 2) == ["a", "b"]  # not h, though "10" is a text before "2"
    Path("link").symlink_to(b)
    for run, want in ((a, "acg"), (a.relative_to(tmp_path), "acg"), (b, "bch"), ("link", "bch")):
        assert "".join(read_noise(path, 6, run)) == want, run
    assert read_noise(path, 2, a) == ["a"] and read_noise(path, 3, a) == ["a", "c"]
    with pytest.raises(UserError, match="noise.csv: .* has held out none of the 1 worst samples"):
        read_noise(path, 1, b)
    with pytest.raises(UserError, match="x/samples.csv: no such table; give a checkpoint in its run's folder"):
        read_noise(path, 2, "x")


def data_of(script, module, monkeypatch, *flags):
    """The training data that the script makes of these flags; it does not train."""
    made = []

    def stop(data, *_, **__):
        made.append(data)
        raise Stopped(0)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_loader", stop)
        with pytest.raises(Stopped):
            script(module, *flags)
    return made[0]


def test_relabelling_goes_round(script, refused, tmp_path, monkeypatch, capsys):
    """Two folds, their ranking, new labels of the worst by the net that has not seen the old ones, a new training."""
    data = write_wildfire(tmp_path / "Wildfire", train=8, test=0, size=(32, 32))
    flags = ["--data", "Wildfire", *TINY, "--amp", "off", "--ignore", 255]
    for fold in (0, 1):
        script(train_seg, *flags, "--folds", 2, "--fold", fold, "--name", f"fold{fold}")
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["report", "noise", "runs/seg/fold0", str(tmp_path / "runs/seg/fold1")])
        report.main()
    with open("noise.csv") as file:
        ranked = [(row["name"], int(Path(row["run"]).name[-1])) for row in csv.DictReader(file)]
    count = next(k for k in range(1, 9) if len({fold for _, fold in ranked[:k]}) == 2)  # the least with both folds
    worst, held = ranked[:count], json.loads(Path("runs/seg/fold0/folds.json").read_text())
    assert len(ranked) == 8 and all(held[Path(name).stem] == fold for name, fold in ranked)
    other = 1 - worst[0][1]
    line = refused(predict, "--task", "seg", *CPU, "--weights", f"runs/seg/fold{other}/best.pt", "--noisy",
                   f"noise.csv:{count - 1}", says=["noise.csv", f"runs/seg/fold{other}", f"{count - 1} worst"])
    assert "take another run's" in line
    for fold, path in enumerate(("runs/seg/fold0/best.pt", "runs/../runs/seg/fold1/best.pt")):
        script(predict, "--task", "seg", *CPU, "--weights", path, "--noisy", f"noise.csv:{count}", "--pseudo", 0.6,
               "--out", f"new{fold}")
        found = sorted(p.resolve() for p in Path(f"new{fold}/pseudo/train_img").iterdir())
        assert found == sorted(Path(name).resolve() for name, k in worst if k == fold)
        for file in found:
            mask, sure = (np.array(Image.open(f"new{fold}/{name}/{file.stem}.tif"))
                          for name in ("masks", "pseudo/train_mask"))
            assert (mask == sure)[sure < 255].all()
    extra = ["--drop-noisy", f"noise.csv:{count}", "--extra-data", "new0/pseudo", "new1/pseudo"]
    trained = data_of(script, train_seg, monkeypatch, *flags, "--folds", 0, *extra, "--repeat", 1)
    images = [Path(image).resolve() for image, _ in trained.paired]
    assert Counter(images) == Counter(data.resolve() / f"train_img/train_img_{i}.tif" for i in range(8))
    bad = {Path(name).resolve() for name, _ in worst}
    assert len(bad) == count and len(trained) == 8
    for i, (image, (_, mask)) in enumerate(zip(images, trained.paired)):
        folder = f"new{held[image.stem]}/pseudo" if image in bad else "Wildfire"
        name = image.stem if image in bad else image.stem.replace("img", "mask")
        assert Path(mask) == Path(f"{folder}/train_mask/{name}.tif")
        label = np.array(Image.open(mask))
        assert (trained[i]["mask"].numpy() == label).all()
        old = np.array(Image.open(data / f"train_mask/{image.stem.replace('img', 'mask')}.tif"))
        assert (label != old).any() == (image in bad)
    capsys.readouterr()  # what the fold itself holds out is not trained on, whatever its label
    part = data_of(script, train_seg, monkeypatch, *flags, "--folds", "runs/seg/fold0/folds.json", *extra)
    mine = sum(fold == 0 for _, fold in worst)
    assert f"new0/pseudo: {mine} of {mine} images are copies of validation images" in capsys.readouterr().out
    assert {Path(image).resolve() for image, _ in part.paired} == {image for image in images if held[image.stem]}
    script(train_seg, *flags, "--folds", 0, *extra, "--name", "again")
    assert Path("runs/seg/again/last.pt").exists() and "8 tiles to train" in capsys.readouterr().out
    shutil.move("runs/seg/fold0", "moved")
    script(predict, "--task", "seg", *CPU, "--weights", "moved/best.pt", "--noisy", "noise.csv:8", "--out", "all")
    assert {p.stem for p in Path("all/masks").iterdir()} == {stem for stem, fold in held.items() if fold == 0}


def test_boxes_of_the_noisy_images(script, parking, finder, monkeypatch):  # noqa: F811
    files = sorted((parking / "train/images").iterdir())
    Path("runs/det/a").mkdir(parents=True)
    path = test_predict_det.weights("runs/det/a/best.pt", data=parking)
    ranking("noise.csv", [(i + 1, files[n], "x") for i, n in enumerate((7, 2, 9, 4, 0, 1))])
    charts.write_csv("runs/det/a/samples.csv", [{"name": str(files[n]), "score": 0.5} for n in (0, 7, 9)])
    script(predict, "--task", "det", *CPU, "--noisy", "noise.csv:4", "--pseudo", 0.5, "--weights", path)
    out = Path("runs/det/a/predict")
    assert {p.stem for p in (out / "labels").iterdir()} == {"007", "009"} and {
        item["image_id"] for item in test_predict_det.items_of(out)} == {7, 9}
    extra = ["--drop-noisy", "noise.csv:4", "--extra-data", out / "pseudo"]
    data = data_of(script, train_det, monkeypatch, "--data", parking, *TINY_DET, "--folds", 0, *extra)
    assert [Path(file).resolve() for file in data.files] == [files[n] for n in (0, 1, 3, 5, 6, 8, 7, 9)]
    labels = json.loads((parking / "train/label/Train.json").read_text())["annotations"]
    for n, found in zip((7, 9), data.labels[-2:]):  # the finder's: one around each colour
        true = [((x, y, x + w, y + h), item["category_id"] - 1) for item in labels if item["image_id"] == n
                for x, y, w, h in [item["bbox"]]]
        want = {k: np.array([box for box, kind in true if kind == k]) for k in {kind for _, kind in true}}
        want = {k: (*some.min(0)[:2], *some.max(0)[2:]) for k, some in want.items()}
        assert sorted(found[:, 0]) == sorted(want) and (len(true) > len(want)) == (n == 9)
        assert all(np.abs(np.subtract(box, want[k])).max() <= 2 for k, *box in found)


def test_classes_of_the_noisy_images(script, dirty, monkeypatch):
    files = sorted((dirty / "dirty_mnist_2nd").iterdir())
    Path("runs/cls/a").mkdir(parents=True)
    path = test_bad_input_cls.weights("runs/cls/a/last.pt", data=dirty)  # the newest run's
    ranking("noise.csv", [(i + 1, files[n], "x") for i, n in enumerate((7, 2, 4, 9, 0, 1))])
    charts.write_csv("runs/cls/a/samples.csv", [{"name": str(files[n]), "score": 0.5} for n in (0, 4, 7)])
    script(predict, "--task", "cls", *CPU, "--noisy", "noise.csv:5", "--pseudo", 0.5)
    out = path.parent / "predict"
    with open(out / "probabilities.csv") as file:
        probs = {int(row.pop("index")): [float(p) for p in row.values()] for row in csv.DictReader(file)}
    assert probs.keys() == {7, 4, 0}
    extra = ["--drop-noisy", "noise.csv:5", "--extra-data", out / "pseudo"]
    data = data_of(script, train_cls, monkeypatch, "--data", dirty, *TINY_CLS, "--folds", 0, *extra).source
    names = [int(Path(file).stem) for file in data.files]
    assert names[:7] == [1, 3, 5, 6, 8, 10, 11] and sorted(names[7:]) == [0, 4, 7]
    assert [row.tolist() for row in data.labels[7:]] == [[p > 0.5 for p in probs[name]] for name in names[7:]]


def test_noisy_samples_that_cannot_be_predicted(refused, parking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = parking / "train/images/003.jpg"
    for run in "ab":
        Path(f"runs/det/{run}").mkdir(parents=True)
        test_predict_det.weights(f"runs/det/{run}/best.pt", data=parking)
        charts.write_csv(f"runs/det/{run}/samples.csv", [{"name": dict(a=str(image), b="gone.jpg")[run], "score": 0.5}])
    ranking("noise.csv", [(1, image, "runs/det/a"), (2, "gone.jpg", "runs/det/b")])
    Path("bad.csv").write_text("rank,name\n1\n")
    flags = ["--task", "det", *CPU, "--out", "out", "--weights", "runs/det/b/best.pt"]
    for more, says in ((["--noisy", "noise.csv:1"], ["noise.csv: runs/det/b has held out none of the 1 worst"]),
                       (["runs/det/a/best.pt", "--noisy", "noise.csv:2"], ["--noisy: is for one checkpoint"]),
                       (["--noisy", "noise.csv:2", "--source", image], ["--noisy: ", "no --source"]),
                       (["--noisy", "noise.csv:2"], ["gone.jpg"]), (["--noisy", "noise.csv"], ["--noisy", ":20"]),
                       (["--noisy", "noise.csv:0"], ["--noisy"]), (["--noisy", "noise.csv:x"], ["--noisy"]),
                       (["--noisy", "none.csv:2"], ["none.csv: no such table", "utils.report noise"]),
                       (["--noisy", "bad.csv:2"], ["bad.csv: line 2"])):
        refused(predict, *flags, *more, says=says)
    assert not Path("out").exists()


# ---- page ------------------------------------------------------------------------------------------------------------
def test_the_ends():
    assert ends([0.5, 0.1, 0.9, 0.1, 0.7], 2, 2) == ([1, 3], [2, 4]) and ends([0.5, 0.1, 0.9], 2) == ([1, 0], [2])
    assert ends([0.5]) == ([0], []) and ends([]) == ([], [])
    assert [len(part) for part in ends(range(20))] == [12, 4]


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def parts():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 4, 32, 32, 3), np.uint8)
    return {"worst": [({"name": "data/a.png", "score": 0.03125}, list(pictures[0])),
                      ({"name": "b.png", "score": 0.5}, list(pictures[1]))],
            "best": [({"name": "c.png", "score": 1}, list(pictures[2]))]}


def test_a_page_is_a_sheet_and_its_tables(tmp_path):
    given, titles = parts(), ["image", "truth", "prediction", "errors"]
    rows = [pictures for samples in given.values() for _, pictures in samples]
    captions = ["worst 1:   0.0312   a.png", "worst 2:   0.5000   b.png", "best 1:   1.0000   c.png"]
    contact_sheet(tmp_path / "sheet.png", rows, titles=titles, captions=captions, max_side=32)
    sheet = read(tmp_path / "sheet.png")
    page(tmp_path / "bare.png", given, tables={}, titles=titles, max_side=32)
    np.testing.assert_array_equal(read(tmp_path / "bare.png"), sheet)

    table = [{"class": "fire", "iou": 0.123456}, {"class": "water", "iou": math.nan, "images": 7}]
    tables = {"Classes": table, "A second one": table[:1]}
    page(tmp_path / "page.png", given, tables=tables, titles=titles, max_side=32)
    whole = read(tmp_path / "page.png")
    height, width = sheet.shape[:2]
    assert whole.shape[0] == height + (4 * 20 + 16) + (3 * 20 + 16) and whole.shape[1] >= width
    np.testing.assert_array_equal(whole[:height, :width], sheet)
    dark = (whole[height:] < 200).all(-1)
    lines = [dark[8 + 20 * i:28 + 20 * i].any() for i in range(4)]
    assert all(lines) and dark[104:124].any() and dark[124:164].any() and not dark[-8:].any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bare.png", "page.png", "sheet.png", "worst"]
    assert [sample.get("picture") for part in given.values() for sample, _ in part] == [
        "worst/01.jpg", "worst/02.jpg", None]


def test_the_worst_of_several_runs_are_drawn_by_rank(command, refused, tmp_path):
    """Each as its run has drawn it, the worst above; what a run has no picture of, or no longer, is left out."""
    scores, colours = [{"a": 0.1, "b": 0.4, "c": 0.9}, {"d": 0.2, "e": 0.3, "f": 0.5}], [(200, 0, 0), (0, 0, 200)]
    for i, (table, colour) in enumerate(zip(scores, colours)):
        samples = [{"name": name, "score": score} for name, score in table.items()]
        rows = [[np.full((40 + 10 * k, 60, 3), colour, np.uint8)] * 2 for k in range(2)]
        review.keep(tmp_path / f"fold{i}", samples[:2], rows, ["x", "y"], titles=["label", "prediction"])
        charts.write_csv(tmp_path / f"fold{i}/samples.csv", samples)
    done = command(report, "noise", "fold0", "fold1")
    assert done.out.splitlines()[-1] == "noise.csv.png: 4 of them with labels and predictions"
    shown = read(tmp_path / "noise.csv.png")
    kept = [read(tmp_path / place) for place in ("fold0/worst/01.jpg", "fold1/worst/01.jpg", "fold1/worst/02.jpg",
                                                 "fold0/worst/02.jpg")]
    np.testing.assert_array_equal(shown, np.concatenate(kept))
    assert [tuple((kept[k][90, 60] > 100).tolist()) for k in range(4)] == [
        (True, False, False), (False, False, True), (False, False, True), (True, False, False)]
    for path in ("fold0/worst/01.jpg", "noise.csv", "noise.csv.png"):
        (tmp_path / path).unlink()
    (tmp_path / "fold1/worst/02.jpg").write_bytes(b"no picture")
    done = command(report, "noise", "fold0", "fold1")
    assert done.out.splitlines()[-1] == "noise.csv.png: 2 of them with labels and predictions"
    (tmp_path / "noise.csv").unlink()
    refused(report, "noise", "fold0", says="noise.csv.png: exists already")
    assert not (tmp_path / "noise.csv").exists()


def test_cells_of_a_table(monkeypatch):
    drawn = []
    monkeypatch.setattr(review, "text_line", lambda draw, place, text, **style: drawn.append((place, text, style)))
    picture = review._table("Sizes", [{"size": "small", "iou": 0.123456, "n": 7}, {"size": "large", "n": 12345}])
    cells = {text: (place, style["anchor"]) for place, text, style in drawn if "anchor" in style}
    assert [text for _, text, _ in drawn] == ["Sizes", "size", "iou", "n", "small", "0.1235", "7", "large", "", "12345"]
    assert {cells[t][1] for t in ("size", "small", "large")} == {"lm"} and cells["size"][0][0] == cells["small"][0][0]
    assert {cells[t][1] for t in ("iou", "0.1235", "n", "7", "12345")} == {"rm"}
    assert cells["n"][0][0] == cells["7"][0][0] == cells["12345"][0][0] > cells["0.1235"][0][0]
    assert cells["small"][0][1] == cells["7"][0][1] < cells["12345"][0][1] < picture.height
    assert picture.width >= cells["n"][0][0]


def test_a_wide_table_widens_the_page_and_a_failed_one_changes_nothing(tmp_path, monkeypatch):
    row = {f"a column with a long name {i}": i for i in range(6)}
    page(tmp_path / "a.jpg", {"worst": parts()["best"]}, tables={"": [row]}, titles=None, max_side=32)
    before = (tmp_path / "a.jpg").read_bytes()
    assert read(tmp_path / "a.jpg").shape[1] > 600 > 8 + 4 * 40
    monkeypatch.setattr(review.Image, "new", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page(tmp_path / "a.jpg", parts(), tables={}, titles=None)
    assert (tmp_path / "a.jpg").read_bytes() == before and len(list(tmp_path.glob("*.jpg"))) == 1
