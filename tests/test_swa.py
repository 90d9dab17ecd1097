"""utils/train/swa.py and the loop's part in it: means in float64, norms recomputed by hand, runs killed and resumed."""
import copy
import csv
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from data.loader import train_loader
from tests.harness import ENV, differences, read, two_ranks
from tests.test_engine import CPU, given_scores, train
from tests.toy import Data, Net
from utils.pictures import charts
from utils.train import checkpoint, dist, engine, optim
from utils.errors import NumericalError, Stopped
from utils.train.swa import SWA, swa_epochs, with_swa

STEPS = 7  # per epoch of the toy data


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(charts, "plot_curves", lambda *_, **__: None)


def averaged(folder, *, epochs=4, share=0.5, lr=0.5, on=True, total=None, net=None, seed=0, **options):
    """A toy run with SWA's schedule and (`on`) its average. `total`: epochs that are reckoned with."""
    torch.manual_seed(seed)
    net, taken = net or Net(), swa_epochs(total or epochs, share)
    schedule = optim.make_schedule("cosine", steps_per_epoch=STEPS, epochs=total or epochs)
    return train(folder, net=net, epochs=epochs, total=total, seed=seed, swa=SWA(net, taken) if on else None,
                 schedule=with_swa(schedule, taken, steps_per_epoch=STEPS, lr=lr), **options)


def watching(seen):
    """An evaluate() that keeps the weights it is given."""
    def evaluate(model):
        assert not model.training and torch.is_inference_mode_enabled()
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"score": 1 + len(seen) / 8, "other": 2.0}
    return evaluate


def norms_by_hand(weights, batches):
    """Net's batch norms in training mode, in float64: the mean over batches of each batch's mean and variance."""
    stats = {}
    for x in batches:
        for layer in "12":
            x = torch.nn.functional.conv2d(x.double(), weights[f"conv{layer}.weight"].double(), padding=1,
                                           stride=int(layer))
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
            scale, shift = (weights[f"norm{layer}.{k}"].double()[:, None, None] for k in ("weight", "bias"))
            stats.setdefault(f"norm{layer}.running_mean", []).append(mean.flatten())
            stats.setdefault(f"norm{layer}.running_var", []).append(var.flatten())
            x = ((x - mean) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt() * scale + shift).relu()
    return {name: torch.stack(values).mean(0) for name, values in stats.items()}


def epoch_images(epoch, size=26, bs=4, seed=0, parts=1):
    """The images of an epoch's batches, written out as tests/test_engine.py does; each batch in `parts`."""
    order = list(np.random.default_rng((seed, epoch)).permutation(size))
    count, data = -(-size // bs), Data(size, seed)
    order += [index + size for index in order][:count * bs - size]
    share = bs // parts
    return [torch.stack([data[epoch, int(index)]["image"] for index in order[i:i + share]])
            for i in range(0, count * bs, share)]


# ---- when, and at what rate ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs, share, taken", [
    (20, 0.25, [16, 17, 18, 19, 20]), (20, 0.01, [20]), (20, 0.0, []), (3, 1.0, [1, 2, 3]), (1, 0.5, [1])])
def test_which_epochs_are_taken(epochs, share, taken):
    assert list(swa_epochs(epochs, share)) == taken


def test_the_rate_is_held():
    base = optim.make_schedule("plateau", steps_per_epoch=5, epochs=8, period=2)
    schedule = with_swa(base, swa_epochs(8, 0.25), steps_per_epoch=5, lr=0.3)
    scores = [1.0, 0.0, 0.0]  # reach the schedule itself
    assert [schedule(step, scores) for step in range(30)] == [base(step, scores) for step in range(30)] == [0.5] * 30
    assert [schedule(step, scores) for step in range(30, 50)] == [0.3] * 20
    assert schedule(0) == 1.0 and with_swa(base, swa_epochs(8, 0), steps_per_epoch=5)(39) == 1.0


