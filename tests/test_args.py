"""utils/train/args.py: every wrong flag is answered in one line with exit code 2; what --resume keeps and reports."""
import argparse
import json
import os

import pytest

from tests.harness import toy
from tests.test_runs import free, give_locks_back, no_torchrun  # noqa: F401 (fixtures)
from utils.errors import UserError
from utils.train import checkpoint, dist
from utils.train.args import band_list, begin_run, float_range, int_range, loss_term, setup_run, train_parser

PARSER = train_parser("Toy.", "toy", epochs=3, bs=4, imgsz=16, lr=0.1)
TEXTS = {"drop_noisy", "bands"}  # with types, and no numbers
NUMBERS = {a.option_strings[0]: a for a in PARSER._actions if a.type and not a.nargs and a.dest not in TEXTS}
CHOICES = {a.option_strings[0]: a for a in PARSER._actions if a.choices}
STATE = {"task": "toy", "arch": {}, "model": {}, "optimizer": {}, "step": 5}
POSITIVE = {"--epochs", "--bs", "--accumulate", "--imgsz", "--period"}  # integers of which zero makes no sense


def refused(capsys, parse, *argv):
    with pytest.raises(SystemExit) as caught:
        parse([*argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def test_there_are_flags_to_try():
    assert POSITIVE | {"--lr", "--seed", "--swa-lr", "--cutout"} <= NUMBERS.keys() and "--amp" in CHOICES


@pytest.mark.parametrize("flag", sorted(NUMBERS))
def test_numbers_that_make_no_sense(capsys, flag):
    wrong = ["x", "", " ", "nan", "inf", "-inf", "NaN", "-1", "-0.5", "1e400", "9" * 5000, "1e30", "10**3", "0x10",
             "1 2", "-1\n", "x\ny", "²", "\x00"] + ["1,5"] * (flag != "--pixel-scale")  # that takes one per band
    wrong += ["0", "0.5", "1e3"] if flag in POSITIVE else ["0"] if flag in ("--pixel-scale", "--cutout-size") else []
    for value in wrong:
        error = refused(capsys, PARSER.parse_args, f"{flag}={value}")
        assert flag in error
    assert flag in refused(capsys, PARSER.parse_args, flag)
    refused(capsys, PARSER.parse_args, flag, "--ema")


@pytest.mark.parametrize("flag", sorted(CHOICES))
def test_choices(capsys, flag):
    for value in ("", "x", "1", "x\ny"):
        assert flag in refused(capsys, PARSER.parse_args, f"{flag}={value}")
    refused(capsys, PARSER.parse_args, flag)


def test_other_mistakes(capsys):
    for argv in (["--nonsense"], ["stray"], ["stray\nlines"], ["--ema=1"], ["--no-ema", "x"], ["--data"], ["--name"],
                 ["--tensorboard=yes"], ["--e", "3"], ["--", "-x"]):
        refused(capsys, PARSER.parse_args, *argv)


def test_numbers_that_do():
    args = PARSER.parse_args("--lr 1e-3 --epochs 1000000 --seed 0 --clip 0 --warmup-epochs 0.5 --workers 0".split())
    assert (args.lr, args.epochs, args.seed, args.clip, args.warmup_epochs, args.workers) == (1e-3, 10**6, 0, 0, 0.5, 0)
    assert PARSER.parse_args(["--seed", str(2**31)]).seed == 2**31
    assert int_range(2, 3)("3") == 3 and float_range(-1, 1)("-1") == -1.0


def test_bands():
    assert band_list("all") is None and band_list("1-3") == [1, 2, 3] and band_list("7,5,3") == [7, 5, 3]
    assert band_list("1-2,9,4-4") == [1, 2, 9, 4]
    for text in ("", "x", "0", "0-3", "-3", "3-", "1--2", "5-3", "1,5-3", "1,,2", "1-99999999999", "65536", "1.5",
                 "nan", "1-65535,99999999999-999999999999"):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            band_list(text)


def test_loss_terms():
    parse = loss_term(("bce", "lovasz"))
    assert parse("bce") == ("bce", 1.0) and parse("lovasz=0.25") == ("lovasz", 0.25)
    for text in ("", "x", "bce=x", "bce=-1", "bce=nan", "bce=inf", "=1", "bce=1=2"):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            parse(text)


def test_a_process_says_it_in_one_line_too(tmp_path):
    run = toy(tmp_path, "--lr", "nan", code=2)
    assert len(run.err) == 1 and run.err[0].startswith("error: argument --lr: nan is not") and run.out == ""


# ---- from the flags to the run ---------------------------------------------------------------------------------------
def opened(tmp_path, *argv):
    free()
    return setup_run(PARSER, ["--project", str(tmp_path), "--device", "cpu", *argv])


def saved(tmp_path, *argv):
    """A run that was started with these flags and has saved a checkpoint."""
    args, _, folder, state = opened(tmp_path, *argv)
    assert state is None
    checkpoint.save(folder / "last.pt", STATE | {"args": vars(args)})
    return args


def test_a_new_run_has_its_flags_written_down(tmp_path, capsys):
    args, device, folder, state = opened(tmp_path, "--lr", "0.5", "--name", "größe 1")
    assert folder == tmp_path / "größe 1" and device.type == "cpu" and state is None
    assert json.loads((folder / "args.json").read_text()) == vars(args) and args.lr == 0.5 and args.epochs == 3
    assert capsys.readouterr().out == f"run: {folder}\n"


def test_a_resumed_run_keeps_its_flags_and_reports_new_ones(tmp_path, capsys):
    saved(tmp_path, "--lr", "0.5", "--no-ema", "--bs", "8")
    capsys.readouterr()
    args, _, folder, state = opened(tmp_path, "--resume", "--weight-decay", "0.2", "--bs", "8", "--ema")
    assert (args.lr, args.weight_decay, args.bs, args.ema, state["step"]) == (0.5, 0.2, 8, True, 5)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["--ema: True instead of the run's False", "--weight-decay: 0.2 instead of the run's 0.01",
                             f"resuming: {folder} at step 5"]
    assert json.loads((folder / "args.json").read_text())["weight_decay"] == 0.01  # engine.fit's, once it has begun


@pytest.mark.parametrize("flags", [["--folds", "3"], ["--fold", "1"], ["--weights", "other.pt"]])
def test_a_resumed_run_keeps_its_split_and_its_start(tmp_path, flags):
    saved(tmp_path, "--folds", "5")
    with pytest.raises(UserError, match=f"^{flags[0]}: a resumed run keeps its own"):
        opened(tmp_path, "--resume", *flags)
    opened(tmp_path, "--resume", "--folds", "5", "--fold", "0")  # as it was


def test_flags_that_the_run_did_not_know_get_their_defaults(tmp_path):
    saved(tmp_path)
    state = checkpoint.load(tmp_path / "exp" / "last.pt")
    del state["args"]["clip"]
    state["args"]["removed"] = 1
    checkpoint.save(tmp_path / "exp" / "last.pt", state)
    args, *_ = opened(tmp_path, "--resume")
    assert args.clip == 0.0 and not hasattr(args, "removed")


def test_the_device_is_chosen_anew(tmp_path, capsys):
    saved(tmp_path)
    state = checkpoint.load(tmp_path / "exp" / "last.pt")
    state["args"]["device"] = "cuda:3"
    checkpoint.save(tmp_path / "exp" / "last.pt", state)
    capsys.readouterr()
    args, device, *_ = opened(tmp_path, "--resume")
    assert args.device == device.type == "cpu" and "--device" not in capsys.readouterr().out


def test_what_waits_for_a_score_needs_a_validation(tmp_path):
    for folds in ("0", "0.0"):
        for flags, named in ((["--patience", "3"], "--patience"), (["--schedule", "plateau"], "--schedule plateau")):
            with pytest.raises(UserError, match=f"{named}: does nothing with --folds 0.*;"):
                opened(tmp_path, "--folds", folds, *flags)
    assert not list(tmp_path.iterdir())
    saved(tmp_path, "--folds", "0.2", "--patience", "3", "--schedule", "plateau")
    opened(tmp_path, "--folds", "split.json", "--patience", "3")


def test_flags_that_do_nothing_in_a_resumed_run(tmp_path):
    """They are held against the run's own flags."""
    with pytest.raises(UserError, match="--fold: does nothing with --folds 0"):
        opened(tmp_path, "--folds", "0", "--fold", "3")
    saved(tmp_path, "--folds", "0")
    for flags, says in ((["--patience", "3"], "--patience: does nothing with --folds 0"),
                        (["--schedule", "plateau"], "--schedule plateau: does nothing with --folds 0"),
                        (["--swa-lr", "0.5"], "--swa-lr: does nothing without --swa")):
        with pytest.raises(UserError, match=says):
            opened(tmp_path, "--resume", str(tmp_path / "exp"), *flags)
    state = checkpoint.load(tmp_path / "exp/last.pt")
    state["args"]["fold"] = 3  # of a run from before this was refused: it is not asked for again
    checkpoint.save(tmp_path / "exp/last.pt", state)
    args, *_ = opened(tmp_path, "--resume", str(tmp_path / "exp"), "--swa", "0.5", "--swa-lr", "0.5")
    assert args.swa == args.swa_lr == 0.5


# ---- what is refused, and when --------------------------------------------------------------------------------------
def test_refused_flags_leave_no_run_folder(tmp_path, monkeypatch):
    """Neither the script's own check nor the shared ones; nor do they wait for the other processes."""
    monkeypatch.setattr(dist, "setup", lambda *_: pytest.fail("the process group was joined"))

    def check(args):
        raise UserError("--x: refused; leave it out")

    for argv, words in (([], "--x: refused"), (["--swa-lr", "0.5"], "--swa-lr: does nothing without --swa"),
                        (["--cutout-size", "0.3"], "--cutout-size: does nothing without --cutout"),
                        (["--folds", "0", "--fold", "1"], "--fold: does nothing")):
        with pytest.raises(UserError, match=words):
            setup_run(PARSER, ["--project", str(tmp_path), *argv], check=check)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--bs 4: not divisible by the 3 processes"):
        setup_run(PARSER, ["--project", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_flags_of_a_resumed_run_are_checked_together(tmp_path):
    """What the run had, with what is given now."""
    seen = []

    def check(args):
        seen.append((args.lr, args.clip))
        if args.clip > 3:
            raise UserError("--clip: too large; lower it")

    saved(tmp_path, "--lr", "0.5")
    free()
    setup_run(PARSER, ["--project", str(tmp_path), "--device", "cpu", "--resume", "--clip", "2"], check=check)
    free()
    with pytest.raises(UserError, match="--clip: too large"):
        setup_run(PARSER, ["--project", str(tmp_path), "--device", "cpu", "--resume", "--clip", "4"], check=check)
    assert seen == [(0.5, 2.0), (0.5, 4.0)] and os.listdir(tmp_path) == ["exp"]
    assert json.loads((tmp_path / "exp/args.json").read_text())["clip"] == 0.0


@pytest.mark.parametrize("old, now", [
    ({"scale": 10000.0, "presence": 0.5, "cutout": 0.25}, {"pixel_scale": 10000.0, "aux_cls": 0.5, "cutout": 0.25}),
    ({"scale": None}, {"pixel_scale": None, "cutout_size": 0.5}),
    ({"band_scale": 255.0, "scale": 0.9}, {"pixel_scale": 255.0, "scale": 0.9}),
    ({"scale": 255.0, "net": "x", "cutout": 0.3}, {"pixel_scale": 255.0, "cutout": 0.5, "cutout_size": 0.3}),
    ({"scale": 255.0, "net": "x", "cutout": 0.0}, {"cutout": 0.0, "cutout_size": 0.5}),
    ({"pixel_scale": None, "flip": 0.25}, {"hflip": 0.25, "vflip": 0.25}),
    ({"band_scale": 255.0, "scale": 0.25, "hsv": [0.1, 0.2, 0.3], "flip_lr": 0.5, "flip_ud": 0.1, "degrees": 3.0},
     {"pixel_scale": 255.0, "zoom": [0.75, 1.25], "hue": 0.1, "saturation": 0.2, "value": 0.3, "hflip": 0.5,
      "vflip": 0.1, "degrees": 3.0})])
def test_flags_of_earlier_editions(tmp_path, old, now):
    """Those of segmentation, detection (whose --scale is a zoom) and classification (whose --cutout was a side)."""
    parser = train_parser("Toy.", "toy", epochs=3, bs=4, imgsz=16, lr=0.1)
    parser.add_argument("--aux-cls", type=float, default=0.0)
    parser.add_argument("--net", default="y")
    if "band_scale" in old:
        parser.add_argument("--scale", type=float, default=0.5)
    saved(tmp_path)
    state = checkpoint.load(tmp_path / "exp/last.pt")
    state["args"] = {k: v for k, v in state["args"].items() if k not in ("pixel_scale", "cutout_size")} | old
    checkpoint.save(tmp_path / "exp/last.pt", state)
    free()
    args, *_ = setup_run(parser, ["--project", str(tmp_path), "--device", "cpu", "--resume"])
    assert vars(args).items() >= now.items() and not vars(args).keys() & {"band_scale", "presence"}
    assert "scale" in vars(args) or "band_scale" not in old


def test_a_script_with_two_runs(tmp_path, monkeypatch, capsys):
    """Restarted by torchrun, each of them goes on in its folder with its flags."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def script(first_ends=True):
        args, _, folder, state = opened(tmp_path, "--lr", "0.5")
        if not first_ends:
            return folder, state
        checkpoint.save(folder / "last.pt", STATE | {"args": vars(args)})
        args = argparse.Namespace(**vars(args) | {"name": f"{folder.name}-second", "lr": 0.25})
        args, other, second = begin_run(PARSER, args)
        if second is None:
            checkpoint.save(other / "last.pt", STATE | {"args": vars(args) | {"clip": 1.0}, "step": 7})
        return folder, state, other, second and second["step"], args.lr, args.clip

    assert script() == (tmp_path / "exp", None, tmp_path / "exp-second", None, 0.25, 0.0)
    assert json.loads((tmp_path / "exp-second/args.json").read_text())["lr"] == 0.25
    folder, state, *second = script()
    assert (folder, state["step"]) == (tmp_path / "exp", 5) and second == [tmp_path / "exp-second", 7, 0.25, 1.0]
    monkeypatch.setattr(os, "getppid", lambda: 123456789)  # another torchrun
    assert script(first_ends=False) == (tmp_path / "exp2", None)


def test_devices_that_are_not_there(tmp_path):
    for device in ("cuda:99", "nonsense", "", "cpu:x", "meta", "xpu", "cuda:-1", "mps:7", "a\nb"):
        with pytest.raises(UserError) as caught:
            opened(tmp_path, "--device", device)
        assert f"--device {device}" in str(caught.value)
    assert not list(tmp_path.iterdir())
