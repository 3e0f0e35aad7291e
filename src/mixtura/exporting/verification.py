"""The receipt of an export: how far its log-probabilities are from the source's, in every engine asked for.

A difference means something only next to the engine's own noise. In transformers that is the source against itself, one
text at a time and all in one batch. In another engine it is a dense model with the same attention, which the engine has
no reason to get wrong, against the same model in transformers: the source itself if it is dense, or else the source
with its first expert in place of every mixture.
"""

import copy
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixtura import __version__
from mixtura.checkpoints.tensors import PlannedTensor, StoredWeights, write_planned
from mixtura.config import UserError
from mixtura.exporting.card import set_receipt
from mixtura.exporting.containers import CONTAINERS, choose_container
from mixtura.exporting.engines import (
    Engine,
    EngineFailed,
    EngineMissing,
    load_causal,
    model_log_probs,
    parse_engine,
    run_engine,
)
from mixtura.exporting.fields import traits_of, windows
from mixtura.files import write_text
from mixtura.models import MixtureConfig
from mixtura.models.inference import grouped_layers, running_in
from mixtura.models.loading import folder_settings, load_config, open_tokenizer
from mixtura.results import Facts

_MAX_BYTES = 5 * 10**9


def write_dense_twin(source: Path, folder: Path) -> Path | None:
    """Writes the twin to a new folder, and returns where it is.

    It has the first expert of every layer, without any factor. A source that is no mixture is its own twin.

    Args:
        source: a model folder.
        folder: made.

    Returns:
        None where no stock dense architecture has this attention, or layers differ in width.
    """
    if folder_settings(source).get("model_type") != "mixtura":
        return source
    config = load_config(MixtureConfig, source)
    families = config.mlp_layer_types or []
    if not config.gated or config.hidden_act != "silu":
        return None
    widths = {_width(config, depth, family) for depth, family in enumerate(families)}
    if len(widths) > 1:
        return None
    dense = copy.deepcopy(config)
    dense.mlp_layer_types, dense.intermediate_sizes = ["dense"] * len(families), None
    dense.intermediate_size, dense.layer_mix = widths.pop(), False
    weights = StoredWeights(source)
    traits = traits_of(dense, weights.tensors)._replace(shared=False, expert_bias=False)
    try:
        container = choose_container(dense, traits)
    except UserError:
        return None
    folder.mkdir(parents=True)
    write_planned(_plan(weights, families), folder, _MAX_BYTES)
    CONTAINERS[container].config(dense, traits).save_pretrained(folder)
    return folder


def _width(config: MixtureConfig, depth: int, family: str) -> int:
    if family != "dense":
        return config.moe_intermediate_size
    return config.intermediate_size if config.intermediate_sizes is None else config.intermediate_sizes[depth]


