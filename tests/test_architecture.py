"""Import directions: the core is arrays and trees only, and arrows point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "neuroada_jax"
LEVELS = [
    {"errors", "tracing", "pallas_kernels", "ops", "selection", "bypass"},
    {
        "models",
        "files",
        "console",
        "rows",
        "prompts",
        "data",
        "batches",
        "labelled",
        "gguf_header",
        "gguf_weights",
        "tokenizer",
        "safetensors_weights",
        "targets",
        "roofline",
        "collectives",
        "linen",
        "metrics",
    },
    {
        "losses",
        "weights",
        "tasks",
        "generation",
        "choices",
        "sampling",
        "decoding",
        "beams",
        "inspection",
        "formats",
    },
    {"training", "evaluation", "checkpoint", "classification", "planning", "harness"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    """The package's own top-level modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("neuroada_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found & set(LEVEL)


def test_every_module_has_its_level():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py"}
    assert modules == set(LEVEL)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    upward = {name for name in imports(path) if LEVEL[name] > LEVEL[own]}
    assert not upward, f"{path.name} (level {LEVEL[own]}) imports {upward}"


def test_the_core_needs_neither_flax_nor_transformers():
    script = "import sys, neuroada_jax; print([name for name in ('flax', 'transformers', 'optax') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