# ---- what is averaged ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs, share, taken", [(4, 0.75, [2, 3, 4]), (5, 0.4, [4, 5])])
def test_the_plain_mean_of_the_weights_at_the_ends_of_epochs(tmp_path, epochs, share, taken, capsys):
    seen = []
    state = averaged(tmp_path, epochs=epochs, share=share, ema=False, evaluate=watching(seen))
    assert len(seen) == epochs + 1  # the last is the average's
    saved, last = read(tmp_path / "swa.pt"), read(tmp_path / "last.pt")
    for name, parameter in state.model.named_parameters():
        mean = torch.stack([seen[epoch - 1][name].double() for epoch in taken]).mean(0)
        torch.testing.assert_close(saved["model"][name].double(), mean, rtol=0, atol=1e-6)
        assert torch.equal(saved["model"][name], last["swa"][name])
        if len(taken) < epochs:  # others would have made another mean
            assert (mean - torch.stack([s[name].double() for s in seen[:epochs]]).mean(0)).abs().max() > 1e-5
    assert last["swa_count"] == len(taken)
    assert differences(seen[-1], dict(saved["model"])) == []
    assert saved["swa_scores"] == {"score": 1 + (epochs + 1) / 8, "other": 2.0} == json.loads(
        (tmp_path / "swa.json").read_text())
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == epochs and rows[-1]["score"] == f"{1 + epochs / 8:.6g}"  # the history is of the other weights
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"swa.pt, the mean of {len(taken)} epochs: score {1 + (epochs + 1) / 8:.4g}  other 2"


def test_norms_are_those_of_the_averaged_weights(tmp_path):
    """Against a plain recomputation over the batches of what would be the next epoch, in float64."""
    averaged(tmp_path, epochs=3, share=0.6)
    saved, last = read(tmp_path / "swa.pt"), read(tmp_path / "last.pt")
    for name, expected in norms_by_hand(saved["model"], epoch_images(3)).items():
        torch.testing.assert_close(saved["model"][name].double(), expected, rtol=1e-4, atol=1e-5)
        gaps = [(others[name] - saved["model"][name]).abs().max() for others in (last["swa"], last["model"])]
        assert min(gaps) > 1e-3
        assert torch.equal(last["swa"][name], last["model"][name])  # the buffers that the average came with
    assert saved["model"]["norm1.num_batches_tracked"] == STEPS


def test_the_file_predicts_and_is_small(tmp_path):
    state = averaged(tmp_path, save_period=4)
    saved, kept = checkpoint.load(tmp_path / "swa.pt"), checkpoint.load(tmp_path / "epoch_4.pt")
    net = checkpoint.load_weights(Net(), saved, "swa.pt")
    assert differences(net.state_dict(), state.swa.module.state_dict()) == []
    assert saved["ema"] is None and saved["task"] == "toy" and saved["history"] == kept["history"]
    assert set(saved) - set(kept) == {"swa_scores"} and not {"optimizer", "scaler", "swa"} & set(saved)
    assert saved["swa_scores"]["score"] > 0 and set(saved["swa_scores"]) == {"score", "count"}


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_averaging_changes_nothing_else(tmp_path, amp):
    averaged(tmp_path / "with", amp=amp)
    averaged(tmp_path / "without", amp=amp, on=False)
    a, b = read(tmp_path / "with" / "last.pt"), read(tmp_path / "without" / "last.pt")
    assert a.pop("swa_count") == 2 and b.pop("swa_count") == 0 and a.pop("swa") and b.pop("swa") is None
    assert differences(a, b) == []
    assert differences(*(read(tmp_path / run / "best.pt") for run in ("with", "without"))) == []
    assert not (tmp_path / "without" / "swa.pt").exists()


def test_without_validation_and_without_norms(tmp_path, capsys):
    state = averaged(tmp_path, net=Net(norm="none"), evaluate=None, share=0.25)
    assert read(tmp_path / "swa.pt")["swa_scores"] == {} and not (tmp_path / "swa.json").exists()
    assert differences(state.swa.module.state_dict(), state.model.state_dict()) == []  # of one epoch