def _plan(weights: StoredWeights, families: list[str]) -> list[PlannedTensor]:
    kept = [f"model.layers.{depth}.mlp." for depth, family in enumerate(families) if family != "dense"]
    skipped = (*kept, "model.layer_mix.")
    planned = [weights.plan(name) for name in weights.tensors if not name.startswith(skipped)]
    for prefix in kept:
        up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
        _, double_width, hidden = weights.tensors[up].shape
        for number, part in enumerate(("gate_proj", "up_proj")):

            def half(up: str = up, number: int = number) -> Tensor:
                return weights.read(up, 0).chunk(2)[number]

            shape = (double_width // 2, hidden)
            planned.append(PlannedTensor(f"{prefix}{part}.weight", shape, weights.tensors[up].dtype, half))

        def second(down: str = down) -> Tensor:
            return weights.read(down, 0)

        shape = (hidden, double_width // 2)
        planned.append(PlannedTensor(f"{prefix}down_proj.weight", shape, weights.tensors[down].dtype, second))
    return planned


RECEIPT = "receipt.json"
FLOOR = 1e-4
"""Nats of difference that are allowed in any engine that computes in float32."""
FLOORS = 3
"""Multiples of the engine's own noise that are allowed."""
CEILING = 0.05
"""The most nats that are allowed, however noisy the engine is."""
PROBE_TOKENS = 24
LONGEST_PROBE = 1024
"""Tokens; a window as long as that is not looked beyond."""
TEXTS = (
    "The river was high that spring, and nobody crossed it for a week.",
    "Der Zug nach Leipzig hat heute leider eine halbe Stunde Verspätung.",
    "La lumière du matin tombait sur les toits de la vieille ville.",
    "Вчера вечером мы долго говорили о старых фильмах и новой музыке.",  # noqa: RUF001
    "今日は天気がいいので、公園を散歩しました。",
    "كان الطريق إلى القرية طويلا ولكنه جميل.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "In 1987, 4 of 12 samples (33.3 %) were above the limit of 0.05 mg/l.",
)
_RANDOM_PROBES = 4
Status = Literal["same", "differs", "failed", "not tried"]


class Comparison(NamedTuple):
    """What one engine showed."""

    engine: str
    version: str
    status: Status
    max_difference: float | None = None
    """The largest difference of a log-probability, in nats, over all positions and the whole vocabulary."""
    noise_floor: float | None = None
    """The same measure for the engine alone; None where there is no dense model to take it from."""
    limit: float | None = None
    same_choice: float | None = None
    """The share of positions at which both take the same token to be the likeliest."""
    reason: str = ""


class Receipt(NamedTuple):
    """What was compared, on what, and how it came out."""

    source: str
    export: str
    probes: int
    tokens: int
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every engine that was run computed the same model."""
        return all(found.status in ("same", "not tried") for found in self.comparisons)

    def complaint(self) -> str:
        """What is wrong, a sentence for each engine."""
        return " ".join(_complaint(found) for found in self.comparisons if found.status in ("differs", "failed"))

    def table(self) -> str:
        """The comparisons as a Markdown table."""
        head = ["| engine | largest difference | engine's own noise | allowed | same likeliest token | |"]
        head.append("| --- | --- | --- | --- | --- | --- |")
        return "\n".join([*head, *map(_row, self.comparisons)])

    def to_dict(self) -> Facts:
        """For receipt.json."""
        compared = [found._asdict() for found in self.comparisons]
        return {
            "mixtura": __version__,
            "passed": self.passed,
            **self._asdict(),
            "unit": "nats, largest difference of a log-probability over all positions and tokens",
            "comparisons": compared,
        }


def verify(source: Path | str, export: Path | str, engines: Sequence[Engine | str] = ("transformers",)) -> Receipt:
    """Compares two model folders, and leaves `receipt.json` and the card's table in the second.

    Args:
        source: a folder of Mixtura's, or any other that transformers loads.
        export: the folder to judge.
        engines: what runs it, as the command line names it or with more to say; the source runs in transformers.

    Raises:
        UserError: the source cannot be loaded, or the folders have other vocabularies.
    """
    source, export = Path(source), Path(export)
    engines = [parse_engine(engine) if isinstance(engine, str) else engine for engine in engines]
    for folder in (source, export):
        folder_settings(folder)
    try:
        model = load_causal(source)
    except EngineFailed as error:
        raise UserError(f"The model in '{source}' cannot be loaded ({error}): train or export it again.") from error
    probes = probe_tokens(source, model.config)
    with running_in(grouped_layers(model), "alone"):  # the mode in which it is exported
        expected = model_log_probs(model, probes)
        repeated = largest_difference(expected, model_log_probs(model, probes, batched=True))
    del model
    with tempfile.TemporaryDirectory(prefix="mixtura-verify-") as temporary:
        twin = None
        if any(engine.name != "transformers" for engine in engines):
            twin = write_dense_twin(source, Path(temporary, "twin"))
        found = tuple(_compare(engine, export, probes, expected, repeated, twin) for engine in engines)
    receipt = Receipt(source.name, export.name, len(probes), sum(map(len, probes)), found)
    text = json.dumps(receipt.to_dict(), indent=2, ensure_ascii=False)
    write_text(export / RECEIPT, text + "\n")
    set_receipt(export, receipt.table())
    return receipt


def probe_tokens(folder: Path, config: Any) -> list[list[int]]:
    """A handful of texts in several languages, where the folder has a tokenizer, and random tokens; always the same.

    Where attention has a window of up to `LONGEST_PROBE` tokens, one is longer than it.
    """
    draw, vocab_size = random.Random(0), config.vocab_size
    probes = [[draw.randrange(vocab_size) for _ in range(PROBE_TOKENS)] for _ in range(_RANDOM_PROBES)]
    if windows(config) != "none" and PROBE_TOKENS <= config.sliding_window + 1 < LONGEST_PROBE:
        length = min(config.sliding_window + PROBE_TOKENS, config.max_position_embeddings)
        probes.append([draw.randrange(vocab_size) for _ in range(length)])
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder)
        probes += [tokenizer(text)["input_ids"][:PROBE_TOKENS] for text in TEXTS]
    return [probe for probe in probes if len(probe) > 1 and max(probe) < vocab_size]


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference over all probes; infinite for other shapes, or a number that is none."""
    if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return float("inf")
    worst = torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max().item()
    return worst if worst == worst else float("inf")


def _compare(
    engine: Engine,
    export: Path,
    probes: list[list[int]],
    expected: list[Tensor],
    repeated: float,
    twin: Path | None,
) -> Comparison:
    try:
        ran = run_engine(engine, export, probes)
        floor = repeated if engine.name == "transformers" else _noise(engine, twin, probes)
    except EngineMissing as error:
        return Comparison(engine.name, "", "not tried", reason=str(error) or "not installed")
    except EngineFailed as error:
        return Comparison(engine.name, "", "failed", reason=str(error))
    if any(a.shape != b.shape for a, b in zip(ran.log_probs, expected, strict=True)):
        shapes = f"{tuple(ran.log_probs[0].shape)} where the source has {tuple(expected[0].shape)}"
        return Comparison(engine.name, ran.version, "failed", reason=f"its log-probabilities have shape {shapes}")
    difference = largest_difference(expected, ran.log_probs)
    limit = min(max(FLOOR, FLOORS * (floor or 0.0)), CEILING)
    pairs = zip(expected, ran.log_probs, strict=True)
    agreement = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).double().mean().item()
    status: Status = "same" if difference <= limit else "differs"
    return Comparison(engine.name, ran.version, status, difference, floor, limit, agreement)


def _noise(engine: Engine, twin: Path | None, probes: list[list[int]]) -> float | None:
    """The engine against transformers on a dense model."""
    if twin is None:
        return None
    return largest_difference(model_log_probs(load_causal(twin), probes), run_engine(engine, twin, probes).log_probs)


def _complaint(found: Comparison) -> str:
    if found.status == "failed":
        return f"{found.engine} cannot run it ({found.reason})."
    return (
        f"In {found.engine} log-probabilities differ by up to {found.max_difference:.2g} nats, where "
        f"{found.limit:.2g} are allowed."
    )


def _row(found: Comparison) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    share = "" if found.same_choice is None else f"{found.same_choice:.1%}"
    reason = found.reason.replace("|", "/")
    verdict = f"{found.status}: {reason}" if reason else found.status
    numbers = [number(value) for value in (found.max_difference, found.noise_floor, found.limit)]
    return f"| {found.engine} {found.version} | {' | '.join(numbers)} | {share} | {verdict} |"
