"""A dense checkpoint that is to be upcycled or trained further, and the decoder that computes what it does.

`open_source` reads file headers only: it finds out which model the checkpoint is, and whether its files hold what that
model needs. Tensors are read when they are asked for. `load_decoder` builds our decoder with the weights in memory.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from mixtura.checkpoints.pretrained import resolve_base
from mixtura.checkpoints.tensors import COMPANIONS, StoredTensor, StoredWeights
from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.files import check_inside
from mixtura.kernels.expert_weights import check_activation
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.loading import folder_settings, load_config, load_weights
from mixtura.results import Facts

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""How weights may be stored."""
_SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout"),
)
_OWN_FIELDS = {
    "llama": ("head_dim", "attention_bias"),
    "mistral": ("head_dim", "sliding_window"),
    "qwen2": ("sliding_window", "layer_types"),
    "qwen3": ("head_dim", "attention_bias", "sliding_window", "layer_types"),
}
SOURCES = ("llama", "mistral", "qwen2", "qwen3", "mixtura")
"""Model types that can be upcycled; "mixtura" where all layers are dense and gated."""
UPCYCLE_RECEIPT = "upcycle.json"
"""The file in which an upcycled checkpoint records from which files and with which settings it was made."""
_FETCHED = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint whose files have been checked."""

    name: str
    """As the user gave it."""
    folder: Path
    config: MixtureConfig
    """Our decoder with the source's attention and dense layers: it computes what the source does, with its names."""
    weights: StoredWeights
    """Its tensors, as they are stored."""


def open_source(name: str) -> DenseSource:
    """Finds a checkpoint and checks that it is one that can be upcycled, and whole.

    Args:
        name: a folder, a hub name, or a name of `mixtura.checkpoints.pretrained.resolve_base`.

    Raises:
        UserError: there is none, its architecture is another, it is quantised, or its files do not fit its config.json.
    """
    folder = _folder(name)
    check_inside(folder, name)
    raw = read_json(folder / "config.json", name)
    config = dense_config(folder, raw, name)
    weights = StoredWeights(folder, name, fix="fetch the model again")
    try:
        expected = expected_shapes(config)
    except Exception as error:  # sizes that make no model bring many unrelated classes
        raise UserError(f"The config.json of '{name}' makes no model ({reason_of(error)}): fetch it again.") from error
    _check_tensors(weights.tensors, expected, config, name)
    source = DenseSource(name, folder, config, weights)
    _check_head(source)
    return source


def _folder(name: str) -> Path:
    folder = Path(resolve_base(name))
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        if any(folder.glob("*.gguf")):
            raise UserError(f"The folder '{name}' is a GGUF file's: give a folder in Hugging Face format.")
        folder_settings(folder)
    if folder.exists() or folder.suffix == ".gguf":
        raise UserError(f"'{name}' is a file: give a folder in Hugging Face format, with config.json and safetensors.")
    return hub_folder(
        name, _FETCHED, missing=f"There is no folder '{name}'", fix="give a folder, a hub name or smollm2"
    )


def hub_folder(name: str, patterns: Sequence[str], *, missing: str, fix: str) -> Path:
    """The folder with those files of a hub model, fetched if it is not in the cache.

    Args:
        name: on the hub.
        patterns: which files, such as "*.json".
        missing, fix: how a sentence begins and ends that says that there is no such folder here either.

    Raises:
        UserError: the hub does not give it.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client has many unrelated classes, for names, networks and permissions
        raise UserError(f"{missing}, and the hub does not give it ({reason_of(error)}): {fix}.") from error


def read_json(path: Path, name: str) -> Facts:
    """A file of the checkpoint called `name`; raises UserError where it cannot be read or is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path.name}' of '{name}' cannot be read ({error}): fetch the model again.") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path.name}' of '{name}' is no JSON object: fetch the model again.")
    return value


def dense_config(folder: Path, raw: Facts, name: str) -> MixtureConfig:
    """The configuration of our decoder that computes what the checkpoint's model does.

    Args:
        folder: has config.json.
        raw: the same file, read.
        name: what to call the model in errors.

    Raises:
        UserError: the model is another one, is quantised, or its feed-forward layers are not gated or have biases.
    """
    kind = raw.get("model_type")
    if kind not in SOURCES:
        raise UserError(f"'{name}' is a {kind!r} model: only dense {', '.join(SOURCES)} models can be upcycled.")
    if raw.get("quantization_config"):
        raise UserError(f"'{name}' is quantised: give the checkpoint in float32, bfloat16 or float16.")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and the strict dataclasses raise many unrelated classes
        raise UserError(
            f"The config.json of '{name}' cannot be used ({reason_of(error)}): fetch the model again."
        ) from error
    if getattr(config, "mlp_bias", False):
        raise UserError(f"'{name}' has biases in its feed-forward layers, which experts have not: give another model.")
    try:
        check_activation(config.hidden_act)
    except ValueError as error:
        raise UserError(f"'{name}' cannot be upcycled, as its {error}") from error
    if kind == "mixtura":
        return _own_config(config, name)
    fields = {key: getattr(config, key) for key in (*_SHARED_FIELDS, *_OWN_FIELDS[kind])}
    return MixtureConfig(**fields, attention=kind, gated=True, dtype=config.dtype)


