"""utils/train/dist.py and the loop on two processes (CPU, gloo): one and two processes are the same run, and faults end both.

`world` and `toys` start the ranks as torchrun would, without its own 7 s; what depends on torchrun uses it.
"""
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.harness import differences, free_port, read, torchrun, toy, toys, world
from tests.test_faults import gone
from utils.train import dist

ROOT = Path(__file__).parents[1]

PLAIN = ("--epochs", 2, "--dropout", 0, "--optimizer", "sgd", "--lr", 0.1)
RUN = ("--epochs", 4, "--accumulate", 3, "--clip", 1)


def errors(*runs):
    return [line for run in runs for line in run.err if line.startswith("error: ")]


def close(a, b, tolerance=1e-6):
    """The largest difference between the weights of two checkpoints' tensors, against a tolerance."""
    a, b = read(a), read(b)
    pairs = [(x, b[part][k]) for part in ("model", "ema") for k, x in a[part].items()]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs) < tolerance


# ---- the same run ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [("--norm", "none"), ("--norm", "batch", "--sync-bn")], ids=["no norm", "sync-bn"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_equal_one(tmp_path, flags, accumulate):
    toy(tmp_path / "one", *PLAIN, *flags, "--accumulate", accumulate, "--val", 21)
    toys(tmp_path / "two", *PLAIN, *flags, "--accumulate", accumulate, "--val", 21, "--workers", 1)
    one, two = tmp_path / "one" / "exp" / "last.pt", tmp_path / "two" / "exp" / "last.pt"
    assert close(one, two)
    for a, b in zip(read(one)["history"], read(two)["history"], strict=True):
        assert a["count"] == b["count"] == 21
        assert a == pytest.approx(b, rel=1e-5)


def test_batch_norm_without_sync_sees_half_the_batch(tmp_path):
    """The comparison above can fail."""
    toy(tmp_path / "one", *PLAIN)
    toys(tmp_path / "two", *PLAIN)
    assert not close(tmp_path / "one" / "exp" / "last.pt", tmp_path / "two" / "exp" / "last.pt", 1e-3)


@pytest.mark.parametrize("val", [1, 3])
def test_shards_of_validation(tmp_path, val):
    """A rank may have nothing to validate on."""
    toys(tmp_path, *PLAIN, "--val", val)
    assert [row["count"] for row in read(tmp_path / "exp" / "last.pt")["history"]] == [val, val]


