"""What the pages name exists: files and headings of links, commands with their options, make's targets, config fields."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_architecture import ORDER

from neuroada_jax import cli
from neuroada_jax.training import config_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """Commands of the page, in fenced blocks, indented, or after a prompt, with continued lines joined."""
    text = text.replace("\\\n", " ")
    return [found.strip() for found in re.findall(r"^(?:    |\t)?(?:\$ )?((?:neuroada|make) [^\n]*)$", text, re.MULTILINE)]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # code is not a link
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links {target}"
        if heading:
            found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [anchor(line) for line in found], f"{page.name} links {target}"


@page
def test_commands_parse(page):
    parser = cli._parser()
    for line in shell_lines(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{page.name}: {line}"
            continue
        try:
            _, rest = parser.parse_known_args(words[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {line}")
        assert all("=" in word and not word.startswith("-") for word in rest), (
            f"{page.name}: {line}"
        )  # overrides of a config


@page
def test_make_targets_in_the_text_exist(page):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z0-9-]+)`", page.read_text(encoding="utf-8"))) <= set(targets)


@page
def test_whole_configs_are_read(page, tmp_path):
    for block in fenced(page.read_text(encoding="utf-8"), "yaml"):
        if "name" in (yaml.safe_load(block) or {}):
            (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
            config_file.load(str(tmp_path / "run.yaml"), [])


@pytest.fixture(scope="module")
def package_map():
    """The files that docs/design.md lists, in its order; a folder stands for its __init__.py."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.DOTALL)
    found, folder = [], ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        found.append(name + "__init__.py" if name.endswith("/") else (folder + name if line.startswith(" ") else name))
    return found


def test_the_map_names_every_file_of_the_package(package_map):
    package = ROOT / "neuroada_jax"
    assert sorted(package_map) == sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))


def test_the_map_is_in_the_order_of_imports(package_map):
    rooms = dict.fromkeys(name.split("/")[0].removesuffix(".py") for name in package_map)
    assert list(rooms) == ["__init__", *ORDER]


def test_the_readme_is_short_and_has_its_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    assert all((ROOT / picture).stat().st_size < 100_000 for picture in pictures)


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in text for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
