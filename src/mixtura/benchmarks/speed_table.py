"""The table of the layers' speed, its record and its plot, `mixtura bench`; and whole training steps of small models.

Shapes: B batch, L length.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixtura.benchmarks.contenders import Size, limit, own_layers, parameters, peers
from mixtura.benchmarks.measure import Pass, calls, interleaved, kept_bytes, passes, ratios, store_record
from mixtura.config import Family
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.results.document import Plain
from mixtura.training.optimization import clip_gradients

LIMIT = "one large product"
PASSES: tuple[Pass, ...] = ("forward", "training", "step")

QUICK = (
    Size(tokens=1024, hidden=64, experts=8, top_k=2),
    Size(tokens=1024, hidden=64, experts=32, top_k=2),
)
DEFAULT = (
    Size(tokens=2048, hidden=256, experts=8, top_k=1),
    Size(tokens=2048, hidden=256, experts=8, top_k=2),
    Size(tokens=2048, hidden=256, experts=8, top_k=2, skew=2.0),
    Size(tokens=2048, hidden=256, experts=32, top_k=2),
    Size(tokens=2048, hidden=256, experts=64, top_k=8),
    Size(tokens=2048, hidden=256, experts=64, top_k=8, skew=2.0),
)
FULL = (
    *QUICK,
    *DEFAULT,
    Size(tokens=8192, hidden=256, experts=8, top_k=2),
    Size(tokens=8192, hidden=256, experts=64, top_k=8),
    Size(tokens=8192, hidden=256, experts=256, top_k=8),
    Size(tokens=8192, hidden=1024, experts=8, top_k=2),
    Size(tokens=8192, hidden=1024, experts=64, top_k=8),
)
SETS: dict[str, tuple[Size, ...]] = {"quick": QUICK, "default": DEFAULT, "full": FULL}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one size in one pass."""

    contender: str
    what: Pass
    milliseconds: float
    ratio: float
    """Time relative to the dense layer: the median of the rounds, and the lowest and highest of them."""
    lowest: float
    highest: float
    utilisation: float
    """Share of the speed of one large product of the same FLOPs."""
    gigaflops: float
    parameters: int
    kept_bytes_per_token: float | None
    calls: int | None
    timed_once: bool


def bench(
    sizes: Sequence[Size], *, what: Sequence[Pass] = PASSES, rounds: int = 7, only: str = "", seed: int = 0
) -> list[Plain]:
    """Times every contender at every size, and prints a table for each as it is done.

    Args:
        sizes: the rows.
        what: the passes.
        rounds: rounds that count, after two runs of warm-up.
        only: contenders whose name contains this text, besides dense and the limit.
        seed: of weights and inputs.
    """
    measured = []
    for size in sizes:
        torch.manual_seed(seed)
        layers: dict[str, nn.Module] = {**own_layers(size)}
        others, left_out = peers(size)
        layers |= others
        layers = {name: layer for name, layer in layers.items() if name == "dense" or only in name}
        rows = [row for each in what for row in _measure(size, layers, each, rounds)]
        measured.append({"size": asdict(size), "left_out": left_out, "rows": [asdict(row) for row in rows]})
        _print(size, rows, left_out)
    return measured


def store(measured: list[Plain], folder: Path, *, settings: Plain) -> Path:
    """Writes the record, with versions, hardware and date, and the plot beside it; returns the record's path."""
    path = store_record(folder, "layers", settings=settings, sizes=measured)
    plot(measured).savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path


