"""Of one process: SIGTERM is a question's answer, and everything agrees with itself."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxrl import processes
from jaxrl.processes import PREEMPTED, Preempted, Preemption


def test_a_signal_is_noted_until_the_block_ends():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)  # launchers that are in doubt send it again
        assert preemption.reached()
    assert signal.getsignal(signal.SIGTERM) is before
    with Preemption() as another:
        assert not another.reached()


def test_a_thread_catches_nothing():
    answers = []

    def ask():
        with Preemption() as preemption:
            answers.append(preemption.reached())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


def test_the_exit_asks_to_be_tried_again():
    with pytest.raises(SystemExit, match="after step 3") as stopped:
        raise Preempted("after step 3")
    assert stopped.value.code == PREEMPTED == os.EX_TEMPFAIL


def test_one_process_agrees_with_itself():
    assert processes.leads()
    assert processes.broadcast(b"abc") == b"abc"
    assert processes.from_leader(lambda: (1, {"a": 2})) == (1, {"a": 2})
    with pytest.raises(KeyError):
        processes.from_leader(lambda: {}["missing"])
    assert [processes.anywhere(flag) for flag in (True, False)] == [True, False]


def test_what_lies_on_many_devices_is_whole_on_the_host():
    mesh = jax.make_mesh((8,), ("data",))
    array = np.arange(16.0, dtype=np.float32)
    divided = jax.device_put(array, jax.NamedSharding(mesh, jax.P("data")))
    found = processes.whole({"a": divided, "b": array})
    assert type(found["a"]) is np.ndarray
    np.testing.assert_array_equal(found["a"], array)
    np.testing.assert_array_equal(found["b"], array)


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 200, 1050])
def test_what_is_broadcast_goes_in_pieces(monkeypatch, length):
    """So that neither its length nor the devices' memory bounds it."""
    sent = []

    def one_to_all(array):
        sent.append(array.nbytes)
        return array

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", one_to_all)
    monkeypatch.setattr(processes, "_PIECE_BYTES", 100)
    data = bytes(i % 251 for i in range(length))
    assert processes.broadcast(data) == data
    assert max(sent) <= 100