def _own_config(config: MixtureConfig, name: str) -> MixtureConfig:
    if set(config.mlp_layer_types or []) != {"dense"} or config.intermediate_sizes or config.layer_mix:
        raise UserError(f"'{name}' is no plain dense model: only one can be upcycled.")
    if not config.gated:
        raise UserError(f"'{name}' has feed-forward layers without a gate: train it with model.gated = true.")
    return config


def expected_shapes(config: MixtureConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model with this configuration stores, found without memory for it."""
    with torch.device("meta"):
        model = MixtureForCausalLM(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state[HEAD]
    return {name: tuple(value.shape) for name, value in state.items()}


def _check_tensors(
    tensors: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], config: MixtureConfig, name: str
) -> None:
    """Refuses tensors that are missing, have another shape, are stored as integers, or belong to no dense decoder.

    Tables of rotary positions, which older checkpoints store, are left out: they follow from the configuration.
    """
    for tensor in [tensor for tensor in tensors if tensor.endswith("rotary_emb.inv_freq")]:
        del tensors[tensor]
    unused = {HEAD} & set(tensors) if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - tensors.keys()):
        tied = " although its embeddings are not tied" if missing == [HEAD] else ""
        raise UserError(f"'{name}' has no tensor '{missing[0]}'{tied}: fetch the model again.")
    if foreign := sorted(tensors.keys() - expected.keys() - unused):
        why = "biases in feed-forward layers" if ".mlp." in foreign[0] and foreign[0].endswith("bias") else "parts"
        raise UserError(f"'{name}' has {why} that cannot be upcycled, such as '{foreign[0]}': give another model.")
    for tensor, stored in sorted(tensors.items()):
        shape = expected.get(tensor)
        if shape is not None and stored.shape != shape:
            raise UserError(
                f"'{tensor}' of '{name}' has shape {stored.shape} where its config.json asks for {shape}: fetch it "
                "again."
            )
        if stored.dtype not in _DTYPES:
            raise UserError(
                f"'{tensor}' of '{name}' is stored as {stored.dtype}: give the checkpoint in float32, bfloat16 or "
                "float16, not quantised."
            )


def _check_head(source: DenseSource) -> None:
    """A tied model's head, where it is stored, has to be the embedding."""
    if not source.config.tie_word_embeddings or HEAD not in source.weights.tensors:
        return
    if not torch.equal(source.weights.read(HEAD), source.weights.read(EMBEDDING)):
        raise UserError(
            f"'{source.name}' says that its embeddings are tied, but '{HEAD}' differs from '{EMBEDDING}': set "
            "tie_word_embeddings in its config.json to false."
        )


def check_alike(sources: Sequence[DenseSource]) -> None:
    """Refuses checkpoints that cannot be averaged: another shape, attention or way to count positions.

    Raises:
        UserError: names the checkpoint and the difference.
    """
    first = sources[0]
    fields = ["attention", "sliding_window", "head_dim", "attention_bias", *_SHARED_FIELDS]
    for other in sources[1:]:
        for field in fields:
            mine, its = getattr(first.config, field), getattr(other.config, field)
            if mine != its and not field.endswith("token_id"):
                raise UserError(
                    f"'{other.name}' has {field} {its} where '{first.name}' has {mine}: only checkpoints of one shape "
                    "can become one mixture."
                )


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
    state = {tensor: source.weights.read(tensor).float() for tensor in source.weights.tensors}
    model.load_state_dict(state, strict=False)  # `open_source` has compared names and shapes
    model.tie_weights()
    return model


def weights_digest(name: str) -> str:
    """A hash over the weight files of a checkpoint, by which a changed checkpoint of the same name is noticed.

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
    """The configuration with one layer of each family, which is enough to find leaks: all its layers leak alike."""
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
    """Whether training adds the tensor, which older checkpoints lack; it then starts with zeros."""
    return ".expert_bias" in tensor or ".population." in tensor
