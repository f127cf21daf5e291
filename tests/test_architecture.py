"""Import directions: the rooms of the package form no circle, and the core is arrays and trees only."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "neuroada_jax"


def rooms() -> dict[str, set[str]]:
    """What every room (a folder, or a file beside the folders) imports of the other rooms."""
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    names -= {"__init__", "__pycache__"}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and own in graph:
                assert not node.level, f"{path}: a relative import"
                module, _, rest = (node.module or "").partition(".")
                if module == "neuroada_jax":
                    graph[own] |= ({rest.split(".")[0]} if rest else {alias.name for alias in node.names}) & names
    return {name: found - {name} for name, found in graph.items()}


def test_the_rooms_form_no_circle():
    graphlib.TopologicalSorter(rooms()).prepare()  # names the circle


def test_the_core_imports_no_other_room():
    assert rooms()["core"] == {"errors"}


def test_the_core_needs_neither_flax_nor_transformers():
    script = "import sys, neuroada_jax; print([name for name in ('flax', 'transformers', 'optax') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
