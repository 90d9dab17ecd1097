"""data/loader.py: what a batch holds depends on (seed, epoch, index) and on nothing else."""
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import EpochBatches, eval_loader, train_loader
from tests.toy import Data

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def ranks(monkeypatch):
    """A function that makes this process the given rank of `world`."""
    def be(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
    return be


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def epochs(batches, *wanted):
    """The batches of these epochs, as lists."""
    out = []
    for epoch in wanted:
        batches.batch_sampler.set_epoch(epoch)
        out += list(batches)
    return out


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


# ---- training --------------------------------------------------------------------------------------------------------
def test_content_does_not_depend_on_workers_or_global_state(cores):
    expected = epochs(train_loader(Data(26, seed=5), 4, seed=5), 0, 1)
    for workers in (1, 3):
        torch.manual_seed(workers), np.random.seed(workers), random.seed(workers)
        batches = train_loader(Data(26, seed=5), 4, seed=5, workers=workers)
        assert batches.num_workers == workers
        assert same(expected, epochs(batches, 0, 1))
    again = train_loader(Data(26, seed=5), 4, seed=5)
    assert same(expected[7:], epochs(again, 1)) and same(expected[:7], epochs(again, 0))  # nor on what came before


def test_content_depends_on_seed_and_epoch():
    first = epochs(train_loader(Data(26, seed=5), 4, seed=5), 0)
    for seed, epoch in ((5, 1), (6, 0)):
        other = epochs(train_loader(Data(26, seed=seed), 4, seed=seed), epoch)
        assert [b["index"].tolist() for b in first] != [b["index"].tolist() for b in other]
        ours = {int(i): x for b in first for i, x in zip(b["index"], b["image"])}
        theirs = {int(i): x for b in other for i, x in zip(b["index"], b["image"])}
        assert not any(torch.equal(ours[i], theirs[i]) for i in ours.keys() & theirs.keys())


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 60), share=st.integers(1, 9), world=st.integers(1, 4), seed=st.integers(0, 2**31),
       epoch=st.integers(0, 10**6), data=st.data())
def test_epochs_cover_everything_in_full_batches(size, share, world, seed, epoch, data):
    sampler = EpochBatches(size, share * world, seed)
    skip = data.draw(st.integers(0, len(sampler)))
    with pytest.MonkeyPatch.context() as patch:
        def keys(rank, world, skip=0):
            patch.setenv("RANK", str(rank)), patch.setenv("WORLD_SIZE", str(world))
            sampler.set_epoch(epoch, skip)
            return list(sampler)

        whole = keys(0, 1)
        assert len(whole) == len(sampler) == -(-size // (share * world))
        assert all(len(batch) == share * world for batch in whole)
        flat = [key for batch in whole for key in batch]
        assert {e for e, _ in flat} == {epoch}
        indices = [i for _, i in flat]
        assert sorted(i % size for i in indices[:size]) == list(range(size))  # every sample once,
        assert len(set(indices)) == len(indices)  # and the repeated ones are other keys of theirs
        assert [i % size for i in indices[size:]] == [indices[j % size] for j in range(len(indices) - size)]
        shards = [keys(rank, world) for rank in range(world)]
        assert [sum((shard[i] for shard in shards), []) for i in range(len(whole))] == whole  # the global batch
        assert keys(0, 1, skip) == whole[skip:] and len(sampler) == len(whole)


def test_shards_of_two_ranks_are_the_global_batch(ranks):
    ranks(0, 1)
    whole = epochs(train_loader(Data(26), 4), 3)
    shards = []
    for rank in range(2):
        ranks(rank, 2)
        shards.append(epochs(train_loader(Data(26), 4), 3))
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*shards)]
    assert same(whole, joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_leave_the_rest_as_it_was(cores, workers):
    whole = epochs(train_loader(Data(26), 4), 1, 2)
    batches = train_loader(Data(26), 4, workers=workers)
    for skip in (3, 0, 6, 7):
        batches.batch_sampler.set_epoch(1, skip)
        assert same(whole[skip:7], list(batches)) and len(batches) == 7
    assert same(whole[7:], epochs(batches, 2))


def test_a_batch_larger_than_the_data_repeats_it_with_new_noise():
    [batch] = epochs(train_loader(Data(3), 8), 0)
    assert len(batch["image"]) == 8
    assert sorted(batch["index"].tolist()) == list(range(8)) or len(set(batch["index"].tolist())) == 8
    assert sorted(set((batch["index"] % 3).tolist())) == [0, 1, 2]
    assert len({tuple(x.flatten().tolist()) for x in batch["image"]}) == 8


def test_samples_are_not_visited_in_rank_or_size_order():
    """A permutation, drawn anew for every epoch."""
    orders = [[i for batch in EpochBatches(1000, 10, seed) for _, i in batch] for seed in (0, 1)]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert abs(np.corrcoef(orders[0], range(1000))[0, 1]) < 0.1


# ---- validation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 21])
def test_every_sample_on_exactly_one_rank(ranks, world, size):
    seen = []
    for rank in range(world):
        ranks(rank, world)
        batches = eval_loader(Data(size), 4)
        mine = [i for batch in batches for i in batch["index"].tolist()]
        assert len(batches) == -(-len(mine) // 4) and abs(len(mine) - size / world) < 1
        seen += mine
    assert sorted(seen) == list(range(size))


def test_a_batch_holds_one_shape(ranks):
    shapes = [(8, 8), (4, 8), (8, 8), (4, 8), (8, 8), (2, 2), (8, 8)]

    class Sized(Data):
        def __getitem__(self, index):
            return {"image": torch.zeros(shapes[index]), "index": index}

    for world in (1, 2):
        seen = []
        for rank in range(world):
            ranks(rank, world)
            for batch in eval_loader(Sized(7), 2, shapes=shapes):
                assert len(batch["index"]) <= 2
                assert {shapes[i] for i in batch["index"]} == {tuple(batch["image"].shape[1:])}
                seen += batch["index"].tolist()
        assert sorted(seen) == list(range(7))


def test_validation_data_is_not_augmented(cores):
    plain = torch.stack([Data(10)[i]["image"] for i in range(10)])
    for workers in (0, 2):
        batches = eval_loader(Data(10), 4, workers=workers)
        for _ in range(2):
            assert torch.equal(torch.cat([b["image"] for b in batches]), plain)


# ---- workers ---------------------------------------------------------------------------------------------------------
def test_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert train_loader(Data(4), 2, workers=256).num_workers == 3
    assert eval_loader(Data(4), 2, workers=256).num_workers == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert train_loader(Data(4), 2, workers=2).num_workers == 1


def test_workers_do_not_hear_signals_and_the_main_process_does(cores):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for make in (train_loader, eval_loader):
        loader = make(Data(8), 2, workers=1)
        batches = iter(loader)
        [worker] = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM), os.kill(worker.pid, signal.SIGINT)
        if make is eval_loader:
            assert len(list(batches)) == 4
        time.sleep(0.05)
        assert worker.is_alive() and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        del batches, loader
        worker.kill(), worker.join()


def test_memory_is_pinned_for_gpus_only():
    assert train_loader(Data(4), 2, device="cuda:1").pin_memory
    assert not train_loader(Data(4), 2, device="cpu").pin_memory
