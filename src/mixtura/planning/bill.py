"""What a recipe takes on given hardware, for people and as plain values, `mixtura plan`; divided among devices as is
best.

All ways to divide a run are tried: DP x FSDP x EP x micro-batch x checkpointing.
A step's batch is the recipe's, however many devices there are. Groups that are mixed never leave a device.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mixtura.config import AnyRecipe, ArmConfig, Recipe, UserError, starts_from_checkpoints
from mixtura.config.families import facts_of
from mixtura.planning.formulas import DecoderShape, active_parameters, flops_per_token, model_parameters, shape_of_arm
from mixtura.planning.hardware import Hardware, MixtureSpeed, StepTime, communicated_bytes, step_time
from mixtura.planning.step_memory import Division, ModelSizes, StepMemory, step_memory

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
class _ArmOnHardware:
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


def _numbers(plan: _ArmOnHardware, layout: Layout, workload: Workload, hardware: Hardware) -> dict[str, object]:
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


def _workload_of(recipe: Recipe, arm: ArmConfig) -> Workload:
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


def best_layout(
    name: str, workload: Workload, hardware: Hardware, *, mixtures: MixtureSpeed | None = None
) -> _ArmOnHardware:
    """The quickest layout that fits, and what else is worth knowing.

    Args:
        name: of the arm, for messages.
        workload: what is trained.
        hardware: on what.
        mixtures: how fast they run; None is as assumed.

    Raises:
        UserError: the step's batch cannot be divided among the devices; the sentence says what to change.
    """
    sizes = ModelSizes(workload.shape, sequence_length=workload.sequence_length)
    speed = mixtures or MixtureSpeed()
    found = [_layout(sizes, division, workload, hardware, speed) for division in _divisions(name, workload, hardware)]
    fitting = [layout for layout in found if layout.fits(hardware)]
    plain = [layout for layout in found if layout.division.shards == 1 and layout.division.expert_ranks == 1]
    plain = [layout for layout in plain if not layout.division.checkpointing]
    shape, length = workload.shape, workload.sequence_length
    return _ArmOnHardware(
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


def _layout(
    sizes: ModelSizes, division: Division, workload: Workload, hardware: Hardware, mixtures: MixtureSpeed
) -> Layout:
    return Layout(
        division=division,
        memory=step_memory(sizes, division, dtype=workload.dtype, optimizer=workload.optimizer),
        time=step_time(sizes, division, hardware, dtype=workload.dtype, mixtures=mixtures),
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


CAUTION = (
    "Parameters and FLOPs are exact, bytes within a tenth. Seconds and dollars come from a model of the machine,\n"
    "and may be off by a factor of two (docs/planning.md)."
)


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The plans of a recipe's arms."""

    recipe: str
    hardware: Hardware
    runs_of_arm: int
    arms: tuple[tuple[_ArmOnHardware, Workload], ...]
    advice: tuple[str, ...]

    def plain_form(self) -> dict[str, object]:
        """All numbers, JSON-able."""
        return {
            "recipe": self.recipe,
            "hardware": dataclasses.asdict(self.hardware),
            "runs_of_arm": self.runs_of_arm,
            "arms": [plan.plain_form(workload, self.hardware) for plan, workload in self.arms],
            "advice": list(self.advice),
        }

    def lines(self) -> list[str]:
        """The plan for people to read."""
        hardware, workload = self.hardware, self.arms[0][1]
        width = max(len("arm"), *(len(plan.arm) for plan, _ in self.arms))
        peak = hardware.peak(workload.dtype) / 1e12
        heads = (
            f"{'arm':{width}}  {'parameters':>10}  {'active':>8}  {'layout':>24}  {'memory':>9}  {'sent':>8}  "
            f"{'step':>8}  {'tokens/s':>10}  {'used':>5}  {'run':>7}  {'dollars':>9}"
        )
        runs = f"{self.runs_of_arm} {'run' if self.runs_of_arm == 1 else 'runs'} an arm"
        return [
            f"{self.recipe} on {hardware.name}: {hardware.memory_gb:g} GB and {peak:g} TFLOP/s in {workload.dtype} a "
            f"device.",
            f"{workload.tokens_per_step:,} tokens a step, {workload.steps:,} steps, {runs}.",
            "",
            heads,
            *(_row(plan, work, hardware, width) for plan, work in self.arms),
            "",
            "Layout: DP x FSDP x EP, sequences of a pass x passes, R where layers are computed again. Memory and bytes",
            "sent are of one device, tokens a second of all. A run and its dollars are of one seed.",
            "",
            *(_memory_line(plan, width) for plan, _ in self.arms),
            *([""] if self.advice else []),
            *self.advice,
            "",
            CAUTION,
        ]


