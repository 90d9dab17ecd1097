"""utils/train/engine.py and state.py: the loop against one written by hand, its records, and what it does not save."""
import contextlib
import copy
import csv
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from data.loader import eval_loader, train_loader
from tests.harness import differences, read
from tests.toy import Data, Faults, Net, make_evaluate, make_loss
from utils.errors import NumericalError, Stopped, UserError
from utils.pictures import charts
from utils.train import checkpoint, dist, engine, optim
from utils.train.loggers import Progress
from utils.train.state import State, autocast, precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if "row_per_epoch" not in request.node.name:
        monkeypatch.setattr(charts, "plot_curves", lambda *_, **__: None)  # half of a toy epoch's time


def train(folder, *, epochs=2, size=26, bs=4, seed=0, lr=0.02, optimizer="adamw", momentum=0.9, weight_decay=0.01,
          schedule="cosine", period=10, total=None, dropout=0.3, net=None, ema=True, faults=(), evaluate="toy",
          compute_loss=None, resume=False, workers=0, swa=None, **options):
    """engine.fit on the toy data. `total`: epochs that schedule and average reckon with. Returns the state."""
    folder.mkdir(exist_ok=True)
    faults = Faults(faults)
    torch.manual_seed(seed)
    model = net or Net(dropout=dropout)
    loader = train_loader(Data(size, seed, faults), bs, workers=workers, seed=seed)
    steps = math.ceil(len(loader) / options.get("accumulate", 1))
    optimizer = optim.make_optimizer(optimizer, optim.param_groups(model, weight_decay), lr=lr, momentum=momentum)
    if isinstance(schedule, str):
        schedule = optim.make_schedule(schedule, steps_per_epoch=steps, epochs=total or epochs, period=period)
    if evaluate == "toy":
        evaluate = make_evaluate(eval_loader(Data(10), 4), CPU, faults)
    kept = {k: options.pop(k) for k in ("amp", "accumulate", "clip", "compile") if k in options}
    state = State(model, optimizer, schedule, device=CPU, swa=swa,
                  ema=optim.make_ema(model, steps * (total or epochs)) if ema else None, **{"amp": "off"} | kept)
    engine.fit(state, loader, compute_loss or make_loss(faults), evaluate, folder=folder, epochs=epochs, seed=seed,
               header={"task": "toy", "arch": {"name": "Net"}, "args": {}},
               resume=checkpoint.load(folder / "last.pt") if resume else None, **options)
    return state


def weights(state):
    return {k: v.clone() for k, v in state.model.state_dict().items()}


def given_scores(*scores):
    """An evaluate() that returns these scores, one per call."""
    scores = iter(scores)
    return lambda model: {"score": next(scores), "other": 1.0}


