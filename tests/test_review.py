"""utils/pictures/review.py: rankings from tables, what they make of a training, pages pixel by pixel."""
import csv
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import train_cls
import train_det
import train_seg
from tests import test_bad_input_cls, test_predict_det
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_wildfire
from tests.test_predict_det import finder  # noqa: F401, a fixture
from utils import report
from utils.errors import Stopped, UserError
from utils.pictures import cells, review
from utils.pictures.review import rank_samples, read_noise, worst_and_best, write_review
from utils.pictures.sheets import draw_sheet


# ---- label noise -----------------------------------------------------------------------------------------------------
def runs(tmp_path, *tables):
    """Run folders with these {name: score}."""
    found = []
    for i, table in enumerate(tables):
        found.append(tmp_path / f"seg/fold{i}")
        cells.write_csv(found[-1] / "samples.csv", [{"name": n, "area": 3, "score": s, "note": "a, b"}
                                                     for n, s in table.items()])
    return found


def test_the_ranking(tmp_path):
    a, b = runs(tmp_path, {"x.png": 0.5, "y, z.png": 0.125, "both": 1.0}, {"w": 0.25, "both": 0.5, "v": 0.125})
    assert rank_samples([a, b, str(a)]) == [
        {"rank": rank, "name": name, "score": score, "run": str(run)} for rank, name, score, run in (
            (1, "v", 0.125, b), (2, "y, z.png", 0.125, a), (3, "w", 0.25, b), (4, "x.png", 0.5, a),
            (5, "both", 0.75, f"{a}; {b}"))]


def test_losses_rank_as_well(tmp_path):
    run, = runs(tmp_path, {"a": -0.5, "b": -7.0, "c": -1e-5})
    assert [row["name"] for row in rank_samples([run])] == ["b", "a", "c"]


@pytest.mark.parametrize("content", [b"", b"name,score\n", b"name\na\n", b"score\n1\n", b"name,score\na,\n",
                                     b"name,score\na,x\n", b"name,score\na,nan\n", b"name,score\na,inf\n",
                                     b"name,score\na\n", b"name,score\n,1\n", b"name,score\na,1\nb,\"2\n", b"\xff\xfe",
                                     b"name;score\na;1\n"])
