"""What a recipe takes on given hardware, for people and as plain values: `mixtura plan`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mixtura.config import AnyRecipe, Recipe, UserError, starts_from_checkpoints
from mixtura.planning.hardware import Hardware
from mixtura.planning.parallelism import ArmOnHardware, Layout, Workload, best_layout, room, workload_of

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
    arms: tuple[tuple[ArmOnHardware, Workload], ...]
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
    if not isinstance(recipe, Recipe) or starts_from_checkpoints(recipe):
        raise UserError(
            f"'{recipe.name}' starts from a pretrained model, and only recipes that train from random weights are "
            "planned: run it with --dry-run on the machine itself."
        )
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"The recipe has no arm '{arm}': choose one of {', '.join(recipe.arms)}.")
    planned = []
    for name in [arm] if arm else recipe.arms:
        workload = workload_of(recipe, recipe.arms[name])
        planned.append((best_layout(name, workload, hardware), workload))
    return Bill(
        recipe=recipe.name,
        hardware=hardware,
        runs_of_arm=len(recipe.seeds),
        arms=tuple(planned),
        advice=tuple(_advice(recipe, planned, hardware)),
    )


def _row(plan: ArmOnHardware, workload: Workload, hardware: Hardware, width: int) -> str:
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


def _memory_line(plan: ArmOnHardware, width: int) -> str:
    memory = (plan.best or plan.smallest).memory
    parts = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    words = ", ".join(f"{name} {_gigabytes(value)}" for name, value in parts.items() if value)
    return f"{plan.arm:{width}}  {words}"


def _advice(recipe: Recipe, planned: list[tuple[ArmOnHardware, Workload]], hardware: Hardware) -> list[str]:
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


def _what_would_fit(plan: ArmOnHardware, workload: Workload, hardware: Hardware) -> str:
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
