"""Whether this machine can hold what a recipe would train, known from formulas before anything is built."""

import os
from pathlib import Path

import torch

from mixtura.config import AnyRecipe, ClassificationRecipe, Recipe, UserError, starts_from_checkpoints
from mixtura.config.adapt import MOST_PAIR_TOKENS
from mixtura.models.build import build_model_config
from mixtura.planning import state_memory

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(recipe: AnyRecipe) -> None:
    """Refuses a model from scratch whose parameters, gradients and optimizer state alone are more than all memory.

    Raises:
        UserError: names the arm, the planned bytes and those there are.
    """
    if isinstance(recipe, ClassificationRecipe) or (isinstance(recipe, Recipe) and starts_from_checkpoints(recipe)):
        return
    if isinstance(recipe, Recipe):
        layers, length = recipe.arms, recipe.data.sequence_length
    elif recipe.base.name is None:
        layers = {name: arm.feed_forward for name, arm in recipe.arms.items()}
        length = recipe.data.max_length or MOST_PAIR_TOKENS
    else:
        return
    most = machine_bytes()
    for name, layer in layers.items():
        config = build_model_config(
            recipe.model,
            layer,
            vocab_size=recipe.data.vocab_size,
            max_position_embeddings=length,
            width_multiple=recipe.training.width_multiple,
        )
        optimizer = recipe.training.optimizer
        known = "muon" if optimizer == "muon" else "adamw"
        state = state_memory(config, optimizer=known)  # pyright: ignore[reportArgumentType]
        # The other optimizers keep less; what they keep is left out.
        planned = state.total if optimizer == known else state.total - state.optimizer
        if planned > most:
            raise UserError(
                f"Arm '{name}' needs {in_words(planned)} for parameters, gradients and optimizer state, but this "
                f"machine has {in_words(most)}: lower 'model.hidden_size', 'model.num_hidden_layers' or the number of "
                "experts."
            )


def machine_bytes() -> int:
    """All memory of the GPU that would train, or else of the machine, as far as this process may have it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    try:
        return min(installed, int(_CGROUP_LIMIT.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such group, or "max"
        return installed


def in_words(number: float) -> str:
    """Bytes for people: "1.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
