"""data/folds.py: what a split promises, over random sample sets; and the files that users bring."""
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import folds, images
from tests.conftest import write_tif
from utils.errors import UserError

KFOLD = st.integers(2, 10).map(lambda k: [1 / k] * k)
SHARES = KFOLD | st.sampled_from([[0.2, 0.8], [0.5, 0.5], [0.05, 0.95]])


def count(fold_of, labels, names):
    """{label: Counter of folds}"""
    found = defaultdict(Counter)
    for name, label in zip(names, labels):
        found[label][fold_of[name]] += 1
    return found


# ---- assign ----------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(SHARES, st.integers(1, 200))
def test_every_sample_is_in_one_fold_and_sizes_are_balanced(shares, n):
    names = [f"s{i}" for i in range(n)]
    fold_of = folds.assign(names, shares)
    assert list(fold_of) == names and set(fold_of.values()) <= set(range(len(shares)))
    sizes = Counter(fold_of.values())
    assert all(abs(sizes[k] - share * n) < 1 for k, share in enumerate(shares))


@settings(max_examples=100, deadline=None)
@given(SHARES, st.lists(st.sampled_from("aaaabbcd"), min_size=1, max_size=150))
def test_every_stratum_is_balanced(shares, strata):
    names = [f"s{i}" for i in range(len(strata))]
    fold_of = folds.assign(names, shares, strata=strata)
    for label, found in count(fold_of, strata, names).items():
        total = strata.count(label)
        assert all(abs(found[k] - share * total) <= 1 for k, share in enumerate(shares)), label
    if len(set(shares)) == 1:  # and the strata's remainders do not all go to the same fold
        sizes = Counter(fold_of.values())
        assert all(abs(sizes[k] - share * len(names)) <= 2 for k, share in enumerate(shares))


def test_a_held_out_fraction_of_a_small_set_with_many_strata():
    rng, parts = random.Random(0), []
    for _ in range(20):
        areas = [int(rng.lognormvariate(5, 2)) for _ in range(48)]
        fold_of = folds.assign(list(range(48)), [0.2, 0.8], strata=folds.area_strata(areas))
        parts.append(sum(k == 0 for k in fold_of.values()) / 48)
    assert min(parts) > 0.12 and max(parts) < 0.28 and abs(sum(parts) / 20 - 0.2) < 0.02


@settings(max_examples=100, deadline=None)
@given(SHARES, st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=1, max_size=150))
def test_groups_are_never_divided(shares, samples):
    groups, strata = zip(*samples)
    names = [f"s{i}" for i in range(len(samples))]
    for options in ({}, {"strata": strata}):
        fold_of = folds.assign(names, shares, groups=groups, **options)
        assert all(len(found) == 1 for found in count(fold_of, groups, names).values())
        assert fold_of.keys() == set(names)


@settings(max_examples=60, deadline=None)
@given(KFOLD, st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_grouped_folds_differ_by_no_more_than_the_largest_group(shares, sizes):
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    names = [f"s{i}" for i in range(len(groups))]
    fold_of = folds.assign(names, shares, groups=groups)
    filled = Counter(fold_of.values())
    filled = [filled[k] for k in range(len(shares))]
    assert max(filled) - min(filled) <= max(sizes)  # the largest first: Graham 1969


def random_search(names, shares, strata, groups, tries=2000):
    """The least deviation of strata from their shares among random assignments of the groups."""
    rng = random.Random(0)
    return min(deviation({g: rng.randrange(len(shares)) for g in set(groups)}, shares, strata, groups)
               for _ in range(tries))


def deviation(fold_of_group, shares, strata, groups):
    found = Counter((s, fold_of_group[g]) for s, g in zip(strata, groups))
    totals = Counter(strata)
    return sum(abs(found[s, k] - share * totals[s]) / totals[s] for s in totals for k, share in enumerate(shares))


@pytest.mark.parametrize("seed", range(5))
def test_stratified_groups_beat_two_thousand_random_splits(seed):
    rng = random.Random(seed)
    groups = [g for g in range(24) for _ in range(rng.randint(1, 9))]
    lean = [rng.random() for _ in range(24)]  # a place is mostly of one kind
    strata = [int(rng.random() < lean[g]) for g in groups]
    names = [f"s{i}" for i in range(len(groups))]
    shares = [0.25] * 4
    fold_of = folds.assign(names, shares, strata=strata, groups=groups)
    ours = deviation({g: fold_of[name] for name, g in zip(names, groups)}, shares, strata, groups)
    assert ours < random_search(names, shares, strata, groups)


def test_a_split_is_repeatable_and_another_seed_is_another_split():
    names = [f"s{i}" for i in range(50)]
    first = folds.assign(names, [0.2] * 5)
    np.random.seed(1), random.seed(1)
    assert folds.assign(names, [0.2] * 5) == first
    assert folds.assign(names, [0.2] * 5, seed=1) != first
    # written down, so that it stays what it was in every version
    assert [folds.assign(list("abcdef"), [0.5, 0.5])[n] for n in "abcdef"] == [0, 1, 0, 1, 0, 1]


def test_fewer_samples_than_folds():
    assert sorted(folds.assign(["a", "b"], [0.2] * 5).values()) == [0, 1]


# ---- strata ----------------------------------------------------------------------------------------------------------
def test_empty_masks_are_a_stratum_of_their_own():
    strata = folds.area_strata([0, 1, 10, 100, 0, 1000, 10**6])
    assert [s == -1 for s in strata] == [True, False, False, False, True, False, False]
    assert strata[1] == 0 and strata[-1] == 9 and strata[1:4] == sorted(strata[1:4])
    assert folds.area_strata([0, 0]) == [-1, -1] and folds.area_strata([]) == []
    assert len(set(folds.area_strata([5, 5, 5]))) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60))
