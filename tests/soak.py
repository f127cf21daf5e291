"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

    make soak              (or: python tests/soak.py --kills 1:50 2:25 4:25 --seed 0)

The model is a tiny random one that is made here: nothing is downloaded. A run has one, two or four processes. It scores
a set before and after training, saves a checkpoint every few steps, and chooses its state by turns by the score of
every epoch or by validation. A kill waits for a randomly chosen stage of the run (start-up, compiling, training steps,
a half-written checkpoint, a validation, an evaluation, the end) and then a random moment longer, on the scale of the
undisturbed run, and hits one of its processes at random; the others must end by themselves within a minute (before all
have met, within their --join-timeout). Where a run ends before all kills are spent, the next run begins. The last line
is `soak: N kills, M resumes, K mismatches`; the exit code is 1 unless K is 0. The kills of a part (PROCESSES:KILLS)
depend on the seed and the part alone: a soak that was interrupted can be completed part by part.

These must be equal, byte for byte: the trained values, metrics.jsonl (and so the data of every step), the scores, all
predictions, and results.json except for times. After every kill, metrics.jsonl must consist of complete lines in order.
"""

import argparse
import itertools
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import forked
import helpers

from neuroada_jax import console

STEPS_OF_EPOCH, EPOCHS, BATCH_SIZE, SAVE_EVERY, LOG_EVERY, VALIDATE_EVERY = 12, 3, 4, 5, 3, 6
STEPS = STEPS_OF_EPOCH * EPOCHS
COMPARED = (
    "adapter/adapter.safetensors",
    "metrics.jsonl",
    "epochs.jsonl",
    "validation.jsonl",
    "predictions-some-before.jsonl",
    "predictions-some-after.jsonl",
)
CHOICES = ("evaluation", "validation")  # of the state that a run keeps; each is also the stage at which it scores one
TIMES = ("directory", "train_seconds", "tokens_per_second")
_BEFORE = b'{"step": 0,'  # how metrics.jsonl begins where the state before the training was validated
DEADLINE = 600.0  # seconds within which a stage must come and a run must end
END = 60.0  # seconds within which the other processes of a run end after a kill


class Pace(NamedTuple):
    """Seconds that the stages of an undisturbed run take on this machine.

    Attributes:
      start: from the start of the processes to config.yaml, which is written once the weights are loaded.
      compiling: from there to the first log line; the evaluation before the training is part of it.
      step: for each further step, with what is saved and scored between them.
      end: from the last log line to the end of the processes.
    """

    start: float
    compiling: float
    step: float
    end: float


class Run:
    """The processes of a run, and its files."""

    def __init__(self, config: Path, count: int, *options: str) -> None:
        self.out, self._logs = _output(config), [config.with_suffix(f".{index}.log") for index in range(count)]
        self._written = self._time_of_config()
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        several = ["--coordinator", address, "--processes", str(count), "--join-timeout", "50"] if count > 1 else []
        self.processes = []
        for index, log in enumerate(self._logs):
            number = ["--process", str(index)] if several else []
            self.processes.append(forked.start(["train", str(config), "--json", *options, *several, *number], log))
        self.began = time.monotonic()

    def lines(self) -> int:
        """Return the number of steps in metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        return content.count(b"\n") - content.startswith(_BEFORE)

    def has_begun(self) -> bool:
        """Return whether the run has written its config, which also a resumed one does."""
        return self._time_of_config() != self._written

    def _time_of_config(self) -> int:
        path = self.out / "config.yaml"
        return path.stat().st_mtime_ns if path.exists() else 0

    def saving(self) -> bool:
        """Return whether a checkpoint is half written."""
        return any((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def is_running(self) -> bool:
        """Return whether no process has ended."""
        return all(each.exitcode is None for each in self.processes)

    def wait_for(self, stage: Callable[[], bool]) -> None:
        """Wait until the stage has come or a process has ended."""
        while self.is_running() and not stage():
            if time.monotonic() - self.began > DEADLINE:
                raise SystemExit(f"soak: {self.out}: no progress in {DEADLINE:.0f} s")
            time.sleep(0.005)

    def pace(self) -> Pace:
        """Wait for the end of a fresh run; return how long its stages took."""
        marks = [self.began]
        for stage in (self.has_begun, lambda: self.lines() > 0, lambda: self.lines() == STEPS, lambda: False):
            self.wait_for(stage)
            marks.append(time.monotonic())
        start, compiling, steps, end = (later - earlier for earlier, later in itertools.pairwise(marks))
        return Pace(start, compiling, steps / STEPS, end)

    def kill_at(self, stage: str, pace: Pace, rng: random.Random) -> bool:
        """Kill a process at a stage; return False where the run had ended before."""
        time.sleep(rng.uniform(0, _STAGES[stage](self, pace, rng)))
        victim = rng.choice(self.processes)
        if not self.is_running():
            return False
        victim.kill()
        return True

    def outlived(self, pace: Pace) -> str | None:
        """Wait for the other processes after a kill; return which of them did not end by themselves, if any."""
        limit = END if self.has_begun() else END + pace.start  # they wait for one that has not come from when they meet
        deadline = time.monotonic() + limit
        for each in self.processes:
            each.join(max(0.0, deadline - time.monotonic()))
        alive = [index for index, each in enumerate(self.processes) if each.exitcode is None]
        for index in alive:
            self.processes[index].kill()
            self.processes[index].join()
        return f"processes {alive} went on for {limit:.0f} s" if alive else None

    def error(self) -> str | None:
        """Wait for the end; return the last line of the log of a process that failed."""
        for each, log in zip(self.processes, self._logs, strict=True):
            each.join(DEADLINE)
            if each.exitcode != 0:
                return [*log.read_text(errors="replace").strip().splitlines(), f"exit code {each.exitcode}"][-2:][0]
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; a line for every kill goes to standard error, the result to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", nargs="+", default=["1:50", "2:25", "4:25"], metavar="PROCESSES:KILLS")
    parser.add_argument("--seed", type=int, default=0, help="of the stages and moments (default: 0)")
    parser.add_argument("--stages", nargs="+", choices=sorted(_STAGES), default=sorted(_STAGES))
    settings = parser.parse_args(arguments)
    total = Counter[str]()
    for part in settings.kills:
        count, kills = map(int, part.split(":"))
        with tempfile.TemporaryDirectory(prefix="neuroada-soak-") as folder:
            total += soak(Path(folder), count, kills, settings.stages, random.Random(f"{settings.seed} {part}"))
    print(f"soak: {total['kills']} kills, {total['resumes']} resumes, {total['mismatches']} mismatches")
    return int(total["mismatches"] > 0)


def soak(folder: Path, count: int, kills: int, stages: Sequence[str], rng: random.Random) -> Counter[str]:
    """Train in `folder` in so many processes, with kills at the given stages; return kills, resumes and mismatches."""
    helpers.write_model(folder / "model")
    helpers.write_rows(folder / "rows.jsonl", BATCH_SIZE * STEPS_OF_EPOCH)
    choosing = {each: [stage for stage in stages if stage == each or stage not in CHOICES] for each in CHOICES}
    for choice in CHOICES:  # the first run fills the cache of compiled programs, the second one gives the pace
        run = Run(write_config(folder, f"undisturbed-{choice}", choice), count)
        pace = run.pace()
        if error := run.error():
            raise SystemExit(f"soak: the undisturbed run fails: {error}")
    killed: Counter[str] = Counter()
    resumes, mismatches = 0, 0
    for rounds, choice in enumerate(itertools.cycle(each for each in CHOICES if choosing[each]), 1):
        if killed.total() == kills:
            break
        config = write_config(folder, f"run-{rounds}", choice)
        run = Run(config, count)
        while killed.total() < kills and run.kill_at(stage := rng.choice(choosing[choice]), pace, rng):
            killed[stage] += 1
            reasons = [reason for reason in (run.outlived(pace), broken_lines(run.out)) if reason]
            mismatches += len(reasons)
            after = "; ".join([f"after {run.lines()} of {STEPS} steps", *reasons])
            console.say(f"{count} process(es), kill {killed.total()} of {kills}: {stage}, {after}")
            resumed = (run.out / "config.yaml").exists()
            resumes += resumed
            run = Run(config, count, *["--resume"] * resumed)
        if error := run.error():
            console.say(f"the run ended with: {error}")
            mismatches += 1
            continue
        differing = compare(folder / f"undisturbed-{choice}", run.out)
        mismatches += len(differing)
        verdict = f"and differs in {differing}" if differing else "equal to the undisturbed one"
        console.say(f"run {rounds} ends, {verdict}")
    by_stage = ", ".join(f"{stage} {killed[stage]}" for stage in sorted(killed))
    console.say(f"{count} process(es): {killed.total()} kills ({by_stage}), {resumes} resumes, {mismatches} mismatches")
    return Counter(kills=killed.total(), resumes=resumes, mismatches=mismatches)


# Each waits for its stage, and returns the seconds within which the kill then comes.


def _at_start(run: Run, pace: Pace, rng: random.Random) -> float:
    return pace.start


def _at_compiling(run: Run, pace: Pace, rng: random.Random) -> float:
    run.wait_for(run.has_begun)
    return pace.compiling


def _at_steps(run: Run, pace: Pace, rng: random.Random) -> float:
    before, more = run.lines(), run.lines() + rng.randrange(1, STEPS // 2)
    run.wait_for(lambda: run.lines() != before and run.lines() >= min(more, STEPS - LOG_EVERY))
    return LOG_EVERY * pace.step


def _at_a_save(run: Run, pace: Pace, rng: random.Random) -> float:
    for _ in range(rng.randrange(1, 4)):
        run.wait_for(lambda: not run.saving())
        run.wait_for(run.saving)
    return pace.step


def _at_a_validation(run: Run, pace: Pace, rng: random.Random) -> float:
    return _before_a_score(run, VALIDATE_EVERY, pace)


def _at_an_evaluation(run: Run, pace: Pace, rng: random.Random) -> float:
    return _before_a_score(run, STEPS_OF_EPOCH, pace)


def _before_a_score(run: Run, every: int, pace: Pace) -> float:
    """Wait until the step before a score is logged: the lines of a step that is scored are written after the score."""
    before = run.lines()
    logged = {
        max(step for step in range(at) if step % LOG_EVERY == 0 or step % SAVE_EVERY == 0)
        for at in range(every, STEPS + 1, every)
    }
    run.wait_for(lambda: run.lines() != before and run.lines() in logged)
    return 2 * LOG_EVERY * pace.step


def _at_the_end(run: Run, pace: Pace, rng: random.Random) -> float:
    run.wait_for(lambda: run.lines() == STEPS)
    return pace.end


_STAGES: dict[str, Callable[[Run, Pace, random.Random], float]] = {
    "start": _at_start,
    "compiling": _at_compiling,
    "steps": _at_steps,
    "save": _at_a_save,
    "validation": _at_a_validation,
    "evaluation": _at_an_evaluation,
    "end": _at_the_end,
}


def broken_lines(out: Path) -> str | None:
    """Return what is wrong with the metrics.jsonl of a killed process, if anything."""
    path = out / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        return "metrics.jsonl has half a line"
    steps = [json.loads(line)["step"] for line in content.splitlines()]
    steps = steps[content.startswith(_BEFORE) :]
    return None if steps == list(range(1, len(steps) + 1)) else "metrics.jsonl repeats or lacks a step"


def compare(undisturbed: Path, out: Path) -> list[str]:
    """Return the files that differ between two runs and should not."""

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    differing = [name for name in COMPARED if content(undisturbed / name) != content(out / name)]
    a, b = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (undisturbed, out))
    for results in (a, b):
        for field in TIMES:
            del results[field]
    return differing + ["results.json"] * (a != b)


def _output(config: Path) -> Path:
    return config.with_suffix("")


def write_config(folder: Path, name: str, choice: str) -> Path:
    """Write the config of a run whose output is `folder`/`name`, and which chooses its state by one of `CHOICES`."""
    rows = folder / "rows.jsonl"
    validation = {"validate_every": VALIDATE_EVERY, "validation_samples": 0} if choice == "validation" else {}
    content = helpers.run_config(
        folder,
        folder / "model",
        rows,
        output=str(folder / name),
        data={"max_length": 32, "buckets": [32], "validation": str(rows) if validation else None},
        bypass={"k": 2, "targets": ["q_proj", "down_proj"]},
        optimizer={"warmup_ratio": 0.1},
        training={
            "steps": None,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "log_every": LOG_EVERY,
            "save_every": SAVE_EVERY,
            "keep_best": 1,
            **validation,
        },
        evaluation={
            "sets": [{"name": "some", "data": str(rows), "limit": 8, "max_new_tokens": 2}],
            "best_epoch": None if validation else "some",
        },
    )
    return helpers.write_config(folder / f"{name}.yaml", content)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="neuroada-soak-") as compiled:
        os.environ |= {  # before the server of `forked` starts
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        sys.exit(main())
