"""What a process asks of the store that all share."""

import hashlib
import json
import threading

import jax
import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.parallel import processes
from llama3_jax.parallel.liveness import Watch


class Store:
    """A stand-in that counts the entries which it lists."""

    def __init__(self, processes: int):
        self.values = {f"llama3_jax/at/{n}": json.dumps((5, "step", 1.0)) for n in range(processes)}
        self.listed = 0

    def key_value_dir_get(self, prefix: str):
        found = [(k, v) for k, v in self.values.items() if k.startswith(prefix)]
        self.listed += len(found)
        return found

    def key_value_set(self, key: str, value: str, overwrite: bool = False):
        if key in self.values and not overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value


def watch(store: Store, process: int) -> Watch:
    made = object.__new__(Watch)
    made._store, made._process, made._ending = store, process, threading.Lock()
    return made


def test_one_process_lists_what_all_are_at_and_the_others_read_its_finding():
    store = Store(1000)
    watches = [watch(store, process) for process in range(1000)]
    for category, busy in (("compile", True), ("step", False)):
        store.values["llama3_jax/at/7"] = json.dumps((5, category, 1.0))
        watches[0]._find_busy()
        store.listed = 0
        assert all(w.someone_is_busy() is busy for w in watches)
        assert store.listed == 1000


def test_one_process_looks_for_the_reason_of_a_hang():
    store = Store(3)
    assert [watch(store, process)._looks_alone() for process in range(3)] == [True, False, False]


def test_processes_that_were_given_different_configs_are_named(monkeypatch):
    """As three processes see it, of which the last has another text."""
    texts = ["a", "a", "b"]

    def gathered(_):
        digests = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]
        return np.stack([np.frombuffer(d, np.int32) for d in digests])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    with pytest.raises(UserError, match="process 2 has another config than process 0"):
        processes.check_same("config", "a")
    texts[2] = "a"
    processes.check_same("config", "a")