# ---- the steps -------------------------------------------------------------------------------------------------------
def by_hand(*, epochs, size, bs, accumulate, lr, optimizer, clip, factors, seed=0, decay=0.1, width=8):
    """The same training, written out for one batch after the other in float64. Returns weights and EMA inputs."""
    torch.manual_seed(seed)
    net = Net(dropout=0).double()
    decays = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    opt = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True) if optimizer == "sgd" else \
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
    data, step, trail = Data(size, seed), 0, []
    for epoch in range(epochs):
        order = list(np.random.default_rng((seed, epoch)).permutation(size))
        count = -(-size // bs)
        order += [index + size for index in order][:count * bs - size]
        batches = [order[i * bs:(i + 1) * bs] for i in range(count)]
        net.train()
        for i in range(0, count, accumulate):
            window = batches[i:i + accumulate]
            opt.zero_grad()
            for batch in window:
                samples = [data[epoch, int(index)] for index in batch]
                error = net(torch.stack([s["image"] for s in samples]).double()) - \
                    torch.stack([s["target"] for s in samples])
                (error.square().mean() / len(window)).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            for group in opt.param_groups:
                group["lr"] = lr * factors[step]
            opt.step()
            step += 1
            trail.append(copy.deepcopy(net.state_dict()))
    return net.state_dict(), trail


def double_loss(model, batch):
    return (model(batch["image"].double()) - batch["target"]).square().mean(), {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate, clip", [(1, 0.0), (3, 0.0), (3, 0.05), (7, 0.0), (100, 0.0)])
def test_equals_a_loop_written_by_hand(tmp_path, optimizer, accumulate, clip):
    """7 batches in windows of 3 are 3 steps, and the last, a window of one, counts as much as the others."""
    steps = 2 * math.ceil(7 / accumulate)
    factors = list(np.linspace(1, 0.1, steps))
    calls = []

    def schedule(step, scores):
        calls.append((step, list(scores)))
        return factors[step]

    torch.manual_seed(0)
    state = train(tmp_path, optimizer=optimizer, accumulate=accumulate, clip=clip, schedule=schedule, weight_decay=0.1,
                  lr=0.1, net=Net(dropout=0).double(), compute_loss=double_loss, evaluate=given_scores(3, 4))
    expected, trail = by_hand(epochs=2, size=26, bs=4, accumulate=accumulate, lr=0.1, optimizer=optimizer, clip=clip,
                              factors=factors)
    assert state.step == steps == len(trail)
    assert calls == [(i, [] if i < steps // 2 else [3]) for i in range(steps)]
    # Adam blows up the rounding errors that are the gradients of biases in front of a batch norm
    tolerance = {"rtol": 0, "atol": 1e-12 if optimizer == "sgd" else 1e-8}
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], **tolerance)

    average = trail[0]  # the average's definition, from utils.optim's docstring
    for n, now in enumerate(trail[1:], 1):
        weight = 1 / min(10_000, max(steps / 20, 1), 1 + n / 5)
        average = {k: v + (now[k] - v) * weight if v.is_floating_point() else now[k] for k, v in average.items()}
    for name, value in state.ema.module.state_dict().items():
        torch.testing.assert_close(value, average[name], **tolerance)


def test_the_average_is_judged_and_the_raw_weights_are_trained(tmp_path):
    judged = []

    def evaluate(model):
        assert not model.training and torch.is_inference_mode_enabled()
        judged.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"score": 1.0}

    state = train(tmp_path, evaluate=evaluate, epochs=30, total=60)
    saved = read(tmp_path / "last.pt")
    assert differences(judged[-1], dict(saved["ema"])) == [] and differences(weights(state), dict(saved["model"])) == []
    assert not torch.equal(saved["ema"]["conv1.weight"], saved["model"]["conv1.weight"])
    assert saved["ema_steps"] == state.step == 30 * 7
    judged.clear()
    train(tmp_path, evaluate=evaluate, ema=False)
    assert differences(judged[-1], dict(read(tmp_path / "last.pt")["model"])) == []


def test_clipping_limits_the_gradient_of_the_step(tmp_path):
    before = Net(dropout=0).double()
    for clip in (1e-3, 0.0):
        net = copy.deepcopy(before)
        train(tmp_path, optimizer="sgd", momentum=0.0, lr=1.0, weight_decay=0, clip=clip, size=4, epochs=1, net=net,
              compute_loss=double_loss, schedule="constant", evaluate=None)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(net.parameters(), before.parameters())))
        assert moved == pytest.approx(1e-3, rel=1e-2) if clip else moved > 1e-2


def test_what_validation_draws_does_not_change_the_training(tmp_path):
    def evaluate(model):
        torch.rand(1234), np.random.rand(99)
        return {"score": 0.0}

    state, other = train(tmp_path / "a", evaluate=evaluate), train(tmp_path / "b", evaluate=None)
    assert differences(weights(state), weights(other)) == []
    third = train(tmp_path / "c", evaluate=None, seed=1)
    assert differences(weights(state), weights(third)) != []


def test_dropout_is_drawn_anew_in_every_batch_and_epoch(tmp_path):
    seen = []

    def compute_loss(model, batch):
        seen.append(torch.rand(4).tolist())
        return model(batch["image"]).square().mean(), {}

    train(tmp_path, compute_loss=compute_loss, evaluate=None, epochs=2)
    assert len(seen) == 14 and len({tuple(s) for s in seen}) == 14


