"""What can be imported with how little installed. Each check runs in a fresh interpreter that hides packages."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mixtura"
EXTRAS = [
    *("pytest", "pytest_cov", "xdist", "hypothesis", "coverage", "ruff", "pyright", "importlinter", "grimp"),
    *("codespell_lib", "pre_commit", "build", "mkdocs", "material", "playwright"),
]

# Run as files by the interpreter of a serving engine, whose packages are not ours; they import nothing of Mixtura.
ENGINE_SCRIPTS = {"run_vllm.py", "run_llama_cpp.py"}
# Torch's builds for CUDA require it, others lack it; modules named after it are imported where it is installed only.
BROUGHT_BY_TORCH = {"triton"}

IMPORT_HIDING = """
import importlib, pkgutil, sys, warnings

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
for name in WANTED:
    module = importlib.import_module(name)
    for child in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if not child.name.endswith("__main__") and ".engine_" not in child.name and ".triton_" not in child.name:
            importlib.import_module(child.name)
loaded = HIDDEN & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


def _import_without(hidden: list[str], wanted: list[str]) -> None:
    program = f"HIDDEN = {set(hidden)!r}\nWANTED = {wanted!r}\n{IMPORT_HIDING}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE_"))}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr


def test_every_module_imports_without_extras() -> None:
    _import_without(EXTRAS, ["mixtura"])


def test_layers_import_with_torch_alone() -> None:
    _import_without(
        ["transformers", "tokenizers", "datasets", "accelerate", "pandas", "scipy", "plotly", "matplotlib", "typer"],
        ["mixtura.layers", "mixtura.kernels"],
    )


def test_planning_imports_without_torch() -> None:
    _import_without(["torch", "transformers", "numpy", "pandas"], ["mixtura.config", "mixtura.planning"])


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {_normal(re.split(r"[<>=\[; ]", requirement)[0]) for requirement in project["dependencies"]}
    distributions = packages_distributions()
    undeclared = {
        name
        for name in _imported_packages()
        if not {_normal(distribution) for distribution in distributions.get(name, [name])} & declared
    }
    assert not undeclared


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


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
