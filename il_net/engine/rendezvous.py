"""How the processes of a torchrun job meet when they are started for a second time.

torchrun keeps one key-value store over all restarts, and with it the addresses of processes that
are gone: one that reads them before their successors have written theirs waits for ever (seen with
torch 2.11 and gloo). Its restart counter can't tell the starts apart, since the agents of several
machines count for themselves.
"""

import json
import time
import uuid

from torch.distributed import PrefixStore, Store

_POLL = 0.05  # seconds


def fresh_store(store: Store, rank: int, world_size: int) -> Store:
    """The part of ``store`` that only this start of the job uses; every process calls it.

    Each process makes a name for itself. The first one writes down which names it has read until
    all others have found their own there, which no list of an earlier start holds; its own name is
    that of the start. Waits for the others as long as torchrun lets it live.
    """
    name = uuid.uuid4().hex
    store.set(f"here/{rank}", name)
    names: list[str] = []
    if rank == 0:
        others, acknowledged = range(1, world_size), 0
        while acknowledged < len(others):
            names = [name, *(_read(store, f"here/{r}") for r in others)]
            store.set("names", json.dumps(names))
            keys = [f"acknowledged/{r}" for r in others]
            acknowledged = sum(store.check([k]) and _read(store, k) == name for k in keys)
            time.sleep(_POLL)
        return PrefixStore(name, store)
    while name not in names:
        time.sleep(_POLL)
        names = json.loads(_read(store, "names"))
    store.set(f"acknowledged/{rank}", names[0])
    return PrefixStore(names[0], store)


def _read(store: Store, key: str) -> str:
    """Waits for the key."""
    return store.get(key).decode()