# ---- records ---------------------------------------------------------------------------------------------------------
def test_a_row_per_epoch_with_the_mean_losses(tmp_path):
    losses = iter(range(1, 1000))

    def compute_loss(model, batch):
        return model(batch["image"]).sum() * 0 + next(losses), {"part": torch.tensor(2.0), "number": 3}

    state = train(tmp_path, epochs=3, evaluate=given_scores(0.5, 0.25, 0.75), compute_loss=compute_loss)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "lr", "loss", "part", "number", "score", "other", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [4, 11, 18]  # means of 1..7, 8..14, 15..21
    assert [float(row["part"]) for row in rows] == [2, 2, 2] and [float(row["number"]) for row in rows] == [3, 3, 3]
    assert [float(row["score"]) for row in rows] == [0.5, 0.25, 0.75] == state.scores
    assert float(rows[-1]["lr"]) == pytest.approx(state.optimizer.param_groups[0]["lr"], rel=1e-5)
    assert (tmp_path / "results.png").stat().st_size > 1000


@pytest.mark.parametrize("scores, best, epochs", [
    ([1, 3, 3, 2, 0], 2, 5), ([-5, -6, -5], 1, 3), ([0, 0, 0], 1, 3), ([float("nan"), 1, 2, float("nan"), 1], 3, 5),
    ([1, float("nan"), 0.5], 1, 3)])
def test_best_is_the_first_best(tmp_path, scores, best, epochs):
    train(tmp_path, epochs=epochs, size=8, evaluate=given_scores(*scores), save_period=1)
    assert differences(read(tmp_path / "best.pt"), read(tmp_path / f"epoch_{best}.pt")) == []


@pytest.mark.parametrize("faults", [(), ("nan@batch:3",), ("term@batch:3",)])
def test_boards_are_closed_however_the_run_ends(tmp_path, faults):
    """They flush once in a while only, and what they have lost no resumed run sends again."""
    told = []
    loggers = [(lambda row, step: told.append(step), lambda: told.append("closed"))]
    with contextlib.suppress(NumericalError, Stopped):
        train(tmp_path, epochs=1, loggers=loggers, faults=faults)
    assert told == ([] if faults else [1]) + ["closed"]


@pytest.mark.parametrize("scores, patience, epochs", [
    ([1, 2, 2, 1], 2, 4), ([1, 2, 3, 4, 5, 6], 1, 6), ([3, 2], 1, 2), ([3, 2, 1, 0, 0, 0], 0, 6), ([1, 1, 1, 1], 3, 4),
    ([float("nan"), 1, 2, 1, 1], 2, 5)])
def test_patience_counts_epochs_without_a_better_score(tmp_path, scores, patience, epochs):
    state = train(tmp_path, epochs=6, size=8, evaluate=given_scores(*scores, *[0] * 9), patience=patience)
    assert len(state.history) == epochs
    again = train(tmp_path, epochs=6, size=8, evaluate=given_scores(), patience=patience, resume=True)
    assert again.step == state.step  # a run that has ended so does not go on


def test_the_score_and_the_threshold_are_stored(tmp_path):
    """The first key names the score, wherever "threshold" stands; a resumed run keeps the threshold until it evaluates."""
    thresholds = iter((0.25, [0.5, 0.75], None))

    def evaluate(model):
        return {"threshold": next(thresholds), "dice": 0.5, "iou": 0.25}

    def stored(*names):
        return [(state["score"], state["threshold"]) for state in map(read, (tmp_path / name for name in names))]

    state = train(tmp_path, epochs=1, evaluate=evaluate)
    assert stored("last.pt", "best.pt") == [("dice", 0.25)] * 2 and state.scores == [0.5]
    assert "threshold" not in state.history[0] and list(state.history[0])[-3:] == ["dice", "iou", "seconds"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"score": "dice"}
    with pytest.raises(Stopped):
        train(tmp_path, epochs=2, evaluate=evaluate, resume=True, faults=["term@batch:3"])
    assert stored("last.pt") == [("dice", 0.25)]
    train(tmp_path, epochs=2, evaluate=evaluate, resume=True)
    assert stored("last.pt", "best.pt") == [("dice", [0.5, 0.75]), ("dice", 0.25)]  # as good is not better
    train(tmp_path, epochs=3, evaluate=None, resume=True)
    assert stored("last.pt") == [("dice", [0.5, 0.75])]
    train(tmp_path, epochs=4, evaluate=evaluate, resume=True)
    assert stored("last.pt") == [("dice", None)]


