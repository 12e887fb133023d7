"""Processes of a job that is started again find each other, not those that are gone."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from il_net.engine.rendezvous import fresh_store


def start(store: HashStore, delays: list[float]) -> list[bytes]:
    """Every rank comes after its delay in seconds; what each reads under a key of the first."""

    def join(rank: int) -> bytes:
        time.sleep(delays[rank])
        own = fresh_store(store, rank, len(delays))
        if rank == 0:
            own.set("address", str(time.monotonic()))
        return own.get("address")

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(join, range(len(delays))))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_no_start_reads_what_another_has_written(late):
    store, seen = HashStore(), []
    for _ in range(3):
        delays = [0.0] * 3
        delays[late] = 0.3
        found = start(store, delays)
        assert len(set(found)) == 1
        seen += found[:1]
    assert len(set(seen)) == 3
    # Two machines fewer.
    assert len({*start(store, [0.1, 0.0]), *seen}) == 4


def test_a_start_that_was_never_finished_is_forgotten():
    """Rank 1 had died before it came; rank 0's list held the name of nobody."""
    store = HashStore()
    start(store, [0.0, 0.0])
    store.set("here/0", "gone")
    store.set("names", '["gone", "also gone"]')
    assert len(set(start(store, [0.2, 0.0]))) == 1


def test_one_process_waits_for_nobody():
    fresh_store(HashStore(), 0, 1).set("key", "value")
