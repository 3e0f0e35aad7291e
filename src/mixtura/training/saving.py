"""What a run keeps in its folder: the settings that it was started with, and checkpoints that are whole or not there.

A run is only ever continued with the settings that it was started with; `check_settings` compares them.

A checkpoint is written into a folder with a temporary name. Its last file is `complete.json` (the step, what was
trained, sizes and checksums of the files, and one over all this), and then the folder is renamed. So a `checkpoint-N`
without `complete.json` was not written here, and one whose bytes differ was damaged later. Weights are safetensors;
everything else is JSON, or tensors that `torch.load(weights_only=True)` reads.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.files import checksum, put_folder, write_json
from mixtura.results import Facts

COMPLETE = "complete.json"
WEIGHTS = "model.safetensors"
KEPT = 2
"""Checkpoints that a run keeps until it is finished, in case the newest is damaged."""
FINAL = "checkpoint"
_PREFIX = "checkpoint-"
_PARTIAL = ".partial"


@contextmanager
def new_folder(target: Path, *, step: int, settings: Facts, first: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Args:
        target: where it will be.
        step: optimizer steps that led to its content.
        settings: what decides its content besides, JSON-able, as `check_checkpoint` will compare it.
        first: False on all ranks but one, which make no folder and only fill it.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    with writing(target.parent):
        if not first:
            yield partial
            return
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _close(partial, step=step, settings=settings)
            if target.exists():
                shutil.rmtree(target)
            put_folder(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a failure to write below `out` into a sentence with the fix.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(
            f"'{out}' cannot be written ({reason}): make room or check its permissions, then run again with --resume."
        ) from error


def save_tensors(value: Any, path: Path) -> None:
    """`torch.save`, with an OSError where the disk is full, as for other writes."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # torch reports a full disk as a RuntimeError about file positions.
        raise OSError(f"{path.name} could not be written in full, is the disk full?") from error


def numbered(out: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return out / f"{_PREFIX}{step}"


def newest_checkpoint(out: Path) -> Path | None:
    """The `checkpoint-N` of the highest N."""
    return max(_numbered(out), key=step_of, default=None)


def drop_partial_folders(out: Path) -> None:
    """Removes folders that a killed run did not finish writing."""
    for folder in out.glob(f".{FINAL}*{_PARTIAL}"):
        shutil.rmtree(folder)


def drop_old_checkpoints(out: Path, *, keep: int) -> None:
    """Removes all whole checkpoints but the newest `keep`; folders that this library did not write are left alone."""
    ours = [folder for folder in _numbered(out) if (folder / COMPLETE).exists()]
    for folder in sorted(ours, key=step_of)[:-keep]:
        shutil.rmtree(folder)


def drop_checkpoints(out: Path, *, model: bool) -> None:
    """Removes all whole checkpoints, whose optimizer states are twice the model's size, and the finished model if told.

    Folders that this library did not write are left alone.
    """
    for folder in (*_numbered(out), *([out / FINAL] if model else [])):
        if (folder / COMPLETE).exists():
            shutil.rmtree(folder)


def check_checkpoint(folder: Path, settings: Facts) -> int:
    """The step of a checkpoint, after checking that it is whole and was made with these settings.

    Raises:
        UserError: it is not ours, damaged, or of another model or other data.
    """
    try:
        marker = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        step, saved, files = int(marker["step"]), dict(marker["settings"]), dict(marker["files"])
        # Checkpoints of before have neither; with only one of the two, the other was damaged.
        checksums, digest = dict(marker.get("checksums", {})), marker.pop("digest", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"'{folder}' is no checkpoint of this library (it has no {COMPLETE} that this version reads): move it out "
            "of the way."
        ) from None
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual:,} bytes"
            raise UserError(
                f"The checkpoint '{folder}' is damaged: {name} {found} where {size:,} bytes were written; remove the "
                "folder to go on from the one before it, or from the start."
            )
    changed = next((name for name in files if checksums and checksum(folder / name) != checksums.get(name)), None)
    if changed or ((checksums or digest) and digest != settings_hash(marker)):
        raise UserError(
            f"The checkpoint '{folder}' is damaged: {changed or COMPLETE} has other bytes than were written; remove "
            "the folder to go on from the one before it, or from the start."
        )
    difference = first_difference(_decisive(saved), _decisive(json.loads(json.dumps(settings))))
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"The checkpoint '{folder}' is of another run: its {key} is {before!r}, not {now!r}; choose another output "
            "folder."
        )
    return step


def architecture(config: PreTrainedConfig) -> Facts:
    """A model configuration as plain values, without the fields that may change while the model stays the same."""
    volatile = {"transformers_version", "architectures", "dtype", "_name_or_path", "use_cache", "output_router_logits"}
    plain = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in plain.items() if key not in volatile}


