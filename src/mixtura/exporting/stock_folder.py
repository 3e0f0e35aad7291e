"""Export of a checkpoint to an architecture that transformers, vLLM and llama.cpp know, or with its own code.

Weights go from file to file, a shard at a time. The folder is written under another name and put in place when it is
complete and, in transformers, computes what the checkpoint computes.
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import GenerationConfig

from mixtura.checkpoints.source import EMBEDDING, HEAD, expected_shapes
from mixtura.checkpoints.tensors import PlannedTensor, StoredWeights, copy_companions, write_planned
from mixtura.config import UserError
from mixtura.exporting.card import Origin, origin_of, write_card
from mixtura.exporting.containers import (
    CONFIG_MODULE,
    CONTAINERS,
    MODEL_MODULE,
    REMOTE_CODE,
    check_standalone,
    choose_container,
    plan_tensors,
    remote_code,
)
from mixtura.exporting.fields import Traits, check_deployable, traits_of
from mixtura.exporting.verification import Receipt, verify
from mixtura.files import check_empty, free_bytes, new_folder
from mixtura.models import MixtureConfig
from mixtura.models.loading import folder_settings, load_config
from mixtura.results import Facts

_SPARE_BYTES = 64 * 2**20


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    container: str
    receipt: Receipt | None
    """The comparison in transformers; None where it was not wanted."""


class _Source(NamedTuple):
    folder: Path
    config: MixtureConfig
    weights: StoredWeights
    traits: Traits


def export(
    source: Path | str,
    out: Path | str,
    *,
    to: str = "auto",
    base_model: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    check: bool = True,
) -> Exported:
    """Writes the checkpoint in `source` to the new folder `out`.

    Args:
        source: a folder that Mixtura trained or converted.
        out: a new folder, or an empty one.
        to: one of `mixtura.exporting.containers.DESTINATIONS`; "auto" takes the first that holds the model exactly.
        base_model: hub name of the model that this one was made from, for the model card.
        max_shard_bytes: size of a weight file.
        check: compare with the checkpoint in transformers before the folder is put in place; it holds both in memory.

    Raises:
        UserError: the checkpoint cannot be read or is not ours, nothing holds it exactly, there is no room, the folder
            exists, or the comparison fails.
    """
    source, out = Path(source), Path(out)
    check_empty(out)
    origin = origin_of(source, base_model)
    read = _read(source)
    check_deployable(read.config)
    container = REMOTE_CODE if to == REMOTE_CODE else choose_container(read.config, read.traits, to)
    if container == REMOTE_CODE:
        check_standalone(read.config)
    planned = _plan(read, container)
    _check_room(out, sum(tensor.bytes for tensor in planned))
    with new_folder(out) as new:
        _write(read, new, container, planned, origin=origin, max_shard_bytes=max_shard_bytes)
        receipt = verify(source, new) if check else None
        if receipt is not None and not receipt.passed:
            raise UserError(f"The export does not compute what '{source}' does: {receipt.complaint()} Nothing is kept.")
    return Exported(out, container, receipt)


def _read(folder: Path) -> _Source:
    kind = folder_settings(folder).get("model_type")
    if kind != "mixtura":
        raise UserError(f"'{folder}' holds a {kind} model, not one of Mixtura's: there is nothing to export.")
    config = load_config(MixtureConfig, folder)
    weights = StoredWeights(folder)
    _check_complete(folder, config, weights)
    return _Source(folder, config, weights, traits_of(config, weights.tensors))


def _check_complete(folder: Path, config: MixtureConfig, weights: StoredWeights) -> None:
    """Every tensor of the model is there in its shape, and no other."""
    expected = expected_shapes(config)
    if config.tie_word_embeddings and HEAD in weights.tensors:
        expected[HEAD] = expected[EMBEDDING]
    for name in sorted(expected.keys() | weights.tensors.keys()):
        stored = weights.tensors.get(name)
        if name not in expected or stored is None or stored.shape != expected[name]:
            problem = "unknown to" if name not in expected else "missing or does not fit"
            raise UserError(f"The model in '{folder}' is damaged: {name} is {problem} its config.json; train it again.")


def _plan(source: _Source, container: str) -> list[PlannedTensor]:
    if container == REMOTE_CODE:
        planned = [source.weights.plan(name) for name in source.weights.tensors]
    else:
        planned = plan_tensors(source.config, source.traits, source.weights, container)
    if source.config.tie_word_embeddings:
        planned = [tensor for tensor in planned if tensor.name != HEAD]
    return planned


def _check_room(out: Path, size: int) -> None:
    free = free_bytes(out)
    if free < size + _SPARE_BYTES:
        raise UserError(
            f"The export takes {size / 1e9:.1f} GB and the disk of '{out.parent}' has {free / 1e9:.1f} GB left: make "
            "room or choose another folder."
        )


def _write(
    source: _Source,
    folder: Path,
    container: str,
    planned: list[PlannedTensor],
    *,
    origin: Origin,
    max_shard_bytes: int,
) -> None:
    try:
        write_planned(planned, folder, max_shard_bytes)
    except SafetensorError as error:
        raise UserError(f"The weights cannot be written to '{folder.parent.parent}' ({error}): make room.") from error
    copy_companions(source.folder, folder)
    if container == REMOTE_CODE:
        _write_code(source.config, folder)
    else:
        _write_config(source, folder, container)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)
    write_card(folder, source.config, container, planned, origin)


def _write_config(source: _Source, folder: Path, container: str) -> None:
    config = CONTAINERS[container].config(source.config, source.traits)
    config.save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # Readers from before transformers 5 look for the base here.
    settings["rope_theta"] = (settings.get("rope_parameters") or {}).get("rope_theta", config.default_theta)
    _write_json(file, settings)


def _write_code(config: MixtureConfig, folder: Path) -> None:
    """Writes the files with the model's classes, and a configuration that says where the classes are."""
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.inference_mode == "group":
        settings["inference_mode"] = "alone"
    settings["architectures"] = ["MixturaForCausalLM"]
    settings["auto_map"] = {
        "AutoConfig": f"{CONFIG_MODULE}.MixtureConfig",
        "AutoModel": f"{MODEL_MODULE}.MixturaModel",
        "AutoModelForCausalLM": f"{MODEL_MODULE}.MixturaForCausalLM",
    }
    _write_json(folder / "config.json", settings)
    for name, text in remote_code().items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_json(file: Path, settings: Facts) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