def test_synchronised_norm_is_the_norm_of_the_whole_batch(monkeypatch):
    """Against nn.BatchNorm2d, which sees both ranks' (here equal) halves."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 3) * 3 + 7
    whole, model = nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    nn.init.normal_(model[1][0].weight), nn.init.normal_(model[1][0].bias)
    whole.load_state_dict(model[1][0].state_dict())
    sync = dist.sync_batch_norm(model, torch.device("cpu"))[1][0]
    assert type(sync) is dist.CPUSyncBatchNorm and list(sync.state_dict()) == list(whole.state_dict())
    monkeypatch.setattr(dist, "all_gather", lambda value: [value, value])  # the other rank has the same half
    halves = x[:3].repeat(2, 1, 1, 1)
    expected, found = whole(halves)[:3], sync(x[:3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(sync.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sync.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-5)


# ---- stop, resume, fail ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """last.pt of two undisturbed processes."""
    project = tmp_path_factory.mktemp("straight2")
    toys(project, *RUN)
    return project / "exp" / "last.pt"


def same_run(a, b):
    """The same bits, apart from the losses in the table: what the ranks had summed up is averaged when a run stops."""
    a, b = read(a), read(b)
    for x, y in zip(a.pop("history"), b.pop("history"), strict=True):
        assert x == pytest.approx(y, rel=1e-6)
    assert differences(a, b) == []


@pytest.mark.parametrize("rank, batch", [(0, 2), (1, 12)])
def test_a_signal_to_one_rank_stops_both(tmp_path, straight, rank, batch):
    runs = toys(tmp_path, *RUN, "--fault", f"term@batch:{batch}", "--fault-rank", rank, code=143)
    assert "stopped and saved at step" in runs[0].out and "saved" not in runs[1].out and errors(*runs) == []
    toys(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp" / "last.pt")


def test_a_signal_in_validation_lets_all_ranks_finish_it(tmp_path, straight):
    toys(tmp_path, *RUN, "--fault", "term@eval:3", "--fault-rank", 1, code=143)
    assert len(read(tmp_path / "exp" / "last.pt")["history"]) == 1
    toys(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp" / "last.pt")


@pytest.mark.parametrize("rank, fault, code", [
    (1, "error@sample:20", 2), (0, "crash@batch:5", 1), (1, "nan@batch:9", 3), (0, "full@replace:6", 2),
    (1, "kill@batch:5", -9), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (0, "error@sample:20", 2), (1, "crash@batch:5", 1), (0, "nan@batch:9", 3), (0, "kill@batch:5", -9),
        (1, "memory@batch:9", 2), (0, "error@eval:2", 2), (1, "error@eval:2", 2), (1, "kill@eval:2", -9)))])
def test_an_error_on_one_rank_ends_both(tmp_path, rank, fault, code):
    began = time.monotonic()
    runs = world(tmp_path, *RUN, "--fault", fault, "--fault-rank", rank)
    codes = [run.wait(60) for run in runs]
    assert time.monotonic() - began < 60
    assert code in (codes[rank], codes[1 - rank]) and 0 not in codes
    lines = errors(*runs)
    assert 1 <= len(lines) <= 2
    assert sum("another process of this run has ended" in line for line in lines) <= 1
    for run in runs:
        assert len(run.err) <= 1 or code == 1
        gone(run, 2)


def test_every_rank_ends_with_what_rank_0_has_found(tmp_path):
    """Only rank 0 looks for the checkpoint; the others end for its reason, and not because it is gone."""
    runs = world(tmp_path, *RUN, "--resume")
    assert [run.wait(60) for run in runs] == [2, 2]
    lines = errors(*runs)
    assert len(lines) == 2 and all("no run with last.pt" in line for line in lines), lines


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_noticed(tmp_path, rank):
    """SIGSTOP. Rank 0 has the store through which the ranks give their signs of life, so it may be silent too."""
    runs = world(tmp_path, *RUN, "--fault", "stop@batch:5", "--fault-rank", rank, "--timeout", 3)
    began = time.monotonic()
    assert runs[1 - rank].wait(30) == 2 and 3 < time.monotonic() - began < 20
    assert len(errors(runs[1 - rank])) == 1 and f"no sign of life from rank {rank}" in errors(runs[1 - rank])[0]
    runs[rank].send(signal.SIGKILL, group=True)


def test_what_all_ranks_have_to_say(tmp_path):
    """Without torchrun, which ends the other ranks at the first error, each says it once."""
    runs = toys(tmp_path, "--bs", 3, code=2)
    for run in runs:
        assert run.err == ["error: --bs 3: not divisible by the 2 processes; make it a multiple"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--resume", "none"), ("--device", "cuda:99")])
def test_what_only_rank_0_notices(tmp_path, flags):
    for run in toys(tmp_path, *flags, code=2):
        assert len(run.err) == 1 and flags[1] in run.err[0]


# ---- torchrun --------------------------------------------------------------------------------------------------------
def restarted(tmp_path, straight, rank, fault):
    """One SIGKILL under `torchrun --max-restarts 1`."""
    run = torchrun(tmp_path, *RUN, "--every-step", "--fault", fault, "--fault-rank", rank,
                   flags=("--nproc_per_node", 2, "--max-restarts", 1, "--master_port", free_port()))
    assert run.wait(240) == 0, run.err
    assert run.out.count("started") == 4
    # where torchrun is slow to end it, the process that is left says whom it misses
    assert all("another process of this run has ended" in line for line in errors(run)) and len(errors(run)) <= 1
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["exp"]  # in the same folder
    same_run(straight, tmp_path / "exp" / "last.pt")
    return run


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(tmp_path, straight):
    run = restarted(tmp_path, straight, 1, "kill@batch:12")
    assert "resuming" in run.out and "at step 4" in run.out


@pytest.mark.slow
@pytest.mark.parametrize("rank, fault", [
    *itertools.product((0, 1), ("kill@batch:5", "kill@batch:21", "kill@eval:3", "kill@start:1", "kill@batch:1")),
    (0, "kill@replace:9"), (0, "kill@write:2000")])  # rank 1 writes nothing
def test_torchrun_restarts_after_any_kill(tmp_path, straight, rank, fault):
    restarted(tmp_path, straight, rank, fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_agents_survive_a_kill(tmp_path, straight, rank):
    """The agent of the other process restarts it without counting that as a restart."""
    runs = agents(tmp_path, "--every-step", "--fault", "kill@batch:12", "--fault-rank", rank)
    for run in runs:
        assert run.wait(240) == 0, run.err
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["exp"]
    assert close(straight, tmp_path / "exp" / "last.pt", 1e-5)  # each agent's process has all cores: other sums


def agents(project, *argv):
    """Two nodes, as far as torchrun can tell, with a process each."""
    flags = ("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", 7, "--rdzv_endpoint",
             f"127.0.0.1:{free_port()}", "--max-restarts", 3, "--local_addr", "127.0.0.1")
    return [torchrun(project, *RUN, *argv, flags=flags) for _ in range(2)]


@pytest.mark.slow
def test_torchrun_says_an_error_once(tmp_path):
    run = torchrun(tmp_path, *RUN, "--fault", "error@batch:5", "--fault-rank", 1,
                   flags=("--nproc_per_node", 2, "--master_port", free_port()))
    began = time.monotonic()
    assert run.wait(120) == 1 and time.monotonic() - began < 120
    assert errors(run) == ["error: toy batch: an error to order; order another"]
    gone(run, 2)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tmp_path, straight):
    run = torchrun(tmp_path, *RUN, "--slow", "batch=0.2", flags=("--nproc_per_node", 2, "--master_port", free_port()))
    run.until("epoch 1")
    began = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait(60) not in (0, -signal.SIGKILL) and time.monotonic() - began < 60
    assert "stopped and saved at step" in run.out and errors(run) == []
    toys(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp" / "last.pt")


@pytest.mark.slow
def test_two_agents_train_together(tmp_path, straight):
    runs = agents(tmp_path)
    for run in runs:
        assert run.wait(240) == 0, run.err
    assert sorted("epoch 4" in run.out for run in runs) == [False, True]  # one of them is rank 0
    assert close(straight, tmp_path / "exp" / "last.pt", 1e-5)  # each may have more threads, which round otherwise


@pytest.mark.slow
def test_one_process_goes_on_with_the_run_of_two(tmp_path):
    """Another number of processes sees the same global batches; only dropout is drawn otherwise."""
    toys(tmp_path, *PLAIN, "--norm", "none", "--fault", "term@batch:5", code=143)
    toy(tmp_path, "--resume")
    toy(tmp_path / "one", *PLAIN, "--norm", "none")
    assert close(tmp_path / "exp" / "last.pt", tmp_path / "one" / "exp" / "last.pt")


def test_without_a_group_nothing_happens():
    value, net = torch.tensor([3.0]), nn.BatchNorm2d(2)
    assert dist.rank() == 0 and dist.world_size() == 1
    assert dist.broadcast(value) is value and dist.any_rank(5) == 5 and dist.mean(value).tolist() == [3.0]
    assert dist.sync_batch_norm(net, torch.device("cpu")) is net
    dist.same_weights(net), dist.barrier()


@pytest.mark.slow
def test_freed_memory_is_kept():
    """A block of 64 MB that was freed and is taken again costs a page fault per 4 KB, or none."""
    faults = {}
    for keep in (False, True):
        code = f"""
import resource, torch
from utils.train import dist
if {keep}:
    dist.keep_memory()
def fill():
    torch.empty(2**24).fill_(1.0)
for _ in range(20):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        faults[keep] = int(done.stdout)
    assert faults[True] < faults[False] / 10, faults
