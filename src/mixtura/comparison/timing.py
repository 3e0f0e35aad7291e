"""Seconds and memory of a training step, every arm side by side in one pass.

Arms are trained one after another, so if the machine slowed down meanwhile, some arms would look slower than they are.
Here the steps of all arms alternate, and medians are compared.

Where texts differ in length, batches do too: time is that of a step with as many tokens as steps have on average,
memory that of the longest batch.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mixtura.config import TrainingConfig
from mixtura.diagnostics.health import live_bytes, measure_peak_memory
from mixtura.errors import rank
from mixtura.models import MixtureForCausalLM
from mixtura.models.experts_backends import use_experts_backend
from mixtura.models.inference import step_kinds
from mixtura.results import ArmTiming
from mixtura.results.document import StepParts
from mixtura.training import ranks
from mixtura.training.interface import Arm, Batch
from mixtura.training.optimization import build_optimizer, clip_gradients
from mixtura.training.process import keep_freed_memory
from mixtura.training.sharding import in_step

WARM_UP_ROUNDS, ROUNDS = 2, 12
ROUNDS_IN_PARTS = 2
FIRST_STEPS, LOOKED_AT = 4, 64
"""Steps whose batches are measured where the first few differ in length."""


def time_arms(
    arms: Mapping[str, Arm], training: TrainingConfig, baseline: str, *, rounds: int = ROUNDS
) -> dict[str, ArmTiming]:
    """Median seconds of a step and peak bytes of each arm.

    Where a run has several kinds of steps, seconds are the mean over them, each as often as it comes. Every arm takes
    `rounds` steps that count.
    """
    if training.threads:
        torch.set_num_threads(training.threads)
    ranks.join()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    typical, longest = typical_and_longest(arms[baseline], training)
    steps = {name: _Step(arm, training, device, longest) for name, arm in arms.items()}
    peaks = {name: step.peak_memory() for name, step in steps.items()}
    for step in steps.values():
        step.take(typical)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            elapsed = step.timed()
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(elapsed)
    return {
        name: ArmTiming(
            seconds_per_step=statistics.median(seconds[name]),
            # The median of the ratios within a round: a slow spell hits both steps of a round alike.
            seconds_ratio=statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)),
            peak_memory_bytes=peaks[name],
            optimizer_state_bytes=steps[name].optimizer_state(),
            step_parts=steps[name].parts(),
        )
        for name in arms
    }


class _Step:
    """One whole training step of an arm: forward, backward, clipping and optimizer."""

    def __init__(self, arm: Arm, training: TrainingConfig, device: torch.device, first: int) -> None:
        """`first` is the step of a run whose data it takes at first."""
        self.arm, self.training, self.task, self.device = arm, training, arm.task, device
        self.model = arm.build(seed=0).train()
        if training.activation_checkpointing:
            # transformers renamed it within version 5.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next((getattr(self.model, name) for name in names if hasattr(self.model, name)), None)
            if enable is not None:
                enable()
        use_experts_backend(self.model, training.experts_backend, device=device, dtype=training.dtype)
        self.share = ranks.share_of_step(self.model, training, ranks.world_size())
        # Under torchrun a step ends when all have exchanged their gradients, as in training.
        self.model, self.trained = in_step(self.model, training, device)
        if training.compile:
            self.model.compile()
        self.optimizer = build_optimizer(self.model, training, learning_rate=1e-4)
        self.kinds = [(1.0, 0.0)]
        if isinstance(self.model, MixtureForCausalLM) and self.model.mixture_of_tokens_layers():
            self.kinds = step_kinds(self.model.config, steps=training.steps)
        self.take(first)

    def take(self, step: int) -> None:
        """Gets the data of that step of a run."""
        self.batches = _batches(self.arm, self.training, self.share, self.device, step)
        self.num_targets = ranks.world_size() * sum(int(self.task.count_targets(batch)) for batch in self.batches)

    def run(self, finished: Callable[[str], None] = lambda part: None) -> None:
        """Runs one optimizer step over all its micro-batches; `finished` is called with each part that is done."""
        bfloat16 = self.training.dtype == "bfloat16"
        for number, batch in enumerate(self.batches):
            with ranks.exchanging(self.trained, number == len(self.batches) - 1):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                    loss = self._loss(batch)
                finished("forward")
                loss.backward()
            finished("backward")
        clip_gradients(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        finished("optimizer")

    def parts(self) -> StepParts:
        """Shares of the time of a step; its parts wait for the device, so the whole step is timed without them."""
        seconds: dict[str, float] = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        _synchronize(self.device)
        since = time.perf_counter()

        def finished(part: str) -> None:
            nonlocal since
            _synchronize(self.device)
            now = time.perf_counter()
            seconds[part] += now - since
            since = now

        for _ in range(ROUNDS_IN_PARTS):
            self.run(finished)
        total = sum(seconds.values())
        return StepParts(**{part: value / total for part, value in seconds.items()})

    def _loss(self, batch: Batch) -> Tensor:
        losses = self.task.losses(self.trained, batch, num_targets=self.num_targets)
        weights = self.task.router_loss_weights(self.model)
        parts = zip(weights, (losses.aux_loss, losses.z_loss), strict=True)
        weighted = [weight * part for weight, part in parts if part is not None]
        return losses.task_loss + sum(weighted) / len(self.batches) if weighted else losses.task_loss

    def timed(self) -> float:
        """Seconds of one step, a mean over the kinds of steps."""
        total = 0.0
        for part, share in self.kinds:
            if isinstance(self.model, MixtureForCausalLM):
                self.model.set_zero_fill(share)
            _synchronize(self.device)
            start = time.perf_counter()
            self.run()
            _synchronize(self.device)
            total += part * (time.perf_counter() - start)
        return total

    def peak_memory(self) -> int:
        """Peak bytes of one step: parameters and optimizer state, and what a step allocates on top."""
        self.run()  # the first step makes the optimizer's state
        return live_bytes(self.model, self.optimizer) + measure_peak_memory(self.run, device=self.device)

    def optimizer_state(self) -> int:
        """Bytes that the optimizer keeps from step to step."""
        return live_bytes(self.model, self.optimizer) - live_bytes(self.model)


def typical_and_longest(arm: Arm, training: TrainingConfig) -> tuple[int, int]:
    """Of a run's first steps the one whose batches hold about the mean number of tokens, and the one of the longest.

    Both are 0 where the first few steps hold equally many, as windows of text do.
    """
    size, many = training.batch_size, training.gradient_accumulation_steps
    dataset: Any = arm.task.dataset(length=min(LOOKED_AT, training.steps) * size * many, seed=0)
    steps = (
        [_tokens(arm.task.collate([dataset[i] for i in range(start, start + size)])) for start in starts]
        for starts in (range(first, first + size * many, size) for first in range(0, len(dataset), size * many))
    )
    held = list(islice(steps, FIRST_STEPS))
    if all(tokens == held[0] for tokens in held):
        return 0, 0
    held += steps
    mean = statistics.fmean(map(sum, held))
    typical = min(range(len(held)), key=lambda step: abs(sum(held[step]) - mean))
    return typical, max(range(len(held)), key=lambda step: max(held[step]))


def _tokens(batch: Batch) -> int:
    """Tokens of a batch, its padding and those of the targets among them."""
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor) and value.dim() == 2)


def _batches(arm: Arm, training: TrainingConfig, share: ranks.Share, device: torch.device, step: int) -> list[Batch]:
    """This process's micro-batches of that step of a run, the same examples for every arm."""
    size, rows = share.batch_size, training.batch_size * training.gradient_accumulation_steps
    dataset: Any = arm.task.dataset(length=(step + 1) * rows, seed=0)
    each = rows // size
    mine = range(step * each + rank(), (step + 1) * each, ranks.world_size())
    batches = [arm.task.collate([dataset[i] for i in range(size * k, size * (k + 1))]) for k in mine]
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
