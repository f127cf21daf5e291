"""JAX without the device that is asked for: one line and exit code 2 from every command, before anything is written."""

import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import run_config, write_config

import neuroada_jax as na
from neuroada_jax import cli, devices
from neuroada_jax.core import platform

NO_GPU = "found no NVIDIA GPU (/dev/nvidia0 is missing: no GPU, no driver, or a container that was not given it)"
UNSET = "; unset it, or set it to cpu, to run on the CPU"
FILES = Path(__file__).parent / "fixtures" / "version_0_1"
MODEL, ADAPTER, ROWS = FILES / "decoder", FILES / "finished" / "decoder-run" / "adapter", FILES / "rows.jsonl"
ENCODER, CLASSIFIER = FILES / "encoder", FILES / "finished" / "encoder-seeds" / "seed-1" / "adapter"


@pytest.fixture
def jax_starts(monkeypatch):
    """Makes JAX start in `devices` as a test says."""

    def starts(asked, result, *, gpu=False, plugin=False, logged=None):
        calls = []

        def local_devices():
            calls.append(None)
            if logged is not None and len(calls) == 1:  # JAX starts once
                logging.getLogger("jax._src.xla_bridge").error("Jax plugin configuration error", exc_info=logged)
                os.write(2, b"a line of XLA\n")
            if isinstance(result, Exception):
                raise result
            return [result]

        fake = SimpleNamespace(local_devices=local_devices, config=SimpleNamespace(jax_platforms=asked))
        monkeypatch.setattr(devices, "jax", fake)
        monkeypatch.setattr(platform, "jax", fake)
        monkeypatch.setattr(devices, "_has_gpu", lambda: gpu)
        monkeypatch.setattr(devices, "_has_plugin", lambda: plugin)
        devices.check.cache_clear()

    yield starts
    devices.check.cache_clear()


def failed(name, why):
    return RuntimeError(f"Unable to initialize backend '{name}': {why} (set JAX_PLATFORMS='' to automatically choose one)")


def unknown(name):
    return failed(name, f"Backend '{name}' is not in the list of known backends: ['cpu', 'tpu'].")


OLD_DRIVER = RuntimeError("Unable to load CUDA. Is it installed?")
OLD_DRIVER.__cause__ = RuntimeError("operation cudaRuntimeGetVersion failed:\nthe driver is too old")


@pytest.mark.parametrize(
    "asked, error, machine, message",
    [
        ("cuda", AssertionError(), {}, f"JAX_PLATFORMS=cuda: {NO_GPU}{UNSET}"),
        ("cuda", unknown("cuda"), {"gpu": True}, "this machine has an NVIDIA GPU, but JAX's CUDA plugin is not installed"),
        ("cuda", unknown("cuda"), {"gpu": True}, 'pip install -e ".[cuda]"'),
        ("cuda", unknown("cuda"), {"gpu": True, "plugin": True, "logged": OLD_DRIVER}, "failed: the driver is too old);"),
        ("cuda", unknown("cuda"), {"gpu": True, "plugin": True, "logged": OLD_DRIVER}, "driver from 525 on"),
        (None, failed("cuda", "no devices"), {"gpu": True, "plugin": True}, "JAX: CUDA cannot be used (no devices"),
        ("gpu", unknown("rocm"), {}, "write cuda for an NVIDIA GPU, though none was found here"),
        ("gpu", unknown("rocm"), {"gpu": True}, "write cuda for an NVIDIA GPU; unset"),
        ("rocm", unknown("rocm"), {}, f"JAX_PLATFORMS=rocm: JAX's plugin for rocm is not installed{UNSET}"),
        ("tpu", failed("tpu", "no libtpu.so\nanywhere"), {}, f"JAX cannot start tpu: no libtpu.so anywhere{UNSET}"),
        ("cpu,cudaa", unknown("cudaa"), {}, "JAX_PLATFORMS=cpu,cudaa: expected platforms such as cpu, cuda"),
        ("CPU ", unknown("CPU "), {}, f"found 'CPU '; did you mean 'cpu'?{UNSET}"),
    ],
)
def test_what_was_asked_what_was_found_and_what_helps(jax_starts, capfd, asked, error, machine, message):
    jax_starts(asked, error, **machine)
    with pytest.raises(na.UserError) as caught:
        devices.check()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_cpu_in_place_of_a_gpu_is_a_warning(jax_starts, capfd):
    cpu = SimpleNamespace(platform="cpu")
    for asked in (None, "cuda,cpu"):
        jax_starts(asked, cpu, gpu=True, plugin=True, logged=OLD_DRIVER)
        with pytest.warns(
            na.errors.NeuroadaWarning, match=r"running on the CPU: CUDA cannot be used \(Unable to load CUDA"
        ):
            devices.check()
    jax_starts("cpu", cpu, gpu=True)
    with warnings.catch_warnings(action="error"):
        devices.check()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("capability, largest", [("7.5", 0), ("8.0", 128), ("9.0", 256), ("gfx90a", 0), (None, 0)])
