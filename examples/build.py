"""Writes the notebook of every example script: `# %%` starts a cell of code, `# %% [markdown]` one of text."""

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


def notebook_of(script: str) -> nbformat.NotebookNode:
    """The cells of a script; cell numbers as ids, so that the same script gives the same file."""
    cells = []
    for number, (markdown, body) in enumerate(
        re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.M | re.S)
    ):
        if markdown:
            cells.append(new_markdown_cell(re.sub(r"^# ?", "", body.strip(), flags=re.M), id=str(number)))
        else:
            cells.append(new_code_cell(body.strip(), id=str(number)))
    return new_notebook(cells=cells)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if (text := path.read_text(encoding="utf-8")).startswith("# %%"):
            nbformat.write(notebook_of(text), path.with_suffix(".ipynb"))