def test_average_leaves_the_model_and_its_gradients_alone():
    net = Net()
    swa = SWA(net, swa_epochs(4, 0.5))
    before = copy.deepcopy(net.state_dict())
    for epoch in (1, 2, 3, 4):
        swa.take(net, epoch)
        assert int(swa.n_averaged) == max(epoch - 2, 0)
    batches = [{"image": torch.randn(4, 3, 8, 8)} for _ in range(3)]
    with swa.new_statistics():
        for batch in batches:
            swa.module(batch["image"])
    assert differences(net.state_dict(), before) == []
    assert all(p.grad is None for p in (*net.parameters(), *swa.parameters()))
    assert swa.module.norm1.momentum == net.norm1.momentum == 0.1  # as before


# ---- resume ----------------------------------------------------------------------------------------------------------
def noisy_loss(faults=()):
    """A loss that draws random numbers, in front of the norms; a signal in the given batches."""
    count = [0]

    def compute_loss(model, batch):
        count[0] += 1
        if count[0] in faults:
            os.kill(os.getpid(), signal.SIGTERM)
        error = model(batch["image"] + torch.randn_like(batch["image"])) - batch["target"]
        return error.square().mean(), {}
    return compute_loss


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swa") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "plot_curves", lambda *_, **__: None)
        averaged(folder, compute_loss=noisy_loss())
    return folder


# the batches of epochs 2, 3 and 4 of 4, of which two are averaged, of the pass for the norms; batches of validations
@pytest.mark.parametrize("batch, sample", [(10, 0), (21, 0), (28, 0), (29, 0), (33, 0), (0, 3 * 3 + 2),
                                           (0, 4 * 3 + 2)])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, straight, batch, sample):
    with pytest.raises(Stopped) as caught:
        averaged(tmp_path, compute_loss=noisy_loss([batch]), faults=[f"term@eval:{sample}"])
    assert caught.value.code == 143
    saved = read(tmp_path / "last.pt")
    assert saved["swa_count"] == max(len(saved["history"]) - 2, 0) and not (tmp_path / "swa.pt").exists()
    averaged(tmp_path, compute_loss=noisy_loss(), resume=True)
    for name in ("last.pt", "best.pt", "swa.pt"):
        assert differences(read(straight / name), read(tmp_path / name)) == [], name
    assert (tmp_path / "swa.json").read_text() == (straight / "swa.json").read_text()


def test_the_pass_for_the_norms_draws_from_the_seed(tmp_path, straight):
    """Resumed after its end a run makes the same file again; noise in the batches has been part of it."""
    averaged(tmp_path, compute_loss=noisy_loss())
    (tmp_path / "swa.pt").unlink()
    torch.manual_seed(99)
    averaged(tmp_path, compute_loss=noisy_loss(), resume=True)
    saved = read(tmp_path / "swa.pt")
    assert differences(read(straight / "swa.pt"), saved) == []
    for name, plain in norms_by_hand(saved["model"], epoch_images(4)).items():
        assert name != "norm1.running_var" or (saved["model"][name] > plain * 1.1).all()


def test_a_longer_run_averages_its_own_end(tmp_path):
    seen = []
    averaged(tmp_path, epochs=4, ema=False)
    assert read(tmp_path / "last.pt")["swa_count"] == 2
    averaged(tmp_path, epochs=8, ema=False, resume=True, evaluate=watching(seen))
    last = read(tmp_path / "last.pt")
    assert last["swa_count"] == 4
    mean = torch.stack([weights["conv1.weight"].double() for weights in seen[:4]]).mean(0)
    torch.testing.assert_close(last["swa"]["conv1.weight"].double(), mean, rtol=0, atol=1e-6)


def test_a_run_made_a_little_longer_averages_none_that_its_first_end_was_made_of(tmp_path):
    """Of 6 epochs the last 3 are taken, of 8 the last 4: when it goes on with the 7th, the 4th is in the mean."""
    seen = []
    averaged(tmp_path, epochs=6, ema=False)
    averaged(tmp_path, epochs=8, ema=False, resume=True, evaluate=watching(seen))
    last = read(tmp_path / "last.pt")
    assert last["swa_count"] == 2
    mean = torch.stack([weights["conv1.weight"].double() for weights in seen[:2]]).mean(0)
    torch.testing.assert_close(last["swa"]["conv1.weight"].double(), mean, rtol=0, atol=1e-6)


