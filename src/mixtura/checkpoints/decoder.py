"""A checkpoint as our decoder in memory, to be trained on: one of our own, or a dense stock model."""

import copy
import hashlib
from pathlib import Path

import torch

from mixtura.checkpoints.pretrained import resolve_base
from mixtura.checkpoints.source import open_source
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.loading import folder_settings, load_config, load_weights


def decoder_config(name: str) -> MixtureConfig:
    """The configuration of our decoder that computes what the checkpoint does.

    Args:
        name: a folder that Mixtura wrote, or a dense checkpoint as `mixtura.upcycle` takes it.

    Raises:
        UserError: there is none, it cannot be read, or it is of another architecture.
    """
    folder = _own_folder(name)
    return open_source(name).config if folder is None else load_config(MixtureConfig, folder)


def load_decoder(name: str, config: MixtureConfig) -> MixtureForCausalLM:
    """The checkpoint's weights in float32, in a decoder with `config`, which is `decoder_config`'s but for training.

    Raises:
        UserError: see `decoder_config`.
    """
    config, folder = copy.deepcopy(config), _own_folder(name)
    if folder is not None:
        return load_weights(MixtureForCausalLM, folder, may_lack=_is_added, config=config, dtype=torch.float32)
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
    return folder if folder_settings(folder).get("model_type") == "mixtura" else None


def _is_added(tensor: str) -> bool:
    """Whether training adds the tensor to a checkpoint of before; it starts as that of zeros."""
    return ".expert_bias" in tensor or ".population." in tensor
