"""Questions about Python's own library and their answers, from the docstrings that every installation has.

The files are parsed, never run. A question names a function or class with its parameters, and the answer is the first
paragraph of its docstring. Python's licence covers them; the answers differ a little between Python's versions.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
_LONGEST_ANSWER, _SHORTEST_ANSWER, _LONGEST_SIGNATURE = 240, 20, 90


def python_questions() -> Iterator[tuple[str, str]]:
    """Every question with its answer, in the order of the files; an answer comes once."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        place = file.relative_to(library)
        if _LEFT_OUT.intersection(place.parts) or any(part.startswith("_") for part in place.parts[:-1]):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # a file that is broken on purpose, or not UTF-8
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        for name, answer in _documented(tree.body, ""):
            if answer not in seen:
                seen.add(answer)
                yield f"In Python's module {module}, what is {name}?", answer


def _documented(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Functions and classes that have a docstring of a usual length, with their parameters."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        signature = f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, f"{signature}.")
            signature = f"the class {signature}"
        else:
            signature += f"({ast.unparse(node.args)})"
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        answer = " ".join(paragraph.split())
        if _SHORTEST_ANSWER <= len(answer) <= _LONGEST_ANSWER and len(signature) <= _LONGEST_SIGNATURE:
            yield signature, answer