def plot(measured: list[Plain], *, what: Pass = "training") -> Figure:
    """Utilisation of every contender, one panel a size: 1 is the speed of one large product."""
    figure = Figure(figsize=(9, 2.6 * len(measured)))
    for number, entry in enumerate(measured, start=1):
        rows = [row for row in entry["rows"] if row["what"] == what and row["contender"] != LIMIT]
        rows.sort(key=lambda row: row["utilisation"])
        axes = figure.add_subplot(len(measured), 1, number)
        names = [row["contender"] for row in rows]
        theirs = [name not in ("dense", *_OWN) for name in names]
        colours = ["#b8b8b8" if other else "#4c72b0" for other in theirs]
        axes.barh(names, [row["utilisation"] for row in rows], color=colours)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.1)
        axes.set_title(Size(**entry["size"]).label(), fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supxlabel(f"{what}: share of the speed of one large product of the same FLOPs", fontsize=9)
    figure.tight_layout()
    return figure


_OWN = ("token choice", "expert choice", "mixture of tokens", "soft")


def _measure(size: Size, layers: dict[str, nn.Module], what: Pass, rounds: int) -> list[Row]:
    x_BLD = size.inputs()
    runs = {name: passes(layer, x_BLD, what) for name, layer in layers.items()}
    runs[LIMIT] = limit(size, backward=what != "forward")
    seconds = interleaved(runs, baseline="dense", rounds=rounds)
    to_dense, to_limit = ratios(seconds, baseline="dense"), ratios(seconds, baseline=LIMIT)
    rows = []
    for name in runs:
        layer, median = layers.get(name), statistics.median(seconds[name])
        detailed = layer is not None and what == "training"
        rows.append(
            Row(
                contender=name,
                what=what,
                milliseconds=median * 1e3,
                ratio=to_dense[name][0],
                lowest=to_dense[name][1],
                highest=to_dense[name][2],
                utilisation=1 / to_limit[name][0],
                gigaflops=size.flops(backward=what != "forward") / median / 1e9,
                parameters=parameters(layer) if layer is not None else 0,
                kept_bytes_per_token=kept_bytes(layer, x_BLD) / size.tokens if layer is not None and detailed else None,
                calls=calls(runs[name]) if detailed else None,
                timed_once=len(seconds[name]) < rounds,
            )
        )
    return rows


def _print(size: Size, rows: list[Row], left_out: dict[str, str]) -> None:
    table = Table(title=size.label())
    for column in ("contender", "pass", "ms", "to dense", "lowest", "highest", "utilisation", "kept B/token", "calls"):
        table.add_column(column, justify="left" if column in ("contender", "pass") else "right")
    for row in rows:
        table.add_row(
            row.contender + (" (once)" if row.timed_once else ""),
            row.what,
            f"{row.milliseconds:.1f}",
            f"{row.ratio:.2f}",
            f"{row.lowest:.2f}",
            f"{row.highest:.2f}",
            f"{row.utilisation:.2f}",
            "" if row.kept_bytes_per_token is None else f"{row.kept_bytes_per_token:,.0f}",
            "" if row.calls is None else str(row.calls),
        )
    console = Console(width=130)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"Left out: {name}: {reason}.")


Part = Literal["attention", "feed-forward", "head and loss", "rest", "clipping", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Of a training step; the rest is embedding, norms, residuals and setting gradients to none."""


def model_of(family: Family, size: Size, *, layers: int, heads: int, vocab_size: int) -> MixtureForCausalLM:
    """A model in training with that family in every layer, at the FLOPs of the dense one."""
    config = MixtureConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.dense_width,
        moe_intermediate_size=size.expert_width(family, top_k=size.top_k),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_layer_types=[family] * layers,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        group_size=size.group_size,
        hidden_act=size.activation,
        gated=size.gated,
    )
    return MixtureForCausalLM(config).train()


def training_step(
    model: MixtureForCausalLM,
    ids_BL: Tensor,
    *,
    max_grad_norm: float | None = None,
    enter: Callable[[Part], object] = lambda part: None,
) -> Callable[[], None]:
    """A function that takes one step: forward, backward, clipping where a norm is given, and fused AdamW.

    It calls `enter` where clipping, the optimizer and the rest begin.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        enter("rest")
        optimizer.zero_grad()
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        if max_grad_norm is not None:
            enter("clipping")
            clip_gradients(model.parameters(), max_grad_norm)
        enter("optimizer")
        optimizer.step()

    return step


def training_step_by_part(
    model: MixtureForCausalLM, ids_BL: Tensor, *, max_grad_norm: float
) -> Callable[[], dict[Part, float]]:
    """As `training_step`, and the step returns the processor seconds of each part, forward and backward together.

    A part begins where its module is entered or the gradient of its output is there, and ends where its module is left
    or the gradient of its input is there; the loss counts to the head. Only for one thread on the CPU.
    """
    clock = PartClock()
    for layer in model.model.layers:
        clock.follow(layer.get_submodule("self_attn"), "attention")
        clock.follow(layer.get_submodule("mlp"), "feed-forward")
    clock.follow(model.lm_head, "head and loss", until_backward=True)
    step = training_step(model, ids_BL, max_grad_norm=max_grad_norm, enter=clock.enter)

    def timed() -> dict[Part, float]:
        clock.start()
        step()
        return clock.stop()

    return timed


class PartClock:
    """Adds processor time to the part of a step that was entered last."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins a step; all parts have zero time."""
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "rest"
        self._since = time.process_time()

    def enter(self, part: Part) -> None:
        """Charges the time since the last call to the part that ran, and goes on with this one."""
        now = time.process_time()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def stop(self) -> dict[Part, float]:
        """Seconds of every part of the step."""
        self.enter("rest")
        return self._seconds

    def follow(self, module: nn.Module, part: Part, *, until_backward: bool = False) -> None:
        """Enters the part with the module, forward and backward, and the rest after it.

        With `until_backward` what comes between the module's forward and backward pass counts to it.
        """

        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["hidden_states"]
            if x.requires_grad:
                x.register_hook(lambda _: self.enter("rest"))
            self.enter(part)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if until_backward:
                return
            out = output[0] if isinstance(output, tuple) else output
            if out.requires_grad:
                out.register_hook(lambda _: self.enter(part))
            self.enter("rest")

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