def check_architecture(folder: Path, config: PreTrainedConfig) -> None:
    """Refuses saved weights whose own configuration is another model's.

    Raises:
        UserError: the configuration is damaged, or differs; names the first key that does.
    """
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        saved_type = saved.pop("model_type")
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"The checkpoint '{folder}' is damaged: its config.json is not readable; remove the folder to go on from "
            "the one before it, or from the start."
        ) from None
    difference = first_difference({"model_type": saved_type}, {"model_type": config.model_type})
    difference = difference or first_difference(architecture(type(config).from_dict(saved)), architecture(config))
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"The checkpoint '{folder}' is of another model: its {key} is {before!r}, not {now!r}; "
            "choose another output folder."
        )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and configuration as `from_pretrained` reads them, without transformers' own progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes the parameters that are trained, and all buffers that belong to the model's state, but nothing frozen."""
    tensors = {name: tensor.contiguous() for name, tensor in _trained(model).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Reads what `save_trained` wrote; the frozen parameters stay as they are.

    Raises:
        UserError: the file is damaged, or of a model that trains other parameters.
    """
    try:
        saved = safetensors.torch.load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder / WEIGHTS, error) from error
    trained = _trained(model)
    shapes = {name: list(tensor.shape) for name, tensor in trained.items()}
    difference = first_difference({name: list(tensor.shape) for name, tensor in saved.items()}, shapes)
    if difference is not None:
        name, before, now = difference
        raise UserError(
            f"The weights in '{folder}' are of another model: {name} has shape {before} there and {now} here; build "
            "the model that was trained, or choose another folder."
        )
    for name, tensor in trained.items():
        tensor.copy_(saved[name])


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads a checkpoint's weights into the model; tied weights are stored once, tables of positions never."""
    derived = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    try:
        missing, _ = safetensors.torch.load_model(model, folder / WEIGHTS, strict=not derived)
        if left := sorted(set(missing) - derived):
            raise RuntimeError(f"it lacks {left[0]}")
    except (SafetensorError, RuntimeError) as error:
        raise _unreadable(folder / WEIGHTS, error) from error


def load_tensors(path: Path) -> Any:
    """What `save_tensors` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the archive, the pickle in it and the file each have errors of their own
        raise _unreadable(path, error) from error


def random_state() -> dict[str, Any]:
    """The state of every random number generator, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores a state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, each once, and persistent buffers, by name and without gradient."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad} | buffers


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"The checkpoint '{file.parent}' is damaged: {file.name} cannot be read ({reason_of(error)}); remove "
        "the folder to go on from the one before it, or from the start."
    )


def _close(folder: Path, *, step: int, settings: Facts) -> None:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    checksums = {name: checksum(folder / name) for name in files}
    marker = json.loads(json.dumps({"step": step, "settings": settings, "files": files, "checksums": checksums}))
    marker["digest"] = settings_hash(marker)
    (folder / COMPLETE).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _numbered(out: Path) -> list[Path]:
    return [path for path in out.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdecimal()]


def step_of(folder: Path) -> int:
    """The step N of a `checkpoint-N`."""
    return int(folder.name[len(_PREFIX) :])


RUN_FILE = "run.json"


def check_settings(out: Path, settings: Facts) -> None:
    """Compares with the settings stored in `out`, or stores them when there are none.

    Raises:
        UserError: the run was started with other settings; names the first that differs.
    """
    path = out / RUN_FILE
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        record = {"hash": settings_hash(settings), "settings": settings}
        write_json(path, record)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is not readable: choose another output folder, or remove '{out}'.") from None
    difference = first_difference(_decisive(stored), _decisive(settings))
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"The run in '{out}' was started with {key} = {_shown(before)}, and now it is {_shown(now)}: set it back "
            "to resume, or choose another output folder."
        )


def settings_hash(settings: Facts) -> str:
    """A hash of 128 bits over all settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _decisive(settings: Facts) -> Facts:
    data = settings.get("data") if isinstance(settings, dict) else None
    return settings | {"data": without_description(data)} if isinstance(data, dict) else settings


def without_description(facts: Facts) -> Facts:
    """The counts and digests among facts on data, to be compared: the words also name files that are not read."""
    return {key: value for key, value in facts.items() if key != "description"}


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, at which two nested dictionaries differ, with both values; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            path = f"{where}.{key}" if where else key
            difference = first_difference(before.get(key), now.get(key), path)
            if difference is not None:
                return difference
        return None
    return None if before == now else (where, before, now)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
