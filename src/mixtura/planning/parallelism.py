"""The best way to divide a run among devices, found by trying all: DP x FSDP x EP x micro-batch x checkpointing.

A step's batch is the recipe's, however many devices there are. Groups that are mixed never leave a device.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mixtura.config import ArmConfig, Recipe, UserError
from mixtura.config.families import facts_of
from mixtura.planning.decoder import DecoderShape, shape_of_arm
from mixtura.planning.formulas import active_parameters, flops_per_token, model_parameters
from mixtura.planning.hardware import Hardware
from mixtura.planning.step_memory import Division, ModelSizes, StepMemory, step_memory
from mixtura.planning.step_time import StepTime, communicated_bytes, step_time

RESERVE = 0.08
"""Share of a device's memory that the driver, libraries and fragmentation take."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained."""

    shape: DecoderShape
    sequence_length: int
    sequences_per_step: int
    steps: int
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    group: int = 1
    """Sequences that must lie on one device, in one micro-batch."""

    @property
    def tokens_per_step(self) -> int:
        """Of all devices together."""
        return self.sequences_per_step * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to run it, and what that takes."""

    division: Division
    memory: StepMemory
    time: StepTime
    sent: float
    """Bytes that one device sends in a step."""

    def fits(self, hardware: Hardware) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= room(hardware)


@dataclass(frozen=True, kw_only=True)
class ArmOnHardware:
    """The plan of one arm."""

    arm: str
    parameters: int
    active: int
    flops_per_token: float
    best: Layout | None
    """The quickest that fits; None where nothing does."""
    smallest: Layout
    """The one that needs the least memory."""
    plain: Layout
    """A copy of the model on every device and nothing computed twice, as `mixtura train` runs it."""

    def plain_form(self, workload: Workload, hardware: Hardware) -> dict[str, object]:
        """All numbers, JSON-able, with what follows for the whole run."""
        facts = {"arm": self.arm, "parameters": self.parameters, "active_parameters": self.active}
        facts |= {"flops_per_token": self.flops_per_token, "tokens_per_step": workload.tokens_per_step}
        for name in ("best", "smallest", "plain"):
            layout = getattr(self, name)
            facts[name] = None if layout is None else _numbers(self, layout, workload, hardware)
        return facts


def _numbers(plan: ArmOnHardware, layout: Layout, workload: Workload, hardware: Hardware) -> dict[str, object]:
    seconds = layout.time.total
    flops = plan.flops_per_token * workload.tokens_per_step
    days = seconds * workload.steps / 86400
    return {
        **dataclasses.asdict(layout.division),
        "memory": dataclasses.asdict(layout.memory) | {"total": layout.memory.total},
        "fits": layout.fits(hardware),
        "sent_bytes": layout.sent,
        "step_seconds": dataclasses.asdict(layout.time) | {"total": seconds},
        "tokens_per_second": workload.tokens_per_step / seconds,
        "utilisation": flops / (seconds * hardware.devices * hardware.peak(workload.dtype)),
        "days": days,
        "dollars": days * 24 * hardware.devices * hardware.price_per_hour,
    }


def room(hardware: Hardware) -> float:
    """Bytes of a device that a run may take."""
    return 1e9 * hardware.memory_gb * (1 - RESERVE)


def workload_of(recipe: Recipe, arm: ArmConfig) -> Workload:
    """What one run of an arm trains.

    Raises:
        UserError: routing alone costs more than the dense layer.
    """
    training = recipe.training
    grouped = facts_of(arm.family).group_over and arm.group_over == "batch"
    return Workload(
        shape=shape_of_arm(recipe, arm),
        sequence_length=recipe.data.sequence_length,
        sequences_per_step=training.batch_size * training.gradient_accumulation_steps,
        steps=training.steps,
        dtype=training.dtype,
        optimizer=training.optimizer,
        group=arm.group_size if grouped else 1,
    )


def best_layout(name: str, workload: Workload, hardware: Hardware) -> ArmOnHardware:
    """The quickest layout that fits, and what else is worth knowing.

    Raises:
        UserError: the step's batch cannot be divided among the devices; the sentence says what to change.
    """
    sizes = ModelSizes(workload.shape, sequence_length=workload.sequence_length)
    found = [_layout(sizes, division, workload, hardware) for division in _divisions(name, workload, hardware)]
    fitting = [layout for layout in found if layout.fits(hardware)]
    plain = [layout for layout in found if layout.division.shards == 1 and layout.division.expert_ranks == 1]
    plain = [layout for layout in plain if not layout.division.checkpointing]
    shape, length = workload.shape, workload.sequence_length
    return ArmOnHardware(
        arm=name,
        parameters=model_parameters(shape),
        active=active_parameters(shape, sequence_length=length),
        flops_per_token=flops_per_token(shape, sequence_length=length),
        best=_simplest_of_the_quick(fitting),
        smallest=min(found, key=lambda layout: layout.memory.total),
        plain=min(plain, key=lambda layout: layout.memory.total),
    )


_AS_QUICK = 1.02
"""A layout that takes this much longer counts as being as quick; the model of the machine is no finer."""


def _simplest_of_the_quick(layouts: list[Layout]) -> Layout | None:
    if not layouts:
        return None
    limit = _AS_QUICK * min(layout.time.total for layout in layouts)
    quick = [layout for layout in layouts if layout.time.total <= limit]
    return min(quick, key=lambda it: (it.division.expert_ranks, it.division.shards, it.memory.total))


def _layout(sizes: ModelSizes, division: Division, workload: Workload, hardware: Hardware) -> Layout:
    return Layout(
        division=division,
        memory=step_memory(sizes, division, dtype=workload.dtype, optimizer=workload.optimizer),
        time=step_time(sizes, division, hardware, dtype=workload.dtype),
        sent=communicated_bytes(sizes, division, dtype=workload.dtype),
    )


def _divisions(name: str, workload: Workload, hardware: Hardware) -> Iterator[Division]:
    devices, sequences, group = hardware.devices, workload.sequences_per_step, workload.group
    if sequences % (devices * group):
        most = sequences // group
        usable = max((count for count in range(1, devices + 1) if most % count == 0), default=0) if most else 0
        unit = f"groups of {group} sequences" if group > 1 else "sequences"
        raise UserError(
            f"A step of arm '{name}' has {sequences:,} sequences, which {devices} devices cannot share in whole "
            f"{unit}: make 'training.batch_size' times 'training.gradient_accumulation_steps' a multiple of "
            f"{devices * group:,}, or plan for {usable or 1} of them."
        )
    each = sequences // devices
    experts = workload.shape.num_experts if set(workload.shape.mlp_layer_types or ()) - {"dense"} else 1
    for shards in _divisors(devices):
        for ranks in _divisors(math.gcd(experts, devices)):
            if (shards > ranks and shards % ranks) or (ranks > shards and ranks % shards):
                continue
            for micro_batch in _divisors(each // group):
                for checkpointing in (False, True):
                    yield Division(
                        replicas=devices // shards,
                        shards=shards,
                        expert_ranks=ranks,
                        micro_batch=micro_batch * group,
                        micro_batches=each // (micro_batch * group),
                        checkpointing=checkpointing,
                    )


def _divisors(number: int) -> list[int]:
    """All divisors; of numbers that have many, the powers of two among them and the number itself."""
    found = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    every = sorted({*found, *(number // each for each in found)})
    return every if len(every) <= 12 else [each for each in every if each & (each - 1) == 0 or each == number]