def test_strata_are_the_bins_of_a_histogram_of_logarithms(areas):
    counts, _ = np.histogram(np.log(areas), 10)
    assert Counter(folds.area_strata(areas)) == {k: c for k, c in enumerate(counts) if c}


# ---- flags and files -------------------------------------------------------------------------------------------------
def test_parse():
    assert folds.parse_folds("5") == [0.2] * 5 and folds.parse_folds("5.0") == [0.2] * 5
    assert folds.parse_folds("0") is None and folds.parse_folds("0.0") is None
    assert folds.parse_folds("0.25") == [0.25, 0.75]
    assert folds.parse_folds("some/split.json") == Path("some/split.json")
    assert math.isclose(sum(folds.parse_folds("7")), 1)


@pytest.mark.parametrize("text", ["1", "-1", "-0.5", "1.5", "2.5", "nan", "inf", "-inf", "1e400", "1001", "1e9"])
def test_numbers_that_are_no_split(text):
    with pytest.raises(UserError, match="--folds .*: neither a number of folds .*;"):
        folds.parse_folds(text)


def test_a_split_file_round_trip(tmp_path):
    fold_of = folds.assign(["a", "b", "c", "d"], [0.5, 0.5])
    (tmp_path / "folds.json").write_text(json.dumps(fold_of | {"of another set": 3}))
    assert folds.read_split(tmp_path / "folds.json", ["d", "a"]) == {n: fold_of[n] for n in "da"}
    with pytest.raises(UserError, match=r"folds.json: has no fold for e \(2 in total\)"):
        folds.read_split(tmp_path / "folds.json", ["a", "e", "f"])


@pytest.mark.parametrize("content", [
    b"", b"a,b\n1,2", b"[]", b"[1]", b"3", b"null", b"\"a\"", b"{\"a\":", b"\xff\xfe\x00", b"[" * 100_000,
    b"{\"a\": \"0\"}", b"{\"a\": 0.5}", b"{\"a\": null}", b"{\"a\": NaN}", b"{\"a\": [0]}"])
def test_files_that_are_no_split(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json: .*;"):
        folds.read_split(tmp_path / "x.json", ["a"])


def test_split_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=f"{path.name}: .*;"):
            folds.read_split(path, ["a"])


@pytest.mark.parametrize("text, expected", [
    ("name,group\na,1\nb,2\n", ["1", "2"]), ("\ufeffname,group\r\na,1\r\nb,2\r\n", ["1", "2"]),
    ("name,x,group\na,9,1\nb,9,2\n", ["1", "2"]), ("a,1\nb,2", ["1", "2"]), ("b,\"x,y\"\n\na,z\n", ["z", "x,y"]),
    ("name;group\na;1\n", None), ("a,1\n", None), ("", None), ("a\nb\n", None), ("name,group\na,1\nb\n", None),
    ("name,x,group\na,1\nb,2,3\n", None), ("a,\"" + "x" * 200_000 + "\"\nb,1\n", None)])