def test_damaged_tables(tmp_path, content):
    a, b = runs(tmp_path, {"x": 0.5}, {"y": 0.5})
    (b / "samples.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"{b.name}/samples.csv: .*;"):
        rank_samples([a, b])
    (tmp_path / "noise.csv").write_bytes(content.replace(b"score", b"rank"))
    with pytest.raises(UserError, match="noise.csv: .*;"):
        read_noise(tmp_path / "noise.csv")


def test_the_line_at_fault_and_missing_tables(tmp_path):
    a, b = runs(tmp_path, {"x": 0.5}, {"y": 0.5})
    (b / "samples.csv").write_text("name,score\na,1\nb,?\nc,1\n")
    with pytest.raises(UserError, match="samples.csv: line 3 has no name or no number as score;"):
        rank_samples([b])
    (a / "samples.csv").unlink()
    with pytest.raises(UserError, match="fold0/samples.csv: .*cannot be read \\(No such file"):
        rank_samples([a])
    (a / "samples.csv").mkdir()
    with pytest.raises(UserError, match="fold0/samples.csv: not a readable CSV"):
        rank_samples([a])


def test_reading_a_ranking_that_was_edited(tmp_path):
    path = tmp_path / "noise.csv"
    path.write_text("\ufeffrank,name,checked\n10,c,\n2,b,yes\n1,a,\n")  # sorted, cut and saved by a spreadsheet
    assert read_noise(path) == ["a", "b", "c"]


def test_the_command(command, refused, tmp_path):
    a, b = runs(tmp_path, {f"größe {i}.png": i / 100 for i in range(15)}, {f"b{i}.png": i / 100 for i in range(15)})
    done = command(report, "noise", a, b)
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head == "noise.csv: 30 samples, the worst are" and len(lines) == 20
    assert lines[1].split() == ["2", "0.0000", "größe", "0.png", f"({a})"]
    names = read_noise(tmp_path / "noise.csv")
    assert len(names) == 30 and names[:3] == ["b0.png", "größe 0.png", "b1.png"]
    with open(tmp_path / "noise.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "name", "score", "run"] and rows[29]["score"] == "0.14"
    refused(report, "noise", a, says="noise.csv: exists already")
    refused(report, "noise", a, "missing", "--out", "b.csv", says="missing/samples.csv: not a readable CSV")
    refused(report, "noise")


# ---- relabelling ----------------------------------------------------------------------------------------------------
CPU = ["--device", "cpu", "--amp", "off", "--workers", 0]


def ranking(path, rows):
    """A noise.csv of (rank, name, run)."""
    cells.write_csv(Path(path), [{"rank": rank, "name": str(name), "score": 0.5, "run": str(run)}
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
    with pytest.raises(UserError, match="x/samples.csv: .*cannot be read .*; give a checkpoint in its run's folder"):
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


@pytest.mark.slow
def test_relabelling_goes_round(script, refused, tmp_path, monkeypatch, capsys):
    """Two folds, their ranking, new labels of the worst by the net that has not seen the old ones, a new training."""
    data = write_wildfire(tmp_path / "Wildfire", train=8, test=0, size=(32, 32))
    flags = ["--data", "Wildfire", *TINY, "--amp", "off", "--ignore", 255, "--seed", 1]
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
    cells.write_csv("runs/det/a/samples.csv", [{"name": str(files[n]), "score": 0.5} for n in (0, 7, 9)])
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
    cells.write_csv("runs/cls/a/samples.csv", [{"name": str(files[n]), "score": 0.5} for n in (0, 4, 7)])
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
        cells.write_csv(f"runs/det/{run}/samples.csv", [{"name": dict(a=str(image), b="gone.jpg")[run], "score": 0.5}])
    ranking("noise.csv", [(1, image, "runs/det/a"), (2, "gone.jpg", "runs/det/b")])
    Path("bad.csv").write_text("rank,name\n1\n")
    flags = ["--task", "det", *CPU, "--out", "out", "--weights", "runs/det/b/best.pt"]
    for more, says in ((["--noisy", "noise.csv:1"], ["noise.csv: runs/det/b has held out none of the 1 worst"]),
                       (["runs/det/a/best.pt", "--noisy", "noise.csv:2"], ["--noisy: is for one checkpoint"]),
                       (["--noisy", "noise.csv:2", "--source", image], ["--noisy: ", "no --source"]),
                       (["--noisy", "noise.csv:2"], ["gone.jpg"]), (["--noisy", "noise.csv"], ["--noisy", ":20"]),
                       (["--noisy", "noise.csv:0"], ["--noisy"]), (["--noisy", "noise.csv:x"], ["--noisy"]),
                       (["--noisy", "none.csv:2"], ["none.csv: not a readable CSV", "utils.report noise"]),
                       (["--noisy", "bad.csv:2"], ["bad.csv: line 2"])):
        refused(predict, *flags, *more, says=says)
    assert not Path("out").exists()


# ---- review of a run -------------------------------------------------------------------------------------------------
def test_the_worst_and_the_best():
    assert worst_and_best([0.5, 0.1, 0.9, 0.1, 0.7], 2, 2) == ([1, 3], [2, 4])
    assert worst_and_best([0.5, 0.1, 0.9], 2) == ([1, 0], [2])
    assert worst_and_best([0.5]) == ([0], []) and worst_and_best([]) == ([], [])
    assert [len(part) for part in worst_and_best(range(20))] == [12, 4]


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def samples(count=14):
    """Samples, the best first, and pictures of them, four each."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, 4, 32, 32, 3), np.uint8)
    return [{"name": f"data/{k}.png", "score": 1 - k / 32} for k in range(count)], [list(row) for row in pictures]


def test_a_review_is_a_sheet_and_its_tables(tmp_path):
    (rows, pictures), titles, asked = samples(), ["image", "truth", "prediction", "errors"], []
    table = [{"class": "fire", "iou": 0.123456}, {"class": "water", "iou": math.nan, "images": 7}]
    tables = {"Classes": table, "None": []}
    write_review(tmp_path, rows, lambda chosen: asked.append(chosen) or [pictures[k] for k in chosen], tables=tables,
                 titles=titles, max_side=32)
    order = [*range(13, 1, -1), 0, 1]
    assert asked == [order]  # each is drawn once
    captions = [f"{part}:   {1 - k / 32:.4f}   {k}.png" for part, k in zip(
        [*(f"worst {i}" for i in range(1, 13)), "best 1", "best 2"], order)]
    sheet = np.array(draw_sheet([pictures[k] for k in order], titles=titles, captions=[[text] for text in captions],
                                max_side=32))
    whole = read(tmp_path / "review.png")
    height, width = sheet.shape[:2]
    assert whole.shape[0] == height + (4 * 22 + 16) + (2 * 22 + 16) and whole.shape[1] >= width
    np.testing.assert_array_equal(whole[:height, :width], sheet)
    dark = (whole[height:] < 200).all(-1)
    assert all(dark[8 + 22 * i:30 + 22 * i].any() for i in range(4)) and not dark[-8:].any()
    with open(tmp_path / "samples.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["review.png", "samples.csv"]


def test_samples_side_by_side_with_captions_of_their_own(tmp_path):
    rows, pictures = samples(7)
    write_review(tmp_path, rows, lambda chosen: [pictures[k][:1] for k in chosen], tables={}, across=4, max_side=32,
                 caption=lambda row: row["name"][-5:])
    sheet = draw_sheet([[pictures[k][0] for k in (6, 5, 4, 3)], [pictures[k][0] for k in (2, 1, 0)]], max_side=32,
                       captions=[[f"worst {i}:   {7 - i}.png" for i in (1, 2, 3, 4)],
                                 [f"worst {i}:   {7 - i}.png" for i in (5, 6, 7)]])
    np.testing.assert_array_equal(read(tmp_path / "review.png"), np.array(sheet))


def test_a_failed_review_changes_nothing(tmp_path, monkeypatch):
    rows, pictures = samples(1)
    write_review(tmp_path, rows, lambda chosen: [pictures[0]], tables={"": [{f"a long name {i}": i for i in range(9)}]})
    before = (tmp_path / "review.png").read_bytes()
    assert read(tmp_path / "review.png").shape[1] > 600
    monkeypatch.setattr(review, "join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_review(tmp_path, rows, lambda chosen: [pictures[0]], {})
    assert (tmp_path / "review.png").read_bytes() == before