def plan_recipe(recipe: AnyRecipe, hardware: Hardware, *, arm: str | None = None) -> Bill:
    """Plans the arms of a pretraining recipe, or the one that is named.

    Raises:
        UserError: the recipe fine-tunes or starts from checkpoints, has no such arm, or its batch cannot be divided.
    """
    instead = "run it with --dry-run on the machine itself"
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"'{recipe.name}' is a recipe for {recipe.task}, and only recipes of pretraining are planned: {instead}."
        )
    if starts_from_checkpoints(recipe):
        raise UserError(
            f"'{recipe.name}' starts from checkpoints, and only recipes that train from random weights are planned: "
            f"{instead}."
        )
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"The recipe has no arm '{arm}': choose one of {', '.join(recipe.arms)}.")
    planned = []
    for name in [arm] if arm else recipe.arms:
        workload = _workload_of(recipe, recipe.arms[name])
        planned.append((best_layout(name, workload, hardware), workload))
    return Bill(
        recipe=recipe.name,
        hardware=hardware,
        runs_of_arm=len(recipe.seeds),
        arms=tuple(planned),
        advice=tuple(_advice(recipe, planned, hardware)),
    )


def _row(plan: _ArmOnHardware, workload: Workload, hardware: Hardware, width: int) -> str:
    layout = plan.best or plan.smallest
    numbers: Any = plan.plain_form(workload, hardware)["best" if plan.best else "smallest"]
    dollars = numbers["dollars"]
    cells = [
        f"{plan.arm:{width}}",
        f"{_short(plan.parameters):>10}",
        f"{_short(plan.active):>8}",
        f"{_layout_words(layout):>24}",
        f"{_gigabytes(layout.memory.total):>9}",
        f"{_gigabytes(layout.sent):>8}",
        f"{_duration(layout.time.total):>8}",
        f"{numbers['tokens_per_second']:>10,.0f}",
        f"{numbers['utilisation']:>5.0%}",
        f"{_duration(numbers['days'] * 86400):>7}",
        f"{dollars:>9,.0f}" if dollars >= 10 else f"{dollars:>9.2f}",
    ]
    return "  ".join(cells) + ("" if plan.best else "  does not fit")


def _layout_words(layout: Layout) -> str:
    by = layout.division
    again = " R" if by.checkpointing else ""
    return f"{by.replicas} x {by.shards} x {by.expert_ranks}, {by.micro_batch} x {by.micro_batches}{again}"


def _memory_line(plan: _ArmOnHardware, width: int) -> str:
    memory = (plan.best or plan.smallest).memory
    parts = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    words = ", ".join(f"{name} {_gigabytes(value)}" for name, value in parts.items() if value)
    return f"{plan.arm:{width}}  {words}"


def _advice(recipe: Recipe, planned: list[tuple[_ArmOnHardware, Workload]], hardware: Hardware) -> list[str]:
    told = []
    if recipe.training.dtype == "float32" and hardware.bfloat16_tflops > 2 * hardware.float32_tflops:
        told.append("The recipe computes in float32: 'training.dtype' = \"bfloat16\" is many times faster here.")
    for plan, workload in planned:
        if plan.best is None:
            told.append(_what_would_fit(plan, workload, hardware))
        elif not plan.plain.fits(hardware):
            told.append(
                f"'{plan.arm}' does not fit as `mixtura train` runs it, with a copy on every device: that takes "
                f"{_gigabytes(plan.plain.memory.total)} and {_gigabytes(room(hardware))} are there."
            )
    return told


def _what_would_fit(plan: _ArmOnHardware, workload: Workload, hardware: Hardware) -> str:
    """The layout of least memory, and what would make it fit: a smaller optimizer, or more devices."""
    needs = (
        f"'{plan.arm}' does not fit: the least that a device needs is {_gigabytes(plan.smallest.memory.total)}, with "
        f"{_layout_words(plan.smallest)}, and {_gigabytes(room(hardware))} are there."
    )
    found = []
    if workload.optimizer == "adamw":
        smaller = dataclasses.replace(workload, optimizer="adamw_8bit")
        if best_layout(plan.arm, smaller, hardware).best:
            found.append("'training.optimizer' = \"adamw_8bit\"")
    for doublings in range(1, 8):
        devices = hardware.devices * 2**doublings
        sequences = math.lcm(workload.sequences_per_step, devices * workload.group)
        more = dataclasses.replace(workload, sequences_per_step=sequences)
        larger = dataclasses.replace(hardware, devices=devices)
        if best_layout(plan.arm, more, larger).best:
            found.append(f"{devices} of these devices")
            break
    would = f" It would fit with {' or with '.join(found)}." if found else " More of these devices do not help."
    return needs + would


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB" if number >= 1e8 else f"{number / 1e6:,.3g} MB"
