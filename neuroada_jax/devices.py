"""The devices that JAX finds: one line where it has none of those asked for, or cannot use the one that is there."""

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from neuroada_jax import console
from neuroada_jax.core import platform
from neuroada_jax.errors import UserError, install_line

_NAMES = ("cpu", "cuda", "rocm", "tpu")
_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the files by which JAX looks for a GPU before it loads CUDA
_DRIVERS = "CUDA 12 needs an NVIDIA driver from 525 on, CUDA 13 from 580 on"


@functools.cache
def check() -> None:
    """Start JAX's platform, unless it has started; to be called before the first work on arrays.

    It warns where a GPU or JAX's CUDA plugin is there and the CPU is used nonetheless, and says what a GPU lacks. What JAX
    and XLA write to standard error meanwhile, dozens of lines where CUDA cannot be loaded, is shown only where neither is
    the case.

    Raises:
      UserError: JAX cannot start the platform that JAX_PLATFORMS asks for, or any.
    """
    log = _Log()
    try:
        with log.collecting():
            device = jax.local_devices()[0]
    except Exception as error:  # JAX raises RuntimeError, or AssertionError without a message
        asked = _asked()
        place = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        remedy = "unset it, or set it to cpu, to run on the CPU" if asked else "set JAX_PLATFORMS=cpu to run on the CPU"
        raise UserError(f"{place}: {_reason(str(error), log)}; {remedy}") from None  # a traceback through all of JAX
    if device.platform == "cpu" and "cuda" in (_asked() or "cuda").split(",") and (log.has_errors() or _has_gpu()):
        console.warn(f"running on the CPU: {_cuda_reason('', log)}")
    else:
        log.show()
    capability = platform.capability()
    if capability and capability < platform.FLASH_CAPABILITY:
        has, needs = (".".join(map(str, each)) for each in (capability, platform.FLASH_CAPABILITY))
        console.say(
            f"{device.device_kind} has compute capability {has}, cuDNN's flash attention needs {needs}: attention is "
            "computed in XLA's own form, which keeps all scores of a layer"
        )


def _asked() -> str:
    """Return JAX_PLATFORMS, or what a program has set in its place; empty where JAX is to choose."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def _reason(message: str, log: "_Log") -> str:
    """Return why JAX did not start, and what helps, from the message of its exception."""
    found = re.search(r"Unable to initialize backend '(.*?)': (.*?)(?: \((?:set|you may need)|$)", message, re.DOTALL)
    # JAX skips CUDA where it sees no GPU; with no platform left it fails without a message.
    name, why = found.groups() if found else ("cuda", message)
    asked = _asked().split(",")
    if "gpu" in asked and name not in asked:
        present = "" if _has_gpu() else ", though none was found here"
        return f"JAX takes gpu for cuda and {name} together, and has no {name}; write cuda for an NVIDIA GPU{present}"
    if name == "cuda":
        return _cuda_reason(why, log)
    if "not in the list of known backends" not in why:
        return f"JAX cannot start {name}: {' '.join(why.split()).removesuffix('.')}"
    if name in _NAMES:
        return f"JAX's plugin for {name} is not installed"
    close = difflib.get_close_matches(name.strip().lower(), _NAMES, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected platforms such as {', '.join(_NAMES)}, with commas between, found {name!r}{meant}"


def _cuda_reason(why: str, log: "_Log") -> str:
    """Return why CUDA cannot be used, and what helps."""
    if not _has_gpu():
        return f"found no NVIDIA GPU ({_NVIDIA[0]} is missing: no GPU, no driver, or a container that was not given it)"
    if not _has_plugin():
        return f"this machine has an NVIDIA GPU, but JAX's CUDA plugin is not installed; {install_line('cuda')}"
    why = " ".join(("; ".join(log.errors()) or why).split())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    reason = why.removesuffix(".") or "JAX says no reason"
    return f"CUDA cannot be used ({reason}{limited}); {_DRIVERS}; {install_line('cuda')} installs its libraries"


def _has_gpu() -> bool:
    return any(Path(path).exists() for path in _NVIDIA)


def _has_plugin() -> bool:
    spec = importlib.util.find_spec("jax_plugins")
    places = list(spec.submodule_search_locations or []) if spec else []
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(places))


class _Log(logging.Handler):
    """What JAX logs and XLA writes to standard error while it starts."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self._text = b""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self._records.append(record)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect while the enclosed code runs."""
        logger = logging.getLogger("jax")
        handlers, propagate = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [self], False
        with tempfile.TemporaryFile() as file:
            own = os.dup(2)  # XLA writes to the descriptor, not to sys.stderr
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(own, 2)
                os.close(own)
                logger.handlers, logger.propagate = handlers, propagate
                file.seek(0)
                self._text = file.read()

    def has_errors(self) -> bool:
        """Return whether a plugin could not be loaded."""
        return any(record.exc_info for record in self._records)

    def errors(self) -> list[str]:
        """Return the exceptions of plugins, each followed by its cause."""
        raised = [record.exc_info[1] for record in self._records if record.exc_info and record.exc_info[1]]
        return [str(each) for error in raised for each in (error, error.__cause__) if each is not None]

    def show(self) -> None:
        """Show all of it where it would have been shown."""
        for record in self._records:
            logging.getLogger(record.name).handle(record)
        with contextlib.suppress(OSError):  # standard error may be closed
            os.write(2, self._text)
