"""Import directions: the rooms of the package stand in one order without circles, and the core is arrays and trees only."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IMPORTS_TORCH

PACKAGE = Path(__file__).resolve().parents[1] / "neuroada_jax"
# docs/design.md draws this order: a room imports rooms that stand before it, and no others.
ORDER = [
    *("errors", "locks", "files", "credentials", "console"),
    *(
        "core",
        "devices",
        "data",
        "tasks",
        "models",
        "linen",
        "nnx",
        "equinox",
        "pretrained",
        "generation",
        "adapters",
        "evaluation",
    ),
    *("training", "sharing", "session", "fine_tuning", "planning", "sweeping", "commands", "cli"),
]


@functools.cache
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


def test_every_room_has_its_place():
    assert rooms().keys() == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_to_earlier_rooms(room):
    later = ORDER[ORDER.index(room) :]
    assert not rooms()[room] & set(later)


def test_the_core_imports_no_other_room():
    assert rooms()["core"] == {"errors"}


def test_the_core_needs_neither_flax_nor_transformers():
    others = ("flax", "transformers", "optax", "equinox")
    script = f"import sys, neuroada_jax; print([name for name in {others} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_commands_import_what_they_need_when_they_run():
    """transformers alone takes seconds, and warns where there is no PyTorch unless cli.py has been imported before."""
    others = ("flax", "transformers", "optax", "datasets", "matplotlib")
    script = f"import sys, neuroada_jax.cli; print([name for name in {others} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["neuroada_jax", "benchmarks", "train", "docs"])
def test_files_and_functions_can_be_read_in_one_sitting(folder):
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path} has more than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name} has more than 80 lines"


def test_files_that_run_without_pytorch_import_none_that_needs_it():
    """conftest.py skips the files that import PyTorch; a file that imports one of those would end `make test-newest`."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")}
    need = {name for name, text in texts.items() if IMPORTS_TORCH.search(text)}
    imported = {name: set(re.findall(r"^(?:from|import) (test_\w+)", text, re.MULTILINE)) for name, text in texts.items()}
    assert need and {name for name in texts.keys() - need if imported[name] & need} == set()
