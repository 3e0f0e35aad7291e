"""The shape of the code: import direction, sizes, docstrings, names, and what no module may do."""

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtura.config.families import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mixtura"
MODULES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in MODULES]
OWN_FILES = sorted(path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_DEPTH = 3
MAX_MODULES = 16
MAX_FAMILY_LINES = 150
UNTYPED, MAX_UNTYPED_LINES = "dict[str, Any]", 50
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core", "lib"}
# Verbs import what they run, so that `mixtura --help` is quick; everything else says at its top what it needs.
MAY_IMPORT_LATE = {
    "__init__.py",
    "cli/__init__.py",
    "cli/mistakes.py",
    "cli/train.py",
    "cli/machine.py",
    "cli/use.py",
    "cli/convert.py",
    "cli/application.py",
    "exporting/run_llama_cpp.py",  # the converter lies where the request says
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}

Function = ast.FunctionDef | ast.AsyncFunctionDef

each_module = pytest.mark.parametrize("path", MODULES, ids=IDS)


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions of a module, and the public methods of those classes, with their dotted names."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def _decorators(node: ast.ClassDef | Function) -> set[str]:
    names = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return {ast.unparse(name).rpartition(".")[2] for name in names}


def _arguments(node: Function) -> Iterator[ast.arg]:
    arguments = node.args
    optional = [arguments.vararg, arguments.kwarg]
    yield from (
        arg
        for arg in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, optional)]
        if arg.arg not in ("self", "cls")
    )


def test_imports_point_one_way() -> None:
    """The contracts are in pyproject.toml, under [tool.importlinter]."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@each_module
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@each_module
def test_functions_are_short(path: Path) -> None:
    long = {
        function.name: lines
        for function in _functions(_parse(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


@each_module
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = _parse(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    missing = [
        name for name, node in _public(tree.body) if not ast.get_docstring(node) and "overload" not in _decorators(node)
    ]
    assert not missing


@each_module
def test_public_signatures_are_annotated(path: Path) -> None:
    bare = [
        f"{name}({argument.arg})"
        for name, node in _public(_parse(path).body)
        if isinstance(node, Function)
        for argument in _arguments(node)
        if argument.annotation is None
    ]
    bare += [
        f"{name} -> ?"
        for name, node in _public(_parse(path).body)
        if isinstance(node, Function) and node.returns is None
    ]
    assert not bare


@each_module
def test_imports_stand_at_the_top(path: Path) -> None:
    if str(path.relative_to(SOURCE)) in MAY_IMPORT_LATE:
        return
    late = [
        f"line {node.lineno} in {function.name}"
        for function in _functions(_parse(path))
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not late


def test_modules_are_named_after_a_part_of_the_subject() -> None:
    named = {part.removesuffix(".py").strip("_") for path in MODULES for part in path.relative_to(SOURCE).parts}
    assert not named & FORBIDDEN_NAMES


def _rooms() -> dict[Path, list[str]]:
    """The modules of every folder, by name."""
    rooms: dict[Path, list[str]] = {}
    for path in MODULES:
        if not path.name.startswith("__"):
            rooms.setdefault(path.parent, []).append(path.stem)
    return rooms


def test_a_folder_has_few_modules() -> None:
    assert {str(room): len(names) for room, names in _rooms().items() if len(names) > MAX_MODULES} == {}


def test_no_module_repeats_the_name_of_its_folder() -> None:
    assert [f"{room.name}/{name}" for room, names in _rooms().items() for name in names if name == room.name] == []


def test_a_name_means_one_thing() -> None:
    """Only sibling rooms may each have a module of one name, which then plays the same part in each."""
    places: dict[str, set[Path]] = {}
    for room, names in _rooms().items():
        for name in names:
            places.setdefault(name, set()).add(room.parent if room.parent.name == "tasks" else room)
    assert {name: rooms for name, rooms in places.items() if len(rooms) > 1} == {}


def test_a_family_can_be_read_at_once() -> None:
    layers = {facts.layer.partition(":")[0].rpartition(".")[2] for facts in FAMILIES.values()}
    lengths = {
        name: len((SOURCE / "layers" / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in layers
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FAMILY_LINES} == {}


def test_results_and_settings_are_typed() -> None:
    untyped = [path for path in MODULES for line in path.read_text(encoding="utf-8").splitlines() if UNTYPED in line]
    assert len(untyped) < MAX_UNTYPED_LINES


def test_packages_are_not_nested() -> None:
    deep = [path for path in MODULES if len(path.relative_to(SOURCE).parts) > MAX_DEPTH]
    assert not deep


def test_every_package_folder_says_what_it_is() -> None:
    bare = {path.parent for path in MODULES if not (path.parent / "__init__.py").is_file()}
    assert not bare


@each_module
def test_nothing_loads_code_from_files(path: Path) -> None:
    """No pickle in any form, torch.load with weights only, no shell, no YAML that makes objects, no code of a model."""
    tree = _parse(path)
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & UNSAFE_MODULES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert settings.get("trust_remote_code", "False") == "False", f"line {call.lineno}: remote code"
        assert settings.get("allow_pickle", "False") == "False", f"line {call.lineno}: pickle"
        if ast.unparse(call.func) == "torch.load":
            assert settings.get("weights_only") == "True", f"line {call.lineno}: torch.load without weights_only=True"
        assert ast.unparse(call.func) not in RUNS_TEXT, f"line {call.lineno}: runs text as code"
        assert settings.get("shell", "False") == "False", f"line {call.lineno}: a shell"
        automatic = re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(call.func))
        assert not automatic or "trust_remote_code" in settings, f"line {call.lineno}: asks whether to run code"


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_comments_are_ascii(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    foreign = [token.start[0] for token in tokens if token.type == tokenize.COMMENT and not token.string.isascii()]
    assert not foreign


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_comment_keeps_a_task_for_later(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    notes = [
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string)
    ]
    assert not notes
