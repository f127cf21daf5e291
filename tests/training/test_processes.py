"""Several processes as threads with sockets: how they meet, share, stop at one step, and what they may not have."""

import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_helpers import message_of

from neuroada_jax.data.batches import Batches
from neuroada_jax.data.examples import Examples
from neuroada_jax.errors import UserError
from neuroada_jax.training import parallel, peers, processes, rendezvous
from neuroada_jax.training.config import ParallelSection, TrainingSection
from neuroada_jax.training.signals import SharedStop, Stopped


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def meeting(address, each, wait=20.0):
    """What every (count, index) finds at the address: its peers, or the message of its error."""

    def meet(arguments):
        try:
            return rendezvous.meet(address, *arguments, wait)[0]
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(meet, each))


def test_processes_share_values_in_their_order():
    together = meeting(free_address(), [(4, index) for index in range(4)])
    assert [each.index for each in together] == [0, 1, 2, 3]

    def work(each):
        found = [each.share("a", [each.index, 0.1 * each.index]), each.share("a", None)]
        found.append(each.from_first("b", lambda: f"of {each.index}"))
        each.leave()
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, together))
    assert found == [[[[i, 0.1 * i] for i in range(4)], [None] * 4, "of 0"]] * 4


def test_processes_take_a_step_of_a_new_shape_once_all_have_compiled_it(monkeypatch):
    together, ours, order = meeting(free_address(), [(2, 0), (2, 1)]), threading.local(), []
    monkeypatch.setattr(peers, "current", lambda: ours.peers)

    class Program:
        def lower(self, state, batch):
            self.rows = len(batch[0])
            return self

        def compile(self):
            time.sleep(0.2 * ours.peers.index)
            order.append((self.rows, "compiled"))

        def __call__(self, state, batch):
            order.append((len(batch[0]), "step"))
            return state

    def work(each):
        ours.peers, program = each, processes.begun_together(Program())
        for rows in (2, 2, 3):
            assert program("state", [np.zeros(rows)]) == "state"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, together))
    for rows, steps in ((2, 4), (3, 2)):
        assert [what for size, what in order if size == rows] == ["compiled"] * 2 + ["step"] * steps


def test_one_process_is_alone():
    alone = peers.Peers()
    assert alone.is_first and alone.share("a", 3) == [3] and alone.from_first("b", lambda: 4) == 4
    alone.leave()


def test_processes_that_do_not_come_or_are_others_are_named():
    began, address = time.monotonic(), free_address()
    late = f"--coordinator {address}: process(es) 2 of 3 have not come within 1 s"
    assert meeting(address, [(3, 0), (3, 1)], wait=1.0) == [late, late]
    (found,) = meeting(address, [(2, 1)], wait=1.0)
    assert found == f"--coordinator {address}: process 0 has not come within 1 s (Connection refused)"
    assert time.monotonic() - began < 10

    twice = meeting(address, [(3, 0), (3, 1), (3, 1)])
    assert len(set(twice)) == 1 and twice[0].startswith(f"--coordinator {address}: two processes have --process 1, on ")
    others = meeting(address, [(3, 0), (2, 1)])
    assert len(set(others)) == 1 and others[0].endswith("has --processes 2, process 0 has 3")

    with socket.create_server(("", int(address.rpartition(":")[2]))) as server:
        assert "the address is in use on " in meeting(address, [(2, 0)])[0]
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        found = meeting(address, [(2, 1)])[0]
        assert found == f"--coordinator {address}: process 0 ended, or another program answers there"


def test_strangers_at_the_address_are_ignored():
    address = free_address()
    host, _, port = address.rpartition(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2{}", b""):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(meeting, address, [(2, 0)])
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection((host, int(port))) as stranger:
                        stranger.sendall(said)
                    break
                except OSError:
                    time.sleep(0.01)
            other = meeting(address, [(2, 1)])
            together = [*first.result(), *other]
        assert [each.index for each in together] == [0, 1]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(peers.Peers.leave, together))


