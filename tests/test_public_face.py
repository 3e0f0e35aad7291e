"""What `import mixtura` offers, and what it costs: nothing is imported before it is asked for."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mixtura
from mixtura.errors import EXTRAS, need

SOURCE = Path(mixtura.__file__)
VERBS = {
    "advise",
    "calibrate",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "finetune",
    "train",
    "transition",
    "upcycle",
    "verify",
}
HEAVY = {"torch", "transformers", "numpy", "pandas", "plotly"}


def imported_by(program: str, *arguments: str) -> tuple[set[str], str]:
    """The packages that a program has imported when it ends, however it ends, and what it wrote on standard error."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("\\0" + " ".join(sys.modules)))
sys.argv = {["mixtura", *arguments]!r}
{program}
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    names = run.stdout.rpartition("\0")[2].split()
    return {name.partition(".")[0] for name in names}, run.stderr


def test_every_verb_is_a_function_with_a_signature_and_help():
    assert set(mixtura.__all__) >= VERBS
    for name in VERBS:
        verb = getattr(mixtura, name)
        signature = inspect.signature(verb)
        assert verb.__name__ == name and inspect.getdoc(verb), name
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(argument.annotation is not inspect.Parameter.empty for argument in signature.parameters.values())


def test_a_verb_stays_a_function_when_its_modules_are_imported():
    need("mixtura.exporting.stock_folder")
    assert all(inspect.isfunction(getattr(mixtura, name)) for name in VERBS)


def test_type_checkers_see_what_is_imported_later():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == mixtura._MODULES and set(mixtura.__all__) == set(seen) | {"Interrupted", "UserError"}
    assert set(mixtura.__all__) <= set(dir(mixtura))


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mixtura' has no attribute 'compar'"):
        _ = mixtura.compar


def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert not imported_by("import mixtura, mixtura.config, mixtura.planning")[0] & HEAVY


def test_the_layers_need_torch_and_nothing_of_transformers():
    packages, _ = imported_by("import mixtura.layers")
    assert "torch" in packages and not packages & {"transformers", "tokenizers", "datasets", "pandas", "plotly"}


def test_importing_the_models_teaches_the_auto_classes():
    program = "import mixtura.models; from transformers import AutoConfig; AutoConfig.for_model('mixtura')"
    assert imported_by(program)[1] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), ""),
        (("--version",), ""),
        (("compare", "--help"), ""),
        (("compar",), "No such command"),
        (("compare", "--prest"), "No such option"),
        (("compare", "{recipe}", "--set", "training.stps=3"), "Unknown recipe key 'training.stps'"),
        (("train", "{recipe}", "--arm", "dens"), "The recipe has no arm 'dens'"),
        (("finetune", "translation", "--set", "training.stps=3"), "Unknown recipe key --set training.stps"),
        (("finetune", "translatoin"), "There is no task 'translatoin'"),
    ],
)
@pytest.mark.parametrize(
    "program",
    ["from mixtura.cli import main; main()", "import runpy; runpy.run_module('mixtura', run_name='__main__')"],
    ids=["script", "module"],
)
def test_a_question_and_a_misspelling_import_no_heavy_package(program, arguments, said):
    recipe = str(Path(__file__).parents[1] / "recipes" / "quick.toml")
    packages, error = imported_by(program, *(argument.format(recipe=recipe) for argument in arguments))
    assert "mixtura" in packages and not packages & HEAVY
    assert said in error and "Traceback" not in error


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(mixtura.UserError, match=r"the package gguf, .* pip install 'mixtura\[convert\]'"):
        need("gguf")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        need("no_such_module")
    assert all(package and extra for package, extra in EXTRAS.values())
