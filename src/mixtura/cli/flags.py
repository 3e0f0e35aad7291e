"""Messages in the words that the user typed: flags of the verb in place of keys of a recipe that is not theirs."""

import re
from collections.abc import Sequence

from mixtura.config.describe import SECTIONS, keys_of

_FLAGS = {
    "finetune": {
        **dict.fromkeys(("data.path", "data.name", "data.source"), "--data"),
        **dict.fromkeys(
            (
                *("data.source_column", "data.target_column", "data.text_column", "data.label_column"),
                *("data.source_language_column", "data.target_language_column"),
            ),
            "--columns",
        ),
        "data.pairs": "--pairs",
        "base.name": "--base",
    },
    "train": {"data.path": "--text", "data.source": "--text", "arms.model.init_from": "--from"},
}
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
    if verb not in ("compare", "finetune", "train"):
        return message

    def word(match: re.Match[str]) -> str:
        key = match[1]
        if not _is_key(key) and not message[: match.start()].endswith("Unknown recipe key "):
            return match[0]
        if key in flags and (not own or flags[key] in given):
            return flags[key]
        return match[0] if own else f"--set {key}"

    # Two keys that one flag sets, such as both columns, are named once; "set --set KEY to" is no English.
    named = re.sub(r"(--[a-z]+)(?:(?:, | and | or )\1\b)+", r"\1", _KEY.sub(word, message))
    return re.sub(r"\bset (--set [\w.-]+) to\b", r"use \1 with", named)


def _is_key(dotted: str) -> bool:
    """Whether it is a key of a recipe, and no file such as model.gguf; names of arms may be any."""
    section, _, key = dotted.rpartition(".")
    return section.startswith("arms.") or any(
        key == each.name for found in SECTIONS if found.name == section for each in keys_of(found.holds)
    )