def test_a_resumed_run_may_rank_by_another_of_its_metrics(tmp_path):
    def scores(*pairs, first):
        pairs = iter(pairs)
        return lambda model: dict(zip(("a", "b") if first == "a" else ("b", "a"), next(pairs)))

    train(tmp_path, epochs=2, evaluate=scores((1, 9), (2, 5), first="a"))
    state = train(tmp_path, epochs=3, evaluate=scores((6, 3), first="b"), resume=True)
    assert state.scores == [9, 5, 6] and read(tmp_path / "best.pt")["step"] == 14  # the third is not the best by b
    assert json.loads((tmp_path / "run.json").read_text()) == {"score": "b"}


def test_save_period(tmp_path):
    train(tmp_path, epochs=5, size=8, save_period=2)
    assert sorted(f.name for f in tmp_path.glob("*.pt*")) == ["best.pt", "epoch_2.pt", "epoch_4.pt", "last.pt",
                                                              "last.pt.prev"]
    assert [len(read(tmp_path / f"epoch_{n}.pt")["history"]) for n in (2, 4)] == [2, 4]


def test_without_validation_there_are_no_scores_and_no_best(tmp_path):
    state = train(tmp_path, evaluate=None, patience=1, epochs=3)
    assert state.scores == [] and len(state.history) == 3
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.pt", "last.pt.prev", "results.csv"]


def test_long_epochs_are_saved_within(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_MINUTES", 0)
    steps = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state, **options: steps.append(state["step"]))
    train(tmp_path, epochs=1, evaluate=None, accumulate=3)
    assert steps == [1, 2, 3, 3]


def test_progress_shows_the_mean_loss(tmp_path, capfd):
    """Once a second, which is when the numbers are checked."""
    state = train(tmp_path, epochs=1, evaluate=None)
    state.sums = {"loss": torch.tensor(5.0)}
    with Progress("epoch 1/1", train_loader(Data(26), 4), 2) as progress:
        progress.show(state, 3)
        progress.refresh()
        assert "12/28" in (bar := capfd.readouterr().err) and "loss" not in bar
        progress.shown -= 2
        progress.show(state, 4)
        progress.show(state, 5)
        progress.refresh()
        bar = capfd.readouterr().err
        assert "epoch 1/1" in bar and f"loss 1.25, lr {state.lr:.2g}, " in bar and "20/28" in bar
        state.finite.fill_(False)
        progress.show(state, 6)
        progress.shown -= 2
        with pytest.raises(NumericalError):
            progress.show(state, 7)


# ---- resume ----------------------------------------------------------------------------------------------------------
def stop_at(folder, batch, monkeypatch, **options):
    """Trains until SIGTERM comes in the given batch."""
    with pytest.raises(Stopped) as caught:
        train(folder, faults=[f"term@batch:{batch}"], **options)
    assert caught.value.code == 143


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_stopped_at_any_batch_ends_with_the_same_bits(tmp_path, monkeypatch, amp):
    stopped_at(tmp_path, (1, 3, 7, 8, 14), monkeypatch, amp)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_stopped_at_every_batch_ends_with_the_same_bits(tmp_path, monkeypatch, amp):
    stopped_at(tmp_path, range(1, 15), monkeypatch, amp)


def stopped_at(tmp_path, batches, monkeypatch, amp):
    options = dict(amp=amp, accumulate=3, clip=1.0, period=1, schedule="plateau")
    train(tmp_path / "straight", **options)
    for batch in batches:
        folder = tmp_path / f"stopped{batch}"
        stop_at(folder, batch, monkeypatch, **options)
        done = read(folder / "last.pt")["step"]
        assert done == sum(batch > n for n in (0, 3, 6, 7, 10, 13))  # at the end of the window that it came in
        train(folder, **options, resume=True)
        assert differences(read(tmp_path / "straight" / "last.pt"), read(folder / "last.pt")) == []
        assert differences(read(tmp_path / "straight" / "best.pt"), read(folder / "best.pt")) == []


