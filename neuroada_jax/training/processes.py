"""Runs in several processes: joining them, own output, a common first step, scores, arrays of the first, a common end."""

import contextlib
import dataclasses
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neuroada_jax import console, devices, files
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Progress, Score, Scorer
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.training import peers, rendezvous
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.peers import Peers
from neuroada_jax.training.step import AnyBatch

HEARTBEAT = 30  # seconds without a heartbeat after which JAX declares a process dead
WAIT = 120.0  # default of the seconds for all processes to come
GRACE = 6.0  # seconds in which the end of another process explains an error of JAX
CHUNK = 1 << 26  # bytes that are sent to the other processes at a time


@contextlib.contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, wait: float | None = None
) -> Iterator[Peers]:
    """Join the processes of a run for the enclosed code; yields them.

    Without a coordinator it is one process. Inside, an error of any process ends all of them: with exit code 2 for a
    UserError, else with 1.

    Args:
      coordinator: HOST:PORT of the first process, or "auto" where JAX can detect it (SLURM, Open MPI, TPU).
      processes: number of processes; None for "auto".
      process: number of this process, from 0; None for "auto".
      wait: seconds for all processes to come; None: `WAIT`.

    Raises:
      UserError: the arguments are incomplete or contradict each other, or the other processes did not join in time;
        JAX cannot start (`devices.check`).
    """
    if coordinator is None:
        if (processes, process, wait) != (None, None, None):
            raise UserError("--processes, --process, --join-timeout: need --coordinator HOST:PORT")
        devices.check()
        yield peers.current()
        return
    own = None
    if coordinator == "auto":
        coordinator, processes, process, own = _detected()
    count, index = _check(coordinator, processes, process)
    together, service = rendezvous.meet(coordinator, count, index, WAIT if wait is None else wait)
    peers.set_current(together)
    try:
        _initialize(coordinator, service, count, index, own)
        console.say(f"process {index} of {count}, {jax.local_device_count()} device(s)")
        if not together.is_first:
            console.silence()
        yield together
    except UserError as error:
        line = " ".join(str(error).split())
        together.end(2, line, f"process {index}: {line}")
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE)  # most likely another process died: its socket then ends this one
        codes = {KeyboardInterrupt: 130, BrokenPipeError: 141}
        if type(error) not in codes:
            traceback.print_exc()
        code = codes.get(type(error), 1)
        together.end(code, None, f"process {index} of {count} failed, see its own output for the reason")
    together.leave()
    jax.distributed.shutdown()
    peers.set_current(Peers())


def _initialize(coordinator: str, service: str, count: int, index: int, own: Any) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from `signals.listening`
    try:
        jax.distributed.initialize(
            service,
            count,
            index,
            local_device_ids=own,
            initialization_timeout=HEARTBEAT,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--coordinator {coordinator}: JAX cannot join the processes ({reason})") from error
    devices.check()


def _detected() -> tuple[str, int, int, Any]:
    """Return address, number of processes, number of this one and its devices, as JAX detects them."""
    from jax._src.clusters import ClusterEnv  # `initialize` detects them too, but says nothing of what it found

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(WAIT))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--coordinator auto: the processes cannot be detected ({error})") from error
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise UserError("--coordinator auto: no SLURM, Open MPI or TPU detected; give HOST:PORT, --processes and --process")
    return address, count, index, devices


def _check(coordinator: str, processes: int | None, process: int | None) -> tuple[int, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: expected HOST:PORT or auto, found {coordinator!r}")
    if processes is None or process is None:
        raise UserError("--coordinator HOST:PORT: needs --processes and --process")
    if not 0 <= process < processes:
        raise UserError(f"--process: expected 0 to {processes - 1}, found {process}")
    return processes, process


@contextlib.contextmanager
def own_output(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the config for this process: all but the first have a temporary folder, removed afterwards, and no trackers."""
    if peers.current().is_first:
        yield config
        return
    with files.scratch(Path(tempfile.gettempdir()) / "neuroada-process") as folder:
        peers.remove_at_end(str(folder))
        yield dataclasses.replace(config, output=str(folder / "run"), tracking=[])


def begun_together(program: Any) -> Callable[[Any, AnyBatch], Any]:
    """Return a jitted step that all processes begin together; for each shape of its batch they meet once it is compiled.

    The first collective operation waits for the other processes for 30 s, and one may compile for longer than another,
    which finds the program in a cache or has faster cores.
    """
    met = set[Any]()

    def call(state: Any, batch: AnyBatch) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in met:
            program.lower(state, batch).compile()  # JAX keeps it for the call
            peers.current().share("compiled", None)
            met.add(shapes)
        return program(state, batch)

    return call


def score(
    name: str,
    scorer: Scorer,
    base_model: OpenedModel,
    params: Tree,
    on_progress: Progress | None = None,
    poll: Callable[[], None] | None = None,
) -> Score:
    """Score all rows of a set, each process those of its share, with all weights.

    Args:
      name: of the set.
      scorer: of its rows.
      base_model: as in `Scorer.predict`, as are `params` and `on_progress`.
      params: see there.
      on_progress: see there; of this process's share.
      poll: called while the others are waited for; what it raises ends the waiting.
    """
    together = peers.current()
    found = scorer.predict(base_model, params, range(together.index, len(scorer.rows), together.count), on_progress)
    if together.count > 1:
        shares = together.share(f"predictions of {name}", found, poll)
        found = [shares[i % together.count][i // together.count] for i in range(len(scorer.rows))]
    return scorer.judge(found)


def broadcast(tree: Any) -> Any:
    """Return the NumPy arrays of the first process, bit for bit; the others give a tree of the same shapes and dtypes."""
    if peers.current().count == 1:
        return tree

    def sent(leaf: np.ndarray) -> np.ndarray:
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        parts = [multihost_utils.broadcast_one_to_all(flat[at : at + CHUNK]) for at in range(0, flat.size, CHUNK)]
        return np.concatenate([flat[:0], *parts]).view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(sent, tree)
