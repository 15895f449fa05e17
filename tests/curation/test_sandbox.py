"""A call that crashes, hangs, sleeps or eats memory is named; the calls around it return."""

import ctypes
import errno
import os
import signal
import threading
import time

import pytest

from llama3_jax.curation.sandbox import Killed, Sandbox

NAME = f"{__name__}:misbehave"


def misbehave(how: str, value: int = 0):
    if how == "crash":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "exit":
        os._exit(3)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "spin":
        while True:
            value += 1
    elif how == "regex":
        import re

        re.match(r"(a+)+$", "a" * 40 + "b")
    elif how == "memory":
        blocks = []
        while True:
            blocks.append(bytearray(1 << 24))
    elif how == "raise":
        raise LookupError("no such thing")
    elif how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "out.parquet")
    elif how == "recurse":
        return misbehave("recurse", value + 1)
    return how, value


CASES = {
    "crash": "crashed", "abort": "crashed", "exit": "crashed", "killed": "out_of_memory",
    "spin": "timeout", "regex": "timeout", "memory": "out_of_memory", "raise": "error",
    "recurse": "error",
}  # fmt: skip


def test_an_error_of_the_system_is_no_fault_of_the_call():
    sandbox = Sandbox(NAME, seconds=5, memory=0)
    with pytest.raises(OSError, match=r"No space left on device: 'out.parquet'") as raised:
        list(sandbox.map([("fine", 1), ("full", 0)]))
    assert raised.value.errno == errno.ENOSPC
    assert list(sandbox.map([("fine", 2)])) == [("fine", 2)]


def test_each_bad_call_is_named_and_its_neighbours_return():
    # So little that no machine takes half a second to fill it.
    sandbox = Sandbox(NAME, seconds=0.5, memory=64 << 20)
    calls = [call for i, how in enumerate(CASES) for call in (("fine", i), (how, 0), ("fine", -i))]
    outcomes = list(sandbox.map(calls))
    assert len(outcomes) == len(calls)
    for call, outcome in zip(calls, outcomes, strict=True):
        if call[0] == "fine":
            assert outcome == call
        else:
            assert isinstance(outcome, Killed) and outcome.reason == CASES[call[0]], (call, outcome)


def test_a_large_argument_and_result_pass():
    (outcome,) = Sandbox(NAME, 10, 1 << 30).map([("x" * 30_000_000, 1)])
    assert len(outcome[0]) == 30_000_000


def test_threads_have_processes_of_their_own():
    sandbox, seen = Sandbox("os:getpid", 10, 0), []

    def call():
        for pid in sandbox.map([()] * 50):
            seen.append((threading.get_ident(), pid))
            time.sleep(0.002)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 2 and len({pid for _, pid in seen}) == 2
    assert list(sandbox.map([()])) in [[pid] for _, pid in seen]  # taken again when idle


def test_a_caller_that_stops_early_leaves_no_call_behind():
    sandbox = Sandbox(NAME, 10, 0)
    outcomes = sandbox.map([("fine", 1), ("fine", 2), ("fine", 3)])
    assert next(outcomes) == ("fine", 1)
    outcomes.close()
    assert list(sandbox.map([("fine", 4)])) == [("fine", 4)]


@pytest.mark.parametrize("name", ["no.such:thing", "os:no_such"])
def test_a_function_that_is_not_there_is_no_calls_fault(name):
    with pytest.raises(RuntimeError, match=name):
        list(Sandbox(name, 10, 0).map([()]))
