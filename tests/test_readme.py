"""README and docs are true: commands parse, code runs, paths, links, names and make targets exist."""

import contextlib
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from mixtura.cli import app
from mixtura.config import preset_path, recipe_from_dict

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("src/", "docs/", "recipes/", "tests/", "benchmarks/", "examples/", ".github/", ".ci/")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def _blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _code_spans(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def _shell_lines(page: Path) -> list[str]:
    """Command lines of sh blocks, continuations joined, and code spans."""
    blocks = "\n".join(_blocks(page, "sh")).replace("\\\n", " ")
    return [*blocks.splitlines(), *_code_spans(page)]


def _mixtura_commands(page: Path) -> list[list[str]]:
    lines = (shlex.split(line, comments=True) for line in _shell_lines(page) if line.startswith("mixtura "))
    return [words[1:] for words in lines if len(words) > 1]


def _make_targets(page: Path) -> set[str]:
    lines = (shlex.split(line, comments=True) for line in _shell_lines(page) if re.match(r"([A-Z]+=\S+ )*make ", line))
    words = {word for line in lines for word in line[line.index("make") + 1 :]}
    return {word for word in words if "=" not in word}


def test_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.partition("```")[0].split()) <= 100


@each_page
def test_commands_parse(page: Path) -> None:
    group = typer.main.get_command(app)
    for verb, *arguments in _mixtura_commands(page):
        command = getattr(group, "commands", {}).get(verb)
        assert command is not None, f"mixtura has no verb '{verb}'"
        # --help ends the parsing as soon as every other option has been understood.
        with contextlib.suppress(typer.Exit), contextlib.redirect_stdout(None):
            context = command.make_context(verb, list(arguments))
            if context.params.get("preset"):
                assert preset_path(context.params["preset"]).is_file()


@each_page
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert not _make_targets(page) - known


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in _anchors(target), f"{page.name} links to {path}#{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_paths_exist(page: Path) -> None:
    named = [span for span in _code_spans(page) if span.startswith(FOLDERS) and re.fullmatch(r"[\w./*-]+", span)]
    missing = [span for span in named if not any(ROOT.glob(span.rstrip("/")))]
    assert not missing


def test_file_tree_is_the_real_one() -> None:
    tree = next(block for block in _blocks(README, "text") if block.startswith("src/mixtura/"))
    folder, listed = ROOT, set()
    for line in tree.splitlines():
        name = line.split()[0]
        path = (folder if line.startswith(" ") else ROOT) / name
        assert path.exists(), f"the tree names {name}"
        if line.startswith(" "):
            listed.add(name.rstrip("/"))
        else:
            folder = path
    source = ROOT / "src" / "mixtura"
    parts = {path.name for path in source.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"}
    assert parts - listed == {"__init__.py", "__main__.py"}


@each_page
def test_names_of_the_package_exist(page: Path) -> None:
    for span in _code_spans(page):
        if not re.fullmatch(r"mixtura(\.\w+)+", span):
            continue
        module, _, name = span.rpartition(".")
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(span), span


@each_page
def test_python_examples_run(page: Path) -> None:
    for block in _blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


@each_page
def test_recipes_in_the_text_are_valid(page: Path) -> None:
    """Whole recipes as they stand; single sections in a minimal recipe around them."""
    around = {"name": "example", "baseline": "dense", "arms": {"dense": {"family": "dense"}}}
    for block in _blocks(page, "toml"):
        recipe_from_dict(around | tomllib.loads(block))