def test_averaging_may_be_switched(tmp_path):
    averaged(tmp_path, epochs=2, total=4, share=0.75, on=False)
    state = averaged(tmp_path, epochs=3, total=4, share=0.75, resume=True)
    assert int(state.swa.n_averaged) == 1 and read(tmp_path / "last.pt")["swa_count"] == 1
    averaged(tmp_path, epochs=4, share=0.75, resume=True, on=False)
    assert read(tmp_path / "last.pt")["swa"] is None and len(read(tmp_path / "last.pt")["history"]) == 4


def test_checkpoints_from_before_there_was_swa(tmp_path):
    averaged(tmp_path, epochs=1, total=2, on=False)
    saved = checkpoint.load(tmp_path / "last.pt")
    del saved["swa"], saved["swa_count"]
    checkpoint.save(tmp_path / "last.pt", saved)
    assert int(averaged(tmp_path, epochs=2, resume=True).swa.n_averaged) == 1


@pytest.mark.parametrize("scores, files", [([3, 2, 1], False), ([1, 2, 3, 2, 1], True)])
def test_a_run_that_ends_early(tmp_path, capsys, scores, files):
    """Without patience left before the part that is averaged there is no file; within it, of what there is."""
    state = averaged(tmp_path, epochs=8, evaluate=given_scores(*scores, 0), patience=2, share=0.5)
    assert len(state.history) == len(scores) and (tmp_path / "swa.pt").exists() == files
    assert int(state.swa.n_averaged) == max(len(scores) - 4, 0)
    assert ("no swa.pt" in capsys.readouterr().out) != files


def test_what_is_not_finite_is_not_written(tmp_path):
    """In the pass for the norms, after a sound run."""
    count = [0]

    def compute_loss(model, batch):
        count[0] += 1
        x = batch["image"] * (math.nan if count[0] == 3 * STEPS + 2 else 1.0)
        return (model(x) - batch["target"]).square().mean(), {}

    with pytest.raises(NumericalError):
        averaged(tmp_path, epochs=3, compute_loss=compute_loss)
    assert not list(tmp_path.glob("swa.*")) and len(read(tmp_path / "last.pt")["history"]) == 3


# ---- two processes ---------------------------------------------------------------------------------------------------
def rank_of_two(folder, rank, port):
    """One of two processes: a run, the same run stopped and resumed; keeps this rank's average."""
    os.environ.update(ENV, RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    charts.plot_curves = lambda *_, **__: None
    dist.setup("cpu")
    state = averaged(folder / "straight", epochs=3, share=0.6)
    torch.save(state.swa.module.state_dict(), folder / f"rank{rank}.pt")
    try:
        averaged(folder / "stopped", epochs=3, share=0.6, faults=["term@batch:17"] if rank else [])
    except Stopped:
        dist.barrier()
        averaged(folder / "stopped", epochs=3, share=0.6, resume=True)
    dist.barrier()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Norms over both ranks' halves of the batches, the same on both; stopped and resumed, the same bits."""
    two_ranks(rank_of_two, tmp_path, 60)
    saved = torch.load(tmp_path / "straight" / "swa.pt", weights_only=True)["model"]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert differences(dict(saved), dict(found)) == []
    for name, expected in norms_by_hand(saved, epoch_images(3, parts=2)).items():
        torch.testing.assert_close(saved[name].double(), expected, rtol=1e-4, atol=1e-5)
    assert read(tmp_path / "stopped" / "last.pt")["swa_count"] == 2
    a, b = (read(tmp_path / run / "swa.pt") for run in ("straight", "stopped"))
    assert differences(a["model"], b["model"]) == [] and a["step"] == b["step"] == 21


def test_the_loop_and_this_file_mean_the_same_batches():
    """What `epoch_images` writes out is what the loader gives."""
    loader = train_loader(Data(26), 4)
    loader.batch_sampler.set_epoch(3)
    for batch, images in zip(loader, epoch_images(3), strict=True):
        assert torch.equal(engine.to_device(batch, CPU)["image"], images)