def test_groups(tmp_path, text, expected):
    (tmp_path / "g.csv").write_text(text, encoding="utf-8")
    if expected is None:
        with pytest.raises(UserError, match="g.csv: .*;"):
            folds.read_groups(tmp_path / "g.csv", ["a", "b"])
    else:
        assert folds.read_groups(tmp_path / "g.csv", ["a", "b"]) == expected


def test_group_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes("a,Köln\nb,x\n".encode("latin-1"))
    for path in (tmp_path, tmp_path / "missing.csv", tmp_path / "latin.csv"):
        with pytest.raises(UserError, match=f"{path.name}: not a readable CSV .*; give a CSV"):
            folds.read_groups(path, ["a", "b"])


def test_split_into_training_and_validation(tmp_path):
    paths = files(tmp_path / "a", range(4))

    def split(fold_of, fold):
        run = tmp_path / f"run{fold}-{len(fold_of)}"
        run.mkdir()
        return folds.load_or_make_split(run, list(fold_of), fold_of, fold, files=paths)
    fold_of = {"a": 0, "b": 1, "c": 0, "d": 2}
    assert split(fold_of, 0) == ([1, 3], [0, 2])
    assert split(fold_of, 2) == ([0, 1, 2], [3])
    for fold_of, fold in ((fold_of, 3), ({"a": 0, "b": 0}, 0), (fold_of, 999)):
        with pytest.raises(UserError, match=f"--fold {fold}: leaves .* there are the folds 0"):
            split(fold_of, fold)