def test_the_loss_scale_is_restored(tmp_path, monkeypatch):
    """Overflow at the second step halves fp16's scale; a resumed run has to go on with that."""
    options = dict(amp="fp16", epochs=1)
    with pytest.raises(Stopped):
        train(tmp_path, faults=["term@sample:16"], compute_loss=overflowing(2), **options)
    scale = read(tmp_path / "last.pt")["scaler"]["scale"]
    assert scale == 2.0 ** 15 and read(tmp_path / "last.pt")["scaler"]["_growth_tracker"] == 2
    state = train(tmp_path, resume=True, **options)
    assert state.scaler.get_scale() == scale and state.scaler.state_dict()["_growth_tracker"] == 5


def overflowing(*at):
    """A loss whose gradients (not itself) are infinite in the given batches."""
    loss, count = make_loss(), [0]

    def compute_loss(model, batch):
        count[0] += 1
        value, parts = loss(model, batch)
        if count[0] in at:
            value = value + (model.head.bias * 0).abs().sqrt().sum()  # its slope at 0 is infinite
        return value, parts
    return compute_loss


def test_a_scale_that_has_fallen_to_nothing_ends_the_run(tmp_path):
    with pytest.raises(NumericalError):
        train(tmp_path, amp="fp16", size=160, epochs=1, compute_loss=overflowing(*range(1, 100)), evaluate=None)
    assert not (tmp_path / "last.pt").exists()


def test_more_epochs_than_before(tmp_path):
    options = dict(schedule="constant", ema=False)
    train(tmp_path / "a", epochs=4, **options)
    train(tmp_path / "b", epochs=2, **options)
    state = train(tmp_path / "b", epochs=4, resume=True, **options)
    assert len(state.history) == 4 and [row["epoch"] for row in state.history] == [1, 2, 3, 4]
    assert differences(read(tmp_path / "a" / "last.pt"), read(tmp_path / "b" / "last.pt")) == []


