"""A checkpoint as our decoder in memory, to be trained on: one of our own, or a dense stock model."""

import copy
from pathlib import Path
from typing import Any

import torch

from mixtura.config import UserError
from mixtura.conversion.source import open_source
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.pretrained import resolve_base


def checkpoint_folder(name: str) -> str:
    """Where the checkpoint of that name lies, or the name that the hub knows it by.

    Raises:
        UserError: it comes with a package that is not installed.
    """
    return resolve_base(name)


def decoder_config(name: str) -> MixtureConfig:
    """The configuration of our decoder that computes what the checkpoint does.

    Args:
        name: a folder that Mixtura wrote, or a dense checkpoint as `mixtura.upcycle` takes it.

    Raises:
        UserError: there is none, it cannot be read, or it is of another architecture.
    """
    folder = _own_folder(name)
    return open_source(name).config if folder is None else _read(MixtureConfig, folder, name)


def load_decoder(name: str, config: MixtureConfig) -> MixtureForCausalLM:
    """The checkpoint's weights in float32, in a decoder with `config`, which is `decoder_config`'s but for training.

    Raises:
        UserError: see `decoder_config`.
    """
    config, folder = copy.deepcopy(config), _own_folder(name)
    if folder is not None:
        # Averages of a population that the checkpoint does not keep start as those of zeros.
        return _read(MixtureForCausalLM, folder, name, config=config, dtype=torch.float32)
    source = open_source(name)
    model = MixtureForCausalLM(config)
    state = {tensor: source.tensor(tensor).float() for tensor in source.files}
    model.load_state_dict(state, strict=False)  # `open_source` has compared names and shapes
    model.tie_weights()
    return model


def _own_folder(name: str) -> Path | None:
    """The folder, if it is one that Mixtura wrote."""
    folder = Path(checkpoint_folder(name))
    if not (folder / "config.json").is_file():
        return None
    return folder if '"model_type": "mixtura"' in (folder / "config.json").read_text(encoding="utf-8") else None


def _read(kind: Any, folder: Path, name: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **settings)
    except Exception as error:  # files and parsers raise many unrelated classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(f"The checkpoint '{name}' cannot be loaded ({reason}): make or fetch it again.") from error