# ---- leaks -----------------------------------------------------------------------------------------------------------
def files(folder, pictures):
    """PNGs of arrays (H, W), or of numbers: of nine pixels that are so bright."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        array = np.full((3, 3), picture, np.uint8) if np.isscalar(picture) else picture
        Image.fromarray(array).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(pictures))]


def save_somehow(path, array, rng):
    """(C, H, W) in one of the encodings that lose nothing. Returns the path."""
    options = rng.choice([{}, {"compress": "deflate", "predictor": 2}, {"compress": "lzw", "interleave": "band"},
                          {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"ENDIANNESS": "BIG"}, None, None])
    if options is None and len(array) in (1, 3) and array.dtype == np.uint8:
        path = path.with_suffix(".png")
        Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(
            path, compress_level=rng.randint(0, 9), **rng.choice([{}, {"dpi": (rng.randint(1, 999), 9)}]))
        return path
    return write_tif(path.with_suffix(".tif"), array, **options or {})


def pictures_that_differ_in_little():
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 24), np.uint8)
    for bands, rows, columns in ((1, 40, 24), (3, 40, 24), (3, 24, 24), (1, 24, 40)):
        base = np.resize(noise, (bands, rows, columns))
        yield base
        yield base.astype(np.uint16)  # the same numbers
        yield base.astype(np.int16)
        for spot in ((0, 0, 0), (-1, -1, -1), (0, rows // 2, 5)):  # one pixel; most leave the middle rows as they are
            changed = base.copy()
            changed[spot] ^= 1
            yield changed
    flat = np.zeros((1, 40, 24), np.uint8)  # nothing in the middle
    yield flat
    for row in (3, 37):
        flat = flat.copy()
        flat[0, row] = 9
        yield flat


def test_copies_are_found_among_images_that_differ_in_little(tmp_path):
    rng, made = random.Random(0), list(pictures_that_differ_in_little())
    assert len({(a.shape, a.dtype, a.tobytes()) for a in made}) == len(made) == 27
    for attempt in range(4):
        sides = []
        for side, count in (("t", 30), ("v", 15)):
            (tmp_path / f"{side}{attempt}").mkdir()
            chosen = [rng.choice(made) for _ in range(count)]
            sides.append({save_somehow(tmp_path / f"{side}{attempt}/{i}", array, rng): array
                          for i, array in enumerate(chosen)})
        train, val = sides

        def equal(a, b):
            return a.dtype == b.dtype and np.array_equal(a, b)

        expected = [str(v) for v, array in val.items() if any(equal(array, other) for other in train.values())]
        pairs = folds._copies(list(train), list(val))
        assert 3 < len(expected) < len(val) and [str(held) for held, _ in pairs] == expected
        assert all(equal(val[held], train[seen]) for held, seen in pairs)
        assert any(held.read_bytes() != seen.read_bytes() for held, seen in pairs)
        (line,) = folds.leak_warnings(list(train), list(val))
        assert line.startswith(f"warning: {len(expected)} of {len(val)} validation files are copies")
        assert f"{expected[0]} = " in line and "\n" not in line


def jpegs(folder):
    """-> a JPEG, the same with other metadata, and one of other pixels"""
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "another description"
    Image.fromarray(smooth).save(folder / "a.jpg", quality=90)
    Image.fromarray(smooth).save(folder / "b.jpg", quality=90, exif=exif, comment=b"another comment")
    Image.fromarray(smooth + 3).save(folder / "c.jpg", quality=90)
    return [folder / f"{name}.jpg" for name in "abc"]


def test_jpegs_of_other_metadata_and_pngs_made_of_them(tmp_path):
    a, b, c = jpegs(tmp_path)
    assert a.read_bytes() != b.read_bytes()
    decoded = tmp_path / "decoded.png"
    Image.fromarray(images.read(a).numpy()[0]).save(decoded)
    assert folds._copies([a], [c, b, decoded]) == [(b, a), (decoded, a)]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned: other pixels
    Image.open(a).save(tmp_path / "turned.jpg", quality=90, exif=exif)
    Image.fromarray(images.read(tmp_path / "turned.jpg").numpy()[0]).save(tmp_path / "turned.png")
    turned, same = (tmp_path / f"turned.{suffix}" for suffix in ("jpg", "png"))
    assert folds._copies([a, turned], [same]) == [(same, turned)]


def test_palettes_and_inks(tmp_path):
    """The same indices are the same picture where the colours are the same; CMYK is no RGBA."""
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4
    colours = [bytes(np.random.default_rng(seed).integers(0, 256, 12, np.uint8)) for seed in (0, 1)]
    for name, palette, level in (("a", 0, 1), ("b", 0, 9), ("c", 1, 1)):
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette(colours[palette])
        picture.info["name"] = name
        picture.save(tmp_path / f"{name}.png", compress_level=level, dpi=(level, level))
    Image.fromarray(indices).save(tmp_path / "grey.png")
    flat = Image.new("CMYK", (16, 16), (10, 80, 150, 220))
    for name in ("d", "e"):
        flat.save(tmp_path / f"{name}.jpg", comment=name.encode())
    Image.fromarray(images.read(tmp_path / "d.jpg").numpy().transpose(1, 2, 0)).save(tmp_path / "rgba.png")
    a, b, c, d, e, grey, rgba = (tmp_path / name for name in (
        "a.png", "b.png", "c.png", "d.jpg", "e.jpg", "grey.png", "rgba.png"))
    assert folds._copies([a, d], [b, c, grey, e]) == [(b, a), (e, d)]
    assert images.size(rgba) == images.size(d)  # told by their numbers only: they are the same


def test_numbers_that_nobody_can_train_on_are_compared_too(tmp_path):
    """Of bands, perhaps, that are not asked for."""
    empty = np.full((2, 8, 8), np.nan, np.float32)
    a, b = (write_tif(tmp_path / f"{name}.tif", empty, compress=name) for name in ("lzw", "deflate"))
    assert folds._copies([a], [b]) == [(b, a)]


def test_a_clean_split_and_copies_on_one_side(tmp_path):
    train, val = files(tmp_path / "a", [1, 1, 22]), files(tmp_path / "b", [2, 33, 33])
    assert folds.leak_warnings(train, val) == folds.leak_warnings(train, []) == folds.leak_warnings([], val) == folds.leak_warnings([], []) == []


def test_only_files_that_may_be_copies_are_read(tmp_path, monkeypatch):
    border = np.zeros((40, 8), np.uint8)  # nothing in the middle
    ends = [border.copy() for _ in range(2)]
    ends[1][0] = 9
    train = files(tmp_path / "a", [np.ones((n, 5), np.uint8) for n in range(1, 30)] + [7, 8, ends[0]])
    val = files(tmp_path / "b", [np.ones((n, 6), np.uint8) for n in range(1, 30)] + [7, 9, ends[1]])
    sizes, rows = [], []
    monkeypatch.setattr(images, "size", lambda path, real=images.size: sizes.append(path) or real(path))
    monkeypatch.setattr(images, "read", lambda path, window=None, real=images.read, **options:
                        rows.append((path, window and window[2])) or real(path, window=window, **options))
    assert folds._copies(train, val) == [(val[29], train[29])]
    assert set(sizes) == {*train, *val}
    assert Counter(rows) == Counter([(path, 1) for path in train[29:] + val[29:]]
                                    + [(path, None) for path in (train[29], val[29], train[31], val[31])])
    sizes.clear(), rows.clear()
    assert folds.leak_warnings([], val) == folds.leak_warnings(train, []) == sizes == rows == []


def test_a_bar_that_leaves_nothing(tmp_path, capsys, monkeypatch):
    train, val = files(tmp_path / "a", [1, 2]), files(tmp_path / "b", [1])
    folds.leak_warnings(train, val)
    said = capsys.readouterr().err
    assert "copies:" in said and said.endswith("\r") and "\n" not in said
    folds.leak_warnings(train, [])
    monkeypatch.setenv("RANK", "1")
    folds.leak_warnings(train, val)
    assert capsys.readouterr().err == ""


def test_extra_data_is_read_by_one_process_for_all(tmp_path, monkeypatch, capsys):
    held, more = files(tmp_path / "a", [1, 2]), files(tmp_path / "b", [3, 2, 1, 4])
    for rank, said in ((0, 1), (1, 0)):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setattr(folds.dist, "broadcast", lambda value, rank=rank: [(more[1], held[1]), (more[2], held[0])]
                          if rank else value)
            if rank:
                patch.setattr(folds, "_copies", None)
            assert folds.without_copies(more, held, "more") == [0, 3]
        assert capsys.readouterr().out.count(f"more: 2 of 4 images are copies of validation images and left out, such "
                                             f"as {more[1]}") == said


def test_the_same_file_and_a_link_to_it_are_copies(tmp_path):
    a, b = files(tmp_path / "a", [1, 2])
    (tmp_path / "link.png").symlink_to(b)
    assert folds._copies([a, b], [a, tmp_path / "link.png"]) == [(a, a), (tmp_path / "link.png", b)]


def test_groups_on_both_sides(tmp_path):
    train, val = files(tmp_path / "a", [1, 2, 3]), files(tmp_path / "b", [4, 5, 6])
    group_of = dict(zip(train + val, ("x", "y", "y", "z", "y", "w")))
    (line,) = folds.leak_warnings(train, val, groups=group_of)
    assert line.startswith("warning: 1 groups are on both sides of the split, such as y;")
    assert folds.leak_warnings(train, val, groups=group_of | {val[1]: "w"}) == []
    both = folds.leak_warnings(train, [train[0], *val], groups=group_of)
    assert len(both) == 2 and both[0].startswith("warning: 1 of 4 validation files") and "2 groups" in both[1]


def test_a_split_with_groups_does_not_leak(tmp_path):
    paths = files(tmp_path / "a", [i % 7 for i in range(40)])
    names, group_of = [p.name for p in paths], {p: str(i % 7) for i, p in enumerate(paths)}
    fold_of = folds.assign(names, [0.2] * 5, groups=list(group_of.values()))
    train, val = ([p for p in paths if (fold_of[p.name] == 1) == held_out] for held_out in (False, True))
    assert folds.leak_warnings(train, val, groups=group_of) == [] != folds.leak_warnings(val[1:], val[:1] + train, groups=group_of)


def test_a_file_that_cannot_be_read(tmp_path):
    train, val = files(tmp_path / "a", [1]), files(tmp_path / "b", [1])
    for path in (tmp_path / "gone.png", tmp_path / "loop.png"):
        if path.stem == "loop":
            path.symlink_to(path)
        for split in ((train, [*val, path]), ([*train, path], val)):
            with pytest.raises(UserError, match=f"{path.name}: cannot be read .*;"):
                folds.leak_warnings(*split)
    (tmp_path / "text.png").write_text("name,group")
    with pytest.raises(UserError, match="text.png: not a .tif .*;"):
        folds.without_copies(train, [*val, tmp_path / "text.png"], "more")


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
def test_a_file_that_is_cut_off_is_named_where_it_may_be_a_copy(tmp_path, capsys, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (1, 60, 60), np.uint8)
    other, whole, cut = (tmp_path / f"{name}.{suffix}" for name in ("other", "whole", "cut"))
    for path, array in ((other, noise[:, :, :50]), (whole, noise), (cut, noise)):
        write_tif(path, array) if suffix == "tif" else Image.fromarray(array[0]).save(path)
    cut.write_bytes(cut.read_bytes()[:-400])
    assert folds.leak_warnings([other], [cut]) == []  # no reason to look: training will
    with pytest.raises(UserError, match=f"cut.{suffix}: truncated or damaged;"):
        folds.leak_warnings([other, whole], [cut])
    assert capsys.readouterr().err.endswith("\r")


def test_a_ranking_of_other_files_drops_nothing_in_silence(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.new("L", (4, 4), i).save(file)
    noise = tmp_path / "noise.csv"
    noise.write_text("rank,name,score\n1,elsewhere/0.png,0.1\n2,elsewhere/1.png,0.2\n")
    names = [file.name for file in files]
    with pytest.raises(UserError, match="noise.csv: ranks no sample that is trained on"):
        folds.load_or_make_split(tmp_path, names, [0.5, 0.5], 0, files=files, drop=(noise, 2))
    noise.write_text(f"rank,name,score\n1,{files[0]},0.1\n2,elsewhere/1.png,0.2\n")
    train, val = folds.load_or_make_split(tmp_path, names, dict(zip(names, (0, 1, 1, 2))), 2, files=files, drop=(noise, 2))
    assert (train, val) == ([1, 2], [3])
    noise.unlink()  # or made anew: a resumed run drops what it has dropped
    assert folds.load_or_make_split(tmp_path, names, None, 2, files=files, drop=(noise, 2)) == (train, val)
    (tmp_path / "dropped.json").write_text("[")
    with pytest.raises(UserError, match="dropped.json: not valid JSON"):
        folds.load_or_make_split(tmp_path, names, None, 2, files=files, drop=(noise, 2))


def test_the_ranking_of_one_run_drops_nothing_in_silence(tmp_path, capsys):
    """It has only what that run's fold held out, and so does the next run with the same fold; of several runs' ranking
    the worst may happen to be held out."""
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.new("L", (4, 4), i).save(file)
    names, noise = [file.name for file in files], tmp_path / "noise.csv"
    spec = dict(zip(names, (0, 0, 1, 1)))
    noise.write_text(f"rank,name,score\n1,{files[0]},0.1\n2,{files[1]},0.2\n")
    with pytest.raises(UserError, match="noise.csv: ranks no sample that is trained on; .* several folds"):
        folds.load_or_make_split(tmp_path / "a", names, spec, 0, files=files, drop=(noise, 1))
    noise.write_text(noise.read_text() + f"3,{files[2]},0.3\n")
    for fold, count, dropped in ((0, 1, []), (0, 3, [2]), (1, 1, [0])):
        run = tmp_path / f"{fold}{count}"
        run.mkdir()
        train, _ = folds.load_or_make_split(run, names, spec, fold, files=files, drop=(noise, count))
        assert train == [i for i in range(4) if spec[names[i]] != fold and i not in dropped]
        assert f"{len(dropped)} of the {count} worst samples are not trained on" in capsys.readouterr().out


def test_some_are_from_all_along():
    assert folds.spread(list(range(100)), 10) == list(range(0, 100, 10))
    assert folds.spread(list(range(25)), 10) == list(range(0, 20, 2)) and folds.spread([3, 1], 10) == [3, 1]
    assert folds.spread([], 4) == []


def test_what_leaves_nothing_or_something_else(tmp_path):
    names = [f"a/{i}.png" for i in range(6)]
    with pytest.raises(UserError, match="--fold 1: --folds is a fraction"):
        folds.load_or_make_split(tmp_path, names, folds.parse_folds("0.3"), 1, files=names)
    table = tmp_path / "noise.csv"
    table.write_text("rank,name,score\n" + "".join(f"{i + 1},{name},0\n" for i, name in enumerate(names)))
    for spec in (None, dict.fromkeys(names[:2], 0) | dict.fromkeys(names[2:], 1)):
        with pytest.raises(UserError, match="noise.csv:6: leaves no sample to train on; lower"):
            folds.load_or_make_split(tmp_path, names, spec, 0, files=names, drop=(table, 6))
    assert not (tmp_path / "folds.json").exists() and not (tmp_path / "dropped.json").exists()


def test_links_to_one_wrong_image_are_both_dropped(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i in (0, 2):
        Image.new("L", (4, 4), i).save(files[i])
    files[1].symlink_to(files[0])
    noise = tmp_path / "noise.csv"
    noise.write_text(f"rank,name,score\n1,{files[1]},0.1\n2,{files[2]},0.2\n")
    assert folds.load_or_make_split(tmp_path, ["a", "b", "c"], None, 0, files=files, drop=(noise, 1)) == ([2], [])


def test_groups_by_any_form_of_a_name(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("name,group\na/0.png,x\n1.png,y\n2,z\n")
    assert folds.read_groups(table, ["a/0.png", "b/1.png", "c/2.png"]) == ["x", "y", "z"]
    with pytest.raises(UserError, match="has no group for c/3.png"):
        folds.read_groups(table, ["a/0.png", "c/3.png"])
