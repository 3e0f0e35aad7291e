"""Model folders, opened: the one way from files to a model in memory, with the sentences that say what is wrong.

transformers fills what is missing or does not fit with random numbers and goes on. Here that is an error, since the
model would be another one.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.files import check_inside
from mixtura.results import Facts


def folder_settings(folder: Path) -> Facts:
    """The config.json of a model folder.

    Raises:
        UserError: there is none, it cannot be read, or a file of the folder leads out of it.
    """
    file = folder / "config.json"
    if not os.path.isfile(file):  # unlike Path's, this is False for a name that no file system takes
        raise UserError(f"'{folder}' is no model folder ({_what_else(folder)}.")
    check_inside(folder)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{file}' is damaged ({error}): copy or train the model again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{file}' is damaged (it is no JSON object): copy or train the model again.")
    return settings


def _what_else(folder: Path) -> str:
    """What a folder without a config.json is, and what to do, to stand behind a bracket."""
    if not os.path.isdir(folder):
        return "it has no config.json): give one such as .../checkpoint"
    if (folder / "classifier.json").is_file():
        return "it holds a classifier): use it with `mixtura classify`"
    if (folder / ADAPTER).is_file():
        return f"it holds an adapter alone): {adapter_advice(folder)}"
    found = next((each for depth in _DEPTHS for each in sorted(folder.glob(f"{depth}checkpoint/config.json"))), None)
    return f"it has no config.json): give one such as {found.parent if found else '.../checkpoint'}"


ADAPTER = "adapter_config.json"
_DEPTHS = ("", "*/", "*/*/", "arms/*/*/")
"""Where a run's, an arm's or a comparison's folder has its models."""


def adapter_advice(folder: Path) -> str:
    """What to do with a folder that holds a PEFT adapter and no model."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = None
    of = f" '{base}'" if base else ""
    return f"merge it into its base model{of} with PEFT's merge_and_unload, and give that model's folder"


def load_config(kind: Any, folder: Path) -> Any:
    """The configuration in a model folder, of a class of configurations or an Auto class.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    folder_settings(folder)
    # An Auto class asks on the terminal whether to run a folder's code unless it is told; other classes run none.
    asked = {"trust_remote_code": False} if kind is AutoConfig else {}
    try:
        return kind.from_pretrained(folder, local_files_only=True, **asked)
    except Exception as error:  # transformers and its strict dataclasses raise many unrelated classes
        raise UserError(
            f"The config.json of '{folder}' cannot be used ({reason_of(error)}): copy or train the model again."
        ) from error


class Opened(NamedTuple):
    """A model as transformers opens it, and the names of what its folder has not, has besides, or has otherwise."""

    model: Any
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def open_weights(kind: Any, folder: Path, **settings: Any) -> Opened:
    """Opens a model folder with `from_pretrained` of a class of models or an Auto class; raises what that raises."""
    model, found = kind.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **settings,
    )
    mismatched = sorted(name for name, *_ in found["mismatched_keys"])
    return Opened(model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), mismatched)


def load_weights(
    kind: Any, folder: Path, *, may_lack: Callable[[str], bool] = lambda name: False, **settings: Any
) -> Any:
    """The model in a folder, with all of its weights.

    Args:
        kind: a class of models, or an Auto class.
        folder: as `save_pretrained` writes it.
        may_lack: whether a folder need not have the tensor of a name; it then starts as the class makes it.
        settings: for `from_pretrained`.

    Raises:
        UserError: it cannot be read, a tensor is missing, or one has another shape than its config.json says.
    """
    folder_settings(folder)
    try:
        opened = open_weights(kind, folder, **settings)
    except Exception as error:  # transformers, safetensors and json each have their own errors for a broken file
        raise UserError(
            f"The model in '{folder}' cannot be loaded ({reason_of(error)}): train or export it again."
        ) from error
    for name in sorted(name for name in [*opened.missing, *opened.mismatched] if not may_lack(name)):
        raise UserError(
            f"The model in '{folder}' is damaged: {name} is missing or does not fit its config.json; train or export "
            "it again."
        )
    return opened.model


def load_model(folder: Path) -> tuple[Any, Any]:
    """The causal language model and the tokenizer in a folder, ready for inference.

    Raises:
        UserError: see `load_weights`; it is an encoder-decoder; or the tokenizer cannot be read.
    """
    settings = folder_settings(folder)
    if settings.get("is_encoder_decoder"):
        raise UserError(
            f"'{folder}' is an encoder-decoder, which goes on from no text: use `mixtura translate`, or transformers' "
            "AutoModelForSeq2SeqLM."
        )
    named = settings.get("architectures")
    kinds = [str(kind) for kind in named] if isinstance(named, list) else []
    if kinds and not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise UserError(f"'{folder}' holds a {kinds[0]}, which cannot write text: give a causal language model.")
    return load_weights(AutoModelForCausalLM, folder).eval(), open_tokenizer(folder)


TOKENIZER_ADVICE = "copy tokenizer.json and tokenizer_config.json there, from the model that it was made from"


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a model folder has no file of a tokenizer in it."""
    patterns = ("tokenizer*", "vocab*", "*.model", "spiece*", "*.tiktoken")
    return not any(True for pattern in patterns for _ in folder.glob(pattern))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and the tokenizers' parser raise many classes, bare Exception too
        if lacks_tokenizer(folder):
            raise UserError(f"'{folder}' has no tokenizer: {TOKENIZER_ADVICE}.") from error
        raise UserError(
            f"The tokenizer in '{folder}' cannot be loaded ({reason_of(error)}): train or export the model again."
        ) from error