def test_a_finished_run_resumed_changes_nothing_and_mends_its_table(tmp_path):
    train(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    table = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").write_text("epoch\n1\n")  # as left by a kill between checkpoint and table
    state = train(tmp_path, resume=True, evaluate=None)
    assert len(state.history) == 2 and (tmp_path / "last.pt").read_bytes() == before
    assert (tmp_path / "results.csv").read_text() == table


def test_new_settings_count_in_a_resumed_run(tmp_path):
    options = dict(schedule="constant", ema=False)
    train(tmp_path, **options)
    groups = train(tmp_path, resume=True, epochs=3, lr=0.5, weight_decay=0.7, **options).optimizer.param_groups
    assert [g["lr"] for g in groups] == [0.5] * 3 and [g["weight_decay"] for g in groups] == [0.7, 0, 0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_another_momentum_counts_in_a_resumed_run(tmp_path, optimizer):
    """As much as if the optimizer of the checkpoint had had it; the lr of the last step is the table's still."""
    options = dict(optimizer=optimizer, ema=False, total=3)
    train(tmp_path / "a", epochs=2, momentum=0.9, **options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    kept = train(tmp_path / "a", resume=True, epochs=3, momentum=0.9, **options)
    changed = train(tmp_path / "b", resume=True, epochs=3, momentum=0.5, **options)
    for group in changed.optimizer.param_groups:
        assert (group["momentum"] if optimizer == "sgd" else group["betas"][0]) == 0.5
    assert differences(weights(kept), weights(changed))
    assert [row["lr"] for row in changed.history] == [row["lr"] for row in kept.history]


@pytest.mark.parametrize("before, after", [("adamw", "sgd"), ("sgd", "adamw"), ("adamw", "adam"), ("adam", "adamw")])
def test_another_optimizer_is_refused(tmp_path, before, after):
    train(tmp_path, optimizer=before)
    with pytest.raises(UserError, match="--optimizer") as caught:
        train(tmp_path, optimizer=after, resume=True, epochs=3)
    assert "\n" not in str(caught.value)


def test_another_number_of_steps_is_refused(tmp_path):
    train(tmp_path)
    for other in (dict(bs=8), dict(accumulate=3), dict(size=50)):
        with pytest.raises(UserError, match="had 7 steps per epoch") as caught:
            train(tmp_path, resume=True, **other)
        assert "\n" not in str(caught.value)


def test_another_net_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="--resume: weights of another net"):
        train(tmp_path, resume=True, net=Net(norm="none"))


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_ema_may_be_switched(tmp_path, before, after):
    train(tmp_path, ema=before)
    state = train(tmp_path, ema=after, resume=True, epochs=3)
    saved = read(tmp_path / "last.pt")
    assert (saved["ema"] is not None) == after and saved["ema_steps"] == (7 if after else 0)
    train(tmp_path / "done", ema=before)
    done = train(tmp_path / "done", ema=after, resume=True)  # nothing is left to train: what is judged has been trained
    assert differences(done.eval_model.state_dict(), done.model.state_dict()) == []
    if after:  # it began with the trained weights, not with the new net's random ones
        gap = (state.ema.module.conv1.weight - state.model.conv1.weight).abs().max()
        assert 0 < gap < (Net().conv1.weight - state.model.conv1.weight).abs().max() / 5


@pytest.mark.parametrize("before", ["off", "fp16"])
@pytest.mark.parametrize("after", ["off", "bf16", "fp16"])
def test_precision_may_be_switched(tmp_path, before, after):
    train(tmp_path, amp=before)
    state = train(tmp_path, amp=after, resume=True, epochs=3)
    assert len(state.history) == 3 and state.scaler.is_enabled() == (after == "fp16")


# ---- numbers that are not finite -------------------------------------------------------------------------------------
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_no_file_holds_what_is_not_finite(tmp_path, monkeypatch, amp, kind):
    not_finite_at(tmp_path, (1, 2, 7, 8, 14), monkeypatch, amp, kind)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_no_file_holds_what_is_not_finite_at_every_step(tmp_path, monkeypatch, amp, kind):
    not_finite_at(tmp_path, range(1, 15), monkeypatch, amp, kind)


def not_finite_at(tmp_path, batches, monkeypatch, amp, kind):
    """NaN at these batches of a run, with a save after every step."""
    monkeypatch.setattr(engine, "SAVE_MINUTES", 0)
    for batch in batches:
        folder = tmp_path / f"{batch}"
        with pytest.raises(NumericalError) as caught:
            train(folder, amp=amp, faults=[f"{kind}@batch:{batch}"], save_period=1)
        assert caught.value.code == 3 and "\n" not in str(caught.value) and "--lr" in str(caught.value)
        assert (folder / "last.pt").exists() == (batch > 1)
        for file in folder.glob("*.pt*"):
            state = checkpoint.load(file)  # refuses NaN
            assert state["step"] < batch and all(math.isfinite(v) for row in state["history"] for v in row.values())
        if batch > 1:
            assert read(folder / "last.pt")["step"] == batch - 1
            state = train(folder, amp=amp, resume=True, epochs=2)
            assert len(state.history) == 2  # and it can go on


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_infinite_gradient_under_a_finite_loss(tmp_path, accumulate):
    with pytest.raises(NumericalError):
        train(tmp_path, compute_loss=overflowing(3), accumulate=accumulate)
    assert not list(tmp_path.glob("*.pt*"))


def test_weights_that_overflow_are_not_saved(tmp_path, monkeypatch):
    """The last step of an epoch ruins the weights; no loss has seen them yet."""
    for at in (6, 13):
        folder = tmp_path / str(at)
        with pytest.raises(NumericalError):
            train(folder, optimizer="sgd", schedule=lambda step, scores: 1e38 if step == at else 1e-3, lr=100.0,
                  evaluate=given_scores(1, 2))
        assert sorted(f.name for f in folder.glob("*.pt*")) == ([] if at == 6 else ["best.pt", "last.pt"])
        assert all(checkpoint.load(f)["step"] == 7 for f in folder.glob("*.pt*"))
    with pytest.raises(NumericalError):
        train(tmp_path / "lr", lr=1e30)


def test_an_average_that_overflows_is_not_saved(tmp_path):
    state = train(tmp_path)
    with torch.no_grad():
        state.ema.module.conv1.weight[0, 0, 0, 0] = math.inf
    with pytest.raises(NumericalError):
        state.state_dict()


def test_running_statistics_that_are_not_finite_are_not_saved(tmp_path):
    state = train(tmp_path)
    state.model.norm1.running_var[0] = math.nan
    with pytest.raises(NumericalError):
        state.state_dict()


def test_an_epoch_with_a_loss_that_is_not_finite_is_not_evaluated(tmp_path):
    """Its last step; a validation may take an hour, or fail for such weights with an error of its own."""
    with pytest.raises(NumericalError, match="noticed at step 7"):
        train(tmp_path, faults=["nan@batch:7"], evaluate=lambda model: pytest.fail("evaluated"))


def test_nan_is_noticed_within_a_second(tmp_path):
    def compute_loss(model, batch):
        time.sleep(0.05)
        return model(batch["image"]).mean() * math.nan, {}

    began = time.monotonic()
    with pytest.raises(NumericalError):
        train(tmp_path, compute_loss=compute_loss, size=400)
    assert time.monotonic() - began < 3  # an epoch of 100 batches would take 5 s


# ---- signals ---------------------------------------------------------------------------------------------------------
def test_a_signal_ends_the_run_after_the_step_and_not_after_the_epoch(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, faults=["term@batch:3"])
    assert checkpoint.load(tmp_path / "last.pt")["step"] in (2, 3)  # of 7


def test_signals_are_noted_and_raised_only_where_allowed():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with dist.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.signum == signal.SIGINT
        with pytest.raises(Stopped) as caught, signals.interruptible():  # it came before: at once
            raise AssertionError("not reached")
        assert caught.value.code == 130
        signals.signum = 0
        with pytest.raises(Stopped) as caught, signals.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert caught.value.code == 143
        os.kill(os.getpid(), signal.SIGTERM)  # the second one, while the first is being obeyed
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_in_validation_saves_the_trained_epoch(tmp_path):
    train(tmp_path / "straight", epochs=2)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", epochs=2, faults=["term@eval:2"])
    saved = read(tmp_path / "stopped" / "last.pt")
    assert saved["step"] == 7 and saved["history"] == [] and not (tmp_path / "stopped" / "best.pt").exists()
    train(tmp_path / "stopped", epochs=2, resume=True)
    assert differences(read(tmp_path / "straight" / "last.pt"), read(tmp_path / "stopped" / "last.pt")) == []


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_while_saving_stops_right_after_it(tmp_path, monkeypatch, epoch):
    save = checkpoint.save

    def signalled(path, state, **options):
        save(path, state, **options)
        if path.name == "last.pt" and len(state["history"]) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(checkpoint, "save", signalled)
    with pytest.raises(Stopped):
        train(tmp_path, epochs=2)
    assert read(tmp_path / "last.pt")["step"] == 7 * epoch  # not a step more
    monkeypatch.undo()
    assert len(train(tmp_path, epochs=2, resume=True).history) == 2


# ---- small parts -----------------------------------------------------------------------------------------------------
def test_precision(monkeypatch):
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}.items():
        assert precision(name, CPU) is dtype
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        assert precision("auto", CPU) is (torch.bfloat16 if amx or avx else None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert precision("auto", torch.device("cuda")) is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precision("auto", torch.device("cuda")) is torch.bfloat16
    with autocast(CPU, None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_to_device_makes_images_channels_last():
    batch = engine.to_device({"image": torch.rand(2, 3, 4, 5), "boxes": torch.rand(3, 4), "names": ["a"]}, CPU)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last) and batch["names"] == ["a"]
    assert batch["boxes"].is_contiguous()


def test_seed_everything():
    draws = []
    for seed in (1, 1, 2):
        engine.seed_everything(seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]
    try:
        engine.seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_compiled_net_trains_and_saves_under_its_own_names(tmp_path):
    plain, compiled = (train(tmp_path / str(c), dropout=0, compile=c, net=None) for c in (False, True))
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert set(read(tmp_path / "True" / "last.pt")["model"]) == set(Net().state_dict())