def test_attention_of_a_gpu_is_what_its_compute_capability_allows(jax_starts, capfd, capability, largest):
    """And where it lacks flash attention, a line says so; what XLA writes when a GPU starts well is shown."""
    device = SimpleNamespace(
        platform="gpu", device_kind="Card", **({"compute_capability": capability} if capability else {})
    )
    jax_starts(None, device, gpu=True, plugin=True, logged=Exception("no error of a plugin"))
    devices.check()
    said = capfd.readouterr().err
    assert ("Card has compute capability 7.5, cuDNN's flash attention needs 8.0" in said) == (capability == "7.5")
    assert "a line of XLA" in said
    allowed = [size for size in range(1, 300) if platform.has_flash_attention(size)]
    assert max(allowed, default=0) == largest and all(size % 8 == 0 for size in allowed)


RUNS_ON_A_DEVICE = {
    "train": ["train", "run.yaml"],
    "sweep": ["sweep", "run.yaml", "data.validation=0.5", "--grid", "seed=1,2"],
    "generate": ["generate", "--model", MODEL, "--prompt", "a"],
    "evaluate": ["evaluate", "--adapter", ADAPTER, "--task", "instruct", "--data", ROWS],
    "classify": ["classify", "--adapter", CLASSIFIER, "--model", ENCODER, "--text", "a"],
    "merge": ["merge", "--adapter", ADAPTER, "--model", MODEL, "--out", "merged"],
    "lm-eval": ["lm-eval", "--model", MODEL, "--tasks", "piqa"],
}
RUNS_ON_THE_CPU = {"init", "preview", "plan", "push", "inspect", "models", "export", "import", "tasks", "schema"}


def test_every_command_says_where_it_runs():
    assert RUNS_ON_A_DEVICE.keys() | RUNS_ON_THE_CPU == set(cli._parser().commands.choices)


@pytest.mark.parametrize("command", RUNS_ON_A_DEVICE)
def test_a_command_without_its_device(jax_starts, capsys, tmp_path, monkeypatch, command):
    if command == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    write_config(Path("run.yaml"), run_config(tmp_path, MODEL, ROWS))
    jax_starts("cuda", AssertionError())
    assert cli.main([str(word) for word in RUNS_ON_A_DEVICE[command]]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "has no fields_digest" not in line]  # said of any adapter of 0.1
    assert (out, lines) == ("", [f"neuroada: error: JAX_PLATFORMS=cuda: {NO_GPU}{UNSET}"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_session_without_its_device(jax_starts):
    jax_starts("cuda", AssertionError())
    with pytest.raises(na.UserError, match="JAX_PLATFORMS=cuda: found no NVIDIA GPU"):
        na.load(MODEL)


@pytest.mark.parametrize(
    "asked, arguments, code",
    [
        pytest.param("cuda", RUNS_ON_A_DEVICE["train"], 2, marks=pytest.mark.skipif(devices._has_gpu(), reason="a GPU")),
        ("nonsense", ["inspect", MODEL], 0),
    ],
)
def test_in_a_process(tmp_path, asked, arguments, code):
    """The exceptions of this JAX, and a command that needs no device."""
    write_config(tmp_path / "run.yaml", run_config(tmp_path, MODEL, ROWS))
    command = [sys.executable, "-m", "neuroada_jax.cli", *map(str, arguments)]
    folders = [str(Path(na.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "JAX_PLATFORMS": asked, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr == (f"neuroada: error: JAX_PLATFORMS=cuda: {NO_GPU}{UNSET}\n" if code else "")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
