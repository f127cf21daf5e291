"""Files and directories appear complete or not at all, delete nothing that is not theirs, and leave nothing; locks."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_helpers import message_of

from neuroada_jax import files
from neuroada_jax.locks import Lock, check_unlocked

WRITER = """
import sys, time
from pathlib import Path
from neuroada_jax import files, locks
kind, path = sys.argv[1], Path(sys.argv[2])
if kind == "lock":
    held = locks.Lock.acquire(path, "the run")
elif kind == "directory":
    work = files.new_directory(path, replace=True)
    (work.__enter__() / "half").write_text("x")
elif kind == "swap":  # killed while no directory has the name
    files.remove = lambda old: (path.rename(path.with_name("moved")), print("ready", flush=True), time.sleep(60))
    with files.new_directory(path, replace=True) as folder:
        (folder / "new").write_text("x")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def elsewhere():
    """Starts another process that holds a lock or a temporary; returns it once it does."""
    started = []

    def start(kind, path):
        command = [sys.executable, "-c", WRITER, kind, str(path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def write(path):
    with files.new_directory(path, replace=True) as folder:
        (folder / "a").write_text("1")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_ends_with_its_process_and_names_it(tmp_path, elsewhere):
    path = tmp_path / "lock"
    other = elsewhere("lock", path)
    message = (
        f"the run is in use by process {other.pid} on {os.uname().nodename}; wait for its end, stop it, or choose another "
        "name"
    )
    assert message_of(Lock.acquire, path, "the run") == message_of(check_unlocked, path, "the run") == message
    kill(other)
    check_unlocked(path, "the run")
    with Lock.acquire(path, "the run") as lock:
        assert f"process {os.getpid()} on " in message_of(Lock.acquire, path, "the run")
    lock.release()
    assert names(tmp_path) == []
    (tmp_path / "target").write_text("kept")
    path.symlink_to(tmp_path / "target")
    assert "cannot be written" in message_of(Lock.acquire, path, "the run")
    assert (tmp_path / "target").read_text() == "kept"


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path, elsewhere):
    live, dead = elsewhere("directory", tmp_path / "a"), elsewhere("directory", tmp_path / "a")
    elsewhere("directory", tmp_path / "b")
    kill(dead)
    (tmp_path / ".a.notes").write_text("the user's own")
    write(tmp_path / "a")
    files.write_text(tmp_path / "c", "text")
    files.probe(tmp_path)
    with files.scratch(tmp_path / "d") as folder:
        (folder / "run").mkdir()
    left = names(tmp_path)
    assert [name for name in left if not name.endswith(files.TEMPORARY)] == [".a.notes", "a", "c"] and len(left) == 5
    kill(live)
    write(tmp_path / "a")
    assert [name for name in names(tmp_path) if name.startswith(".a.")] == [".a.notes"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path, elsewhere):
    write(tmp_path / "a")
    kill(elsewhere("swap", tmp_path / "a"))
    (tmp_path / "moved").rename(tmp_path / "never")  # as if the second rename had not come
    files.sweep(tmp_path / "a")
    assert names(tmp_path / "a") == ["a"] and names(tmp_path) == ["a", "never"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_appears_at_a_destination_meanwhile_is_left_as_it_is(replace, tmp_path):
    out = tmp_path / "out"

    def work(appears):
        with files.new_directory(out, replace=replace) as folder:
            (folder / "a").write_text("1")
            appears()

    told = f"{out}: something else was put there meanwhile; it is left as it is"
    assert message_of(work, out.mkdir) == told and names(out) == []
    if replace:
        assert message_of(work, lambda: (out / "mine").write_text("mine")) == told
        assert message_of(work, lambda: (out / "mine").rename(out / "other")) == told
        work(lambda: None)
        assert names(out) == ["a"]
    assert names(tmp_path) == ["out"]


def test_permissions_are_those_of_any_new_file_and_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o600)
    before = os.umask(0o027)
    try:
        with files.new_directory(tmp_path / "out") as folder:
            (folder / "below").mkdir(mode=0o700)
            (folder / "below" / "a").write_text("1")
            (folder / "below" / "a").chmod(0o600)
            (folder / "link").symlink_to(outside)
        files.write_text(tmp_path / "text", "1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out", *tmp_path.rglob("*"))}
    assert modes == {"out": 0o750, "below": 0o750, "a": 0o640, "text": 0o640, "outside": 0o600, "link": 0o600}
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "kept").write_text("1")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    write(tmp_path / "linked")  # the link is replaced, not what it names
    assert names(tmp_path / "real") == ["kept"] and names(tmp_path / "linked") == ["a"]


def test_writers_of_one_destination_do_not_sweep_each_other(tmp_path):
    def write_many(number):
        for _ in range(150):
            files.write_bytes(tmp_path / "file", b"x")
            with files.scratch(tmp_path / "folder") as folder:
                (folder / "mine").write_text("x")
                assert names(folder) == ["mine"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write_many, range(4))) == [None] * 4
    assert names(tmp_path) == ["file"]
