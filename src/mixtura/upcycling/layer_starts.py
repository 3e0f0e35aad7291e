"""How every layer of an upcycled model starts: its router's rows, and the factors on its experts' weights.

Token choice: experts of weight w, of which a token runs T copies, give the dense output where their second projection
is multiplied by 1 / (T w). Renormalised gates make that exact for any router.

Mixture of tokens, alone: a token gets the sum of m f(m x) over T copies, m = sigmoid(l - ln(G - 1)). With the first
projections times 1 / m0 and the second times 1 / (T m0), f(m x) m is f((m / m0) x) (m / m0) / T: the dense output where
every chosen m is m0. That is so where the router is undecided, with m0 = 1 / G; with logits of some spread, m0 is the
mean weight of the mixtures that are chosen.

Shapes: T tokens, D hidden, C copies, K copies that a token runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtura.checkpoints.source import DenseSource
from mixtura.upcycling.columns import generator_for, mean_of
from mixtura.upcycling.request import UpcycleSettings, chosen_layers
from mixtura.upcycling.router_inputs import feed_forward_inputs, read_sequences
from mixtura.upcycling.router_start import RouterStart, calibrated_rows, uncalibrated_rows

_DRAWS = 4096


@dataclass(frozen=True)
class LayerStart:
    """One mixture layer before any training."""

    router: RouterStart
    """A row for each copy of the dense layer."""
    first_factor: float
    """What the experts' gate and up projections are multiplied by."""
    second_factor: float
    """What the down projections are multiplied by."""


def layer_starts(
    settings: UpcycleSettings, sources: Sequence[DenseSource], texts: Sequence[Path], *, max_tokens: int
) -> dict[int, LayerStart]:
    """The start of every chosen layer, by depth; with texts the dense model is run on them, a layer at a time.

    Raises:
        UserError: a layer does not exist, or a text cannot be used.
    """
    config = sources[0].config
    chosen = chosen_layers(settings.layers, config.num_hidden_layers)

    def averaged(name: str) -> Tensor:
        return mean_of([source.tensor(name) for source in sources])

    starts: dict[int, LayerStart] = {}
    if not texts:
        for depth in chosen:
            norm_D = averaged(f"model.layers.{depth}.post_attention_layernorm.weight")
            generator = generator_for(settings.seed, depth, "router")
            router = uncalibrated_rows(
                norm_D, copies=settings.copies, spread=settings.router_spread, generator=generator
            )
            starts[depth] = _start(settings, router, None)
        return starts
    sequences = read_sequences(texts, sources[0].folder, max_tokens=max_tokens)
    rows_of_text = [ids_NL.numel() for ids_NL in sequences]
    for depth, x_TD, _ in feed_forward_inputs(config, averaged, torch.cat(sequences)):
        if depth not in chosen:
            continue
        router = calibrated_rows(
            x_TD.split(rows_of_text),
            kind=settings.router,
            copies=settings.copies,
            spread=settings.router_spread,
            generator=generator_for(settings.seed, depth, "router"),
        )
        starts[depth] = _start(settings, router, x_TD)
    return starts


def _start(settings: UpcycleSettings, router: RouterStart, x_TD: Tensor | None) -> LayerStart:
    if settings.family == "token_choice":
        return LayerStart(router, 1.0, 1 / (settings.active_copies * settings.undecided_weight))
    logits_TC = _drawn_logits(settings) if x_TD is None else x_TD @ router.rows_CD.T
    chosen_TK = logits_TC.topk(settings.active_copies, dim=-1).values
    weight = float(torch.sigmoid(chosen_TK - math.log(settings.tokens_of_group - 1)).mean())
    return LayerStart(router, 1 / weight, 1 / (settings.active_copies * weight))


def _drawn_logits(settings: UpcycleSettings) -> Tensor:
    """Logits (T, C) as random rows give them, where no text says what they are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_DRAWS, settings.copies, generator=generator) * settings.router_spread
