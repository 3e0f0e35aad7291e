"""A recipe for data of one's own, with a line on every key: what the columns look like decides the task."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from mixtura.config import UserError, data_overrides, load_recipe, preset_path, recipe_to_dict
from mixtura.config.describe import SECTIONS, keys_of, written
from mixtura.config.languages import language_of_column
from mixtura.config.schema import TomlTable
from mixtura.data.chats import holds_turns, question_columns
from mixtura.data.formats.exchange_files import MEMORIES, memory_variants
from mixtura.data.formats.labelled_files import begins_with_label
from mixtura.data.formats.rows import Row, find_cell, joined_columns
from mixtura.data.formats.table_files import TABLES, file_rows
from mixtura.data.formats.text_files import ending, local_files
from mixtura.data.label_names import label_set
from mixtura.data.labelled import MOST_LISTED

LOOKED_AT = 2_000
"""How many rows are read to tell texts from labels."""
MOST_NAMED = 6
"""Folders that are named."""
_PRESETS = {
    "pretraining": "quick",
    "translation": "translation-quick",
    "classification": "classification-quick",
    "chat": "chat-quick",
}
_CHATS = "messages"
"""The column of chats, if none is named."""


class Look(NamedTuple):
    """What the first rows of a table have in a column."""

    column: str
    values: list[object]

    @property
    def texts(self) -> list[str]:
        """The values that are text."""
        return [value for value in self.values if isinstance(value, str) and value.strip()]

    @property
    def mean_length(self) -> float:
        """Characters of a text."""
        return sum(map(len, self.texts)) / max(1, len(self.texts))

    @property
    def labels(self) -> set[str]:
        """The classes that its values would be."""
        return {label for value in self.values for label in label_set(value, None) or ()}

    @property
    def is_label(self) -> bool:
        """Whether it repeats a few values."""
        number = len(self.labels)
        return 2 <= number <= max(MOST_LISTED, len(self.values) // 10) and 2 * number <= len(self.values)

    @property
    def is_text(self) -> bool:
        """Whether nearly all its values are texts of their own."""
        return 2 * len(self.texts) > len(self.values) and len(set(self.texts)) > len(self.texts) / 2


def sketch_recipe(
    data: Path | None, *, task: str | None = None, columns: str | None = None, pairs: str | None = None, name: str
) -> str:
    """A recipe as commented TOML: a preset of the task, with the data of one's own in it.

    Args:
        data: a text or a table, or a folder of them; None is the preset's own data.
        task: "pretraining", "translation", "classification" or "chat"; None is what the columns look like.
        columns: two names, separated by a comma; None finds them.
        pairs: directions of translation; None takes column names that are languages.
        name: of the recipe.

    Raises:
        UserError: the data cannot be read, or has no such columns.
    """
    if task is not None and task not in _PRESETS:
        raise UserError(f"There is no task '{task}': choose one of {', '.join(_PRESETS)}.")
    looks: list[Look] = []
    about = []
    files: list[Path] = []
    if data is not None:
        files, _ = local_files(str(data), (".txt", *TABLES, *MEMORIES))
        many = "1 file" if len(files) == 1 else f"{len(files)} files"
        about.append(f"{many}, {sum(file.stat().st_size for file in files):,} bytes.")
        if ending(files[0]) in (*TABLES, *MEMORIES):
            looks = _look(files[0], (columns or "").split(","))
            about.append(f"Columns of {files[0].name}, in {len(looks[0].values):,} rows: {_listed_columns(looks)}.")
        elif task is None and (folders := sorted({file.parent.name for file in files if file.parent != data}))[1:]:
            few = f"{', '.join(folders[:MOST_NAMED])}{', ...' if len(folders) > MOST_NAMED else ''}"
            about.append(f"They lie in folders ({few}): with --task classification, these are the classes.")
    _check_columns(columns, looks)
    labelled = len(files) == 1 and ending(files[0]) == ".txt" and begins_with_label(files[0])
    task = task or ("classification" if labelled else _task(looks, pairs))
    overrides = [] if data is None else _overrides(task, data, looks, columns, pairs)
    if files and ending(files[0]) in MEMORIES:  # which names languages, not columns
        overrides = [each for each in overrides if "_column=" not in each]
    recipe = load_recipe(preset_path(_PRESETS[task]), [f"name={json.dumps(_folder_name(name))}", *overrides])
    table = recipe_to_dict(recipe)
    if data is not None:
        table["data"].pop("part", None)  # of the movie reviews
    table["description"] = f"My {task}." if data is not None else table["description"]
    head = [
        f"# A recipe for {task}, written by `mixtura init`; `mixtura keys` lists all keys.",
        *(f"# {' '.join(line.split())}" for line in about),  # a name with a line break must not end the comment
    ]
    return "\n".join([*head, *_written(table, task, _shown(task, overrides))]) + "\n"


def _check_columns(columns: str | None, looks: list[Look]) -> None:
    names = [look.column for look in looks]
    asked = [column.strip() for column in columns.split(",")] if names and columns is not None else []
    for column in (part for each in asked for part in joined_columns(each, names)):
        # "messages.content" is a place inside a column.
        if column not in names and column.partition(".")[0] not in names:
            raise UserError(f"--columns has '{column}', which is no column: name some of {', '.join(names)}.")


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w. -]", "_", name).lstrip("_. -") or "mine"


def _look(file: Path, asked: list[str]) -> list[Look]:
    names = pq.read_schema(file).names if ending(file) == ".parquet" else ()
    is_memory = ending(file) in MEMORIES
    found = map(_as_row, memory_variants(file)) if is_memory else file_rows(file, [*names, *asked])
    rows = list(islice(found, LOOKED_AT))
    columns = list(dict.fromkeys(column for row in rows for column in _columns(row.values)))
    if not columns:
        raise UserError(f"'{file}' has no rows: give one that has.")
    return [Look(column, [find_cell(row, column)[1] for row in rows]) for column in columns]


def _as_row(values: Mapping[str, object]) -> Row:
    return Row(values, "")


def _columns(values: Mapping[str, object]) -> Iterator[str]:
    """The columns of a row; an object in a cell has those of its keys, as translations come."""
    for name, value in values.items():
        yield from (f"{name}.{key}" for key in value) if isinstance(value, Mapping) and value else [name]


def _listed_columns(looks: list[Look]) -> str:
    return "; ".join(
        f"{look.column} ({len(look.labels)} different values)"
        if look.is_label
        else f"{look.column} (about {look.mean_length:.0f} characters)"
        for look in looks
    )


def _task(looks: list[Look], pairs: str | None) -> str:
    names = {look.column for look in looks}
    if _chats(looks) is not None or question_columns(names) is not None:
        return "chat"
    texts = [look for look in looks if look.is_text]
    if len(texts) >= 2 and (pairs is not None or len(_languages(texts)) >= 2):
        return "translation"
    return "classification" if texts and any(look.is_label for look in looks) else "pretraining"


def _chats(looks: list[Look]) -> str | None:
    """The column of chats: of that name, or of any name where the cells are chats."""
    if any(look.column == _CHATS for look in looks):
        return _CHATS
    return next((look.column for look in looks if any(map(holds_turns, look.values))), None)


def _languages(texts: list[Look]) -> dict[str, Look]:
    """The first column of each language that a name says, in order."""
    found: dict[str, Look] = {}
    for look in texts:
        # "id" is Indonesian, and more often the name of a row.
        is_name = look.column.casefold() == "id" and not any(" " in text for text in look.texts)
        if not is_name and (code := language_of_column(look.column)) is not None:
            found.setdefault(code, look)
    return found


def _overrides(task: str, data: Path, looks: list[Look], columns: str | None, pairs: str | None) -> list[str]:
    texts = sorted((look for look in looks if look.is_text), key=lambda look: -look.mean_length)
    if task == "pretraining":
        text = columns or (texts[0].column if texts else "text")
        changes = ['data.source="local"', f"data.path={json.dumps(str(data))}"]
        return changes + ([f"data.text_column={json.dumps(text, ensure_ascii=False)}"] if looks else [])
    if task == "chat":
        columns = columns or _chat_columns(data, looks)
        return data_overrides(task, data=str(data), columns=columns, pairs=None, base=None)
    if columns is None and (looks or task == "translation"):
        in_order = [look for look in looks if look in texts]
        if pairs is None and len(named := _languages(in_order)) >= 2:
            in_order = list(named.values())
        chosen = in_order[:2] if task == "translation" else texts[:1] + _labels(looks)[:1]
        if len(chosen) < 2:
            wanted = "two columns of sentences" if task == "translation" else "a column of texts and one of classes"
            raise UserError(f"No {wanted} can be told apart in '{data}': name them with --columns.")
        columns = ",".join(look.column for look in chosen)
    if task == "translation" and pairs is None and columns is not None:
        codes = [language_of_column(column) for column in columns.split(",")]
        if len(codes) != 2 or None in codes or codes[0] == codes[1]:
            raise UserError(
                f"The languages of the columns {columns} are not in their names: give --pairs, such as en-de."
            )
        pairs = "-".join(map(str, codes))
    return data_overrides(task, data=str(data), columns=columns, pairs=pairs, base=None)


def _chat_columns(data: Path, looks: list[Look]) -> str | None:
    """What --columns would say; None where the chats are in the column that is read unless another is named."""
    if (chats := _chats(looks)) is not None:
        return None if chats == _CHATS else chats
    if (found := question_columns(look.column for look in looks)) is None:
        raise UserError(
            f"No chats, and no column of questions beside one of answers, can be told apart in '{data}': name two with "
            "--columns, PROMPT,COMPLETION."
        )
    return ",".join(found)


def _labels(looks: list[Look]) -> list[Look]:
    return sorted((look for look in looks if look.is_label), key=lambda look: len(look.labels))


def _shown(task: str, overrides: list[str]) -> set[str]:
    """Dotted keys worth a line: those that the preset sets, those of the data, and what is often changed."""
    own = {override.partition("=")[0] for override in overrides}
    own |= set(_dotted(tomllib.loads(preset_path(_PRESETS[task]).read_text(encoding="utf-8")), ""))
    often = {"training.steps", "training.batch_size", "training.learning_rate", "training.dtype", "seeds", "baseline"}
    return own | often


def _dotted(table: TomlTable, where: str) -> Iterator[str]:
    for key, value in table.items():
        place = f"{where}.{key}".lstrip(".")
        yield from _dotted(value, place) if isinstance(value, dict) else [place]


def _written(table: TomlTable, task: str, shown: set[str]) -> list[str]:
    """The lines of the table, sections after plain keys, without rarely changed keys that have their default."""
    lines: list[str] = []
    _write(table, "", task, shown, lines)
    return lines


def _write(table: TomlTable, where: str, task: str, shown: set[str], lines: list[str]) -> None:
    section = re.sub(r"^arms\.[^.]+", "arms.NAME", where)
    kinds = [each for each in SECTIONS if each.name == section]
    keys = {key.name: key for key in keys_of(_best(kinds, task).holds)} if kinds else {}
    plain = {name: value for name, value in table.items() if not isinstance(value, dict)}
    chosen = {
        name: value
        for name, value in plain.items()
        if name not in keys or written(value) != keys[name].default or f"{where}.{name}".lstrip(".") in shown
    }
    if where and (chosen or section == "arms.NAME"):
        lines += ["", f"[{where}]"]
    for name, value in chosen.items():
        if name in keys and keys[name].says:
            lines.append(f"# {keys[name].says}")
        lines.append(f"{name} = {written(value)}")
    for name, value in table.items():
        if isinstance(value, dict):
            _write(value, f"{where}.{name}".lstrip("."), task, shown, lines)


def _best(kinds: list[Any], task: str) -> Any:
    return next((each for each in kinds if task in each.kind), kinds[0])
