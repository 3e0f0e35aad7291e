"""Seconds and memory of a training step, every arm side by side in one pass.

Arms are trained one after another, so a machine that slows down on the way would be blamed on an arm. Here their steps
alternate, and medians are compared.
"""

import statistics
import time
from typing import Any

import numpy as np
import torch

from mixtura.comparison.arms import Arm
from mixtura.config import Recipe
from mixtura.data.prepare import PreparedData
from mixtura.diagnostics.memory import live_bytes, measure_peak_memory
from mixtura.training.optimization import build_optimizer

WARM_UP_ROUNDS, ROUNDS = 2, 12


def time_arms(arms: dict[str, Arm], recipe: Recipe, data: PreparedData, baseline: str) -> dict[str, dict[str, Any]]:
    """Median seconds of a step and peak bytes of each arm.

    Returns:
        {arm: {"seconds_per_step", "seconds_ratio", "peak_memory_bytes"}}.
    """
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: _Step(arm, recipe, data, device) for name, arm in arms.items()}
    peaks = {name: step.peak_memory() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(WARM_UP_ROUNDS + ROUNDS):
        for name, step in steps.items():
            elapsed = step.timed()
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(elapsed)
    return {
        name: {
            "seconds_per_step": statistics.median(seconds[name]),
            # The median of the ratios within a round: a slow spell hits both steps of a round alike.
            "seconds_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)),
            "peak_memory_bytes": peaks[name],
        }
        for name in arms
    }


class _Step:
    """One whole training step of an arm: forward, backward, clipping and optimizer."""

    def __init__(self, arm: Arm, recipe: Recipe, data: PreparedData, device: torch.device) -> None:
        self.training = recipe.training
        self.model = arm.build(seed=0).train()
        if recipe.training.activation_checkpointing:
            # transformers renamed it within version 5.
            model: Any = self.model
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.nn.Module.to(self.model, device)
        self.optimizer = build_optimizer(self.model, recipe.training, learning_rate=1e-4)
        # A small text has fewer sequences than a batch: they repeat, as in training.
        rows = np.arange(recipe.training.batch_size) % data.train.num_sequences
        self.ids_BL = torch.as_tensor(data.train.sequences_NL[rows].astype("int64"), device=device)

    def run(self) -> None:
        """Runs one optimizer step over all its micro-batches."""
        bfloat16 = self.training.dtype == "bfloat16"
        for _ in range(self.training.gradient_accumulation_steps):
            with torch.autocast(self.ids_BL.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                loss = self.model(self.ids_BL, labels=self.ids_BL).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        """Seconds of one step."""
        _synchronize(self.ids_BL.device)
        start = time.perf_counter()
        self.run()
        _synchronize(self.ids_BL.device)
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """Peak bytes of one step: parameters and optimizer state, and what a step allocates on top."""
        self.run()  # the first step makes the optimizer's state
        return live_bytes(self.model, self.optimizer) + measure_peak_memory(self.run, device=self.ids_BL.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
