"""Mistakes in a recipe, found before the command line is built, and said in the words that the user typed.

Flags of the verb take the place of keys of a recipe that is not the user's own. Typer is not imported here: it costs
more than reading a recipe does.
"""

import re
from collections.abc import Sequence
from pathlib import Path

_DATA = {
    **dict.fromkeys(("data.path", "data.name", "data.source"), "--data"),
    **dict.fromkeys(
        (
            *("data.source_column", "data.target_column", "data.text_column", "data.label_column"),
            *("data.source_language_column", "data.target_language_column"),
            *("data.prompt_column", "data.completion_column", "data.messages_column"),
        ),
        "--columns",
    ),
    "data.pairs": "--pairs",
}
_FLAGS = {
    "finetune": {**_DATA, "base.name": "--base"},
    "init": _DATA,
    "advise": {"data.path": "--text"},
    "train": {"data.path": "--text", "data.source": "--text", "arms.model.init_from": "--from"},
}
_READ_RECIPES = ("compare", "plan", "train")
"""Verbs whose first argument is a recipe."""
_LEAVE_RECIPES = {
    *("--out", "--resume", "--no-resume", "--dry-run", "--open", "--arms-in-parallel"),
    *("--arm", "--seed", "--hardware", "--json"),
}
"""Flags of these verbs that do not change it."""
_KEY = re.compile(r"'((?:data|base|model|training|search|arms)\.[\w.-]+)'")


def name_flags(message: str, arguments: Sequence[str]) -> str:
    """A message about a recipe's keys, for someone who may not have written the recipe.

    A key that a flag of the verb sets is named by the flag where that was given, or where there is no recipe of the
    user's own; another key is named as `--set` takes it where there is none.

    Args:
        message: such as "'data.label_column' is ...".
        arguments: of the command, the verb first.
    """
    verb = arguments[0] if arguments else ""
    own = any(argument.endswith(".toml") for argument in arguments[1:])
    flags = _FLAGS.get(verb, {})
    given = {argument.partition("=")[0] for argument in arguments}
    if verb not in ("compare", *_FLAGS):
        return message

    def word(match: re.Match[str]) -> str:
        key = match[1]
        by_flag = key in flags and (not own or flags[key] in given)
        if not by_flag and (own or verb in ("init", "advise")):  # which have no --set
            return match[0]
        if not _is_key(key) and not message[: match.start()].endswith("Unknown recipe key "):
            return match[0]
        return flags[key] if by_flag else f"--set {key}"

    # Two keys that one flag sets, such as both columns, are named once; "set --set KEY to" is no English.
    named = re.sub(r"(--[a-z]+)(?:(?:, | and | or )\1\b)+", r"\1", _KEY.sub(word, message))
    return re.sub(r"\bset (--set [\w.-]+) to\b", r"use \1 with", named)


def _is_key(dotted: str) -> bool:
    """Whether it is a key of a recipe, and no file such as model.gguf; names of arms may be any."""
    from mixtura.config.describe import SECTIONS, keys_of

    section, _, key = dotted.rpartition(".")
    return section.startswith("arms.") or any(
        key == each.name for found in SECTIONS if found.name == section for each in keys_of(found.holds)
    )


def check_recipe_file(arguments: Sequence[str]) -> None:
    """Reads the recipe that a command line begins with, before typer imports pydantic, to say what is wrong in it.

    Typer does so for the first option of a verb, and it takes twice the time of everything that a mistake in a recipe
    needs. A command line of another form, such as one with flags that change the recipe, is left to its verb.

    Args:
        arguments: of the command, the verb first.

    Raises:
        UserError: see `mixtura.config.load_recipe`.
    """
    if len(arguments) < 2 or arguments[0] not in _READ_RECIPES or not arguments[1].endswith(".toml"):
        return
    flags = {argument.partition("=")[0] for argument in arguments[2:] if argument.startswith("-")}
    if not flags <= _LEAVE_RECIPES:
        return
    from mixtura.config import load_recipe

    load_recipe(Path(arguments[1]))