@pytest.mark.parametrize("seed", range(12))
def test_a_request_stops_all_at_the_same_position(seed):
    """Whichever process gets the signal, and wherever each is: at a step, in a step that waits for others, in a score."""
    count, steps = 3, 40
    draw = random.Random(seed)
    together = meeting(free_address(), [(count, index) for index in range(count)])
    stops = [SharedStop(each) for each in together]
    together[0].on_notice = lambda: stops[0].request()  # as the forwarded signal does
    barrier = [threading.Barrier(count) for _ in range(steps)]
    pauses = [[draw.choice([0, 0, 0.002, 0.01]) for _ in range(steps)] for _ in range(count)]
    asked, at = draw.randrange(count), draw.randrange(steps)

    def train(each, stop):
        with stop.held():
            for step in range(steps):
                if each.index == asked and step == at and not stop.requested:
                    stop.request()
                time.sleep(pauses[each.index][step])
                if stop.reached(step, 0):
                    return step
                if step % 5 == 4:
                    barrier[step].wait(20)  # a log line: the device waits for the other processes
                if step % 7 == 6:
                    try:
                        with stop.scoring(step, 1):
                            stop.poll()
                            each.share("score", step, stop.poll)
                    except Stopped:
                        return step
                    if stop.reached(step, 1):
                        return step
            return steps

    with ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(train, together, stops))
        list(pool.map(peers.Peers.leave, together))
    assert len(set(ended)) == 1 and at <= ended[0] <= min(at + 8, steps)


ENDED = """
import io, socket, sys, time
from neuroada_jax.training import peers
ours, first = socket.socketpair()
peers.Peers(1, 2, {0: ours})
sys.stderr = io.StringIO()  # a progress bar of the main thread takes its place too
peers.send(first, {"kind": "end", "code": 2, "line": "process 0: the reason"})
time.sleep(60)
"""


def test_a_process_that_another_one_ends_says_why():
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "neuroada: error: process 0: the reason\n")


def test_outside_of_the_loop_the_first_process_alone_is_interrupted():
    together = meeting(free_address(), [(2, 0), (2, 1)])
    stops, came = [SharedStop(each) for each in together], threading.Event()
    together[0].on_notice = came.set
    stops[1].request()
    stops[1].check()
    assert came.wait(20)
    with pytest.raises(Stopped):
        stops[0].request()
    with pytest.raises(Stopped):
        stops[0].check()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(peers.Peers.leave, together))


def test_a_process_makes_its_own_rows_alone():
    offsets = np.arange(0, 45, 4)
    examples = Examples(np.arange(44, dtype=np.int32), np.arange(44) % 4 > 1, np.arange(11, dtype=np.int32), offsets, 0, 0)
    whole, part = Batches(examples, 8, 0), Batches(examples, 8, 0)
    part.own_rows = slice(2, 4)
    for index in range(2):
        wanted, found = whole.batch(0, index), part.batch(0, index)
        np.testing.assert_array_equal(found.lengths, wanted.lengths)  # what the log counts
        assert found.input_ids.shape == wanted.input_ids.shape
        for leaf, full in zip(
            (found.input_ids, found.label_ids, found.label_mask),
            (wanted.input_ids, wanted.label_ids, wanted.label_mask),
            strict=True,
        ):
            np.testing.assert_array_equal(leaf[2:4], full[2:4])
            assert not leaf[:2].any() and not leaf[4:].any()
    devices = parallel.resolve(ParallelSection(mode="shard_map"))
    assert devices.slice_of_process(TrainingSection(steps=1, batch_size=12)) == slice(0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "--processes, --process, --join-timeout: need --coordinator HOST:PORT"),
        (("host", 2, 0), "--coordinator: expected HOST:PORT or auto, found 'host'"),
        (("host:99999", 2, 0), "--coordinator: expected HOST:PORT or auto, found 'host:99999'"),
        (("host:1", None, 0), "--coordinator HOST:PORT: needs --processes and --process"),
        (("host:1", 2, 2), "--process: expected 0 to 1, found 2"),
        (
            ("auto", None, None),
            "--coordinator auto: no SLURM, Open MPI or TPU detected; give HOST:PORT, --processes and --process",
        ),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    assert message_of(lambda: processes.joined(*arguments).__enter__()) == message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "single"}, "parallel.mode: single supports one process, found 2; use shard_map, pmap or jit"),
        ({"devices": 4}, "parallel.devices: expected null or 8 (all of 2 processes), found 4"),
    ],
)
def test_what_several_processes_cannot_have(section, message):
    assert message_of(parallel.layout, ParallelSection(**section), "cpu", 8, 2) == message
    assert parallel.layout(ParallelSection(), "cpu", 8, 2) == ("shard_map", (8, 1, 1))
