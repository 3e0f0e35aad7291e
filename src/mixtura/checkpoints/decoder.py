"""A checkpoint as our decoder in memory, to be trained on: one of our own, or a dense stock model."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch

from mixtura.checkpoints.pretrained import resolve_base
from mixtura.checkpoints.source import open_source, read_json
from mixtura.config import UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM


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
        settings = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, found = _read(MixtureForCausalLM, folder, name, **settings)
        # transformers fills what is missing with random numbers. What training adds starts as that of zeros.
        added = (".expert_bias", ".population.")
        for tensor in sorted(key for key in found["missing_keys"] if not any(part in key for part in added)):
            raise UserError(f"The checkpoint '{name}' is damaged: {tensor} is missing; make or fetch it again.")
        return model
    source = open_source(name)
    model = MixtureForCausalLM(config)
    state = {tensor: source.tensor(tensor).float() for tensor in source.files}
    model.load_state_dict(state, strict=False)  # `open_source` has compared names and shapes
    model.tie_weights()
    return model


def weights_digest(name: str) -> str:
    """A hash over the weight files of a checkpoint: another one under the same name has another.

    Raises:
        UserError: see `decoder_config`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((_own_folder(name) or open_source(name).folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def count_parameters(config: MixtureConfig) -> int:
    """Parameters of a decoder, its attention's biases and norms among them; found without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MixtureForCausalLM(config).parameters())


def probe_config(config: MixtureConfig) -> MixtureConfig:
    """The configuration with one layer of each family: what leaks does so in any layer of a family."""
    families = config.mlp_layer_types or []
    kept = sorted(families.index(family) for family in set(families))
    settings = {
        key: [value[depth] for depth in kept] if isinstance(value, list) and len(value) == len(families) else value
        for key, value in config.to_dict().items()
        if key not in ("expert_names", "eos_token_id")
    }
    return MixtureConfig.from_dict(settings | {"num_hidden_layers": len(kept)})


def _own_folder(name: str) -> Path | None:
    """The folder, if it is one that Mixtura wrote."""
    folder = Path(resolve_base(name))
    if not (folder / "config.json").is_file():
        return None
    return folder if read_json(folder / "config.json", name).get("model_type") == "mixtura" else None


def _read(kind: Any, folder: Path, name: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **settings)
    except Exception as error:  # files and parsers raise many unrelated classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(f"The checkpoint '{name}' cannot be loaded ({reason}): make or fetch it again.") from error
