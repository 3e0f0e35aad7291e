"""What experts specialise in: how much the choice of an expert says about a text's group, language or kind of token.

The measure is the mutual information between the expert of a routed row and the group of its token, in bits
(Shannon 1948, section 12). Estimated from a sample it is never below zero and nearly always above, even if experts and
groups have nothing to do with each other: most of all with many experts and few examples, and because the tokens of one
text are not independent. So the labels are also permuted among the examples, many times. What is measured then is
chance, and its mean is subtracted.

Shapes: B batch, L length, T tokens that are counted, U units that labels belong to (examples or tokens), R routed rows,
E experts, G groups, K experts a token is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.diagnostics.choices import ChoiceRecorder, RoutedLayer, record_choices
from mixtura.diagnostics.health import DEAD_SHARE, summarize_load
from mixtura.results.run import Association, LayerSpecialization, Specialization

Batch = tuple[Mapping[str, Any], Tensor, Tensor]
"""Inputs of the model; the group of every example (B,) or token (B, L); a mask (B, L) of the tokens to count."""

NUM_PERMUTATIONS = 200
"""How often the labels are permuted: the smallest p-value is then 1 / 201."""


class ObservedChoices(NamedTuple):
    """The counted tokens of all batches, in order, and the experts that each layer gave them."""

    layers: list[RoutedLayer]
    expert_TK: list[numpy.ndarray]
    """For each layer: indices, the strongest first."""
    rows_TK: list[numpy.ndarray]
    """For each layer: how much of the token went there."""
    unit_T: numpy.ndarray
    """Which unit, an example or a token itself, a token belongs to."""
    group_U: numpy.ndarray
    """The group of every unit."""


def measure_specialization(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    groups: Sequence[str],
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> Specialization:
    """How far each routed layer's experts divide the groups among them; the model is unchanged afterwards.

    Args:
        model: any model with layers that `record_choices` reads; it is run in eval() mode, without gradients.
        batches: inputs, group indices and masks. Groups of examples (B,) make examples the units of chance, which is
            right where all of a text's tokens share a label; groups of tokens (B, L) make it tokens.
        groups: names, by index.
        num_permutations: how often the labels are permuted.
        seed: of those.

    Raises:
        UserError: the model routes nothing, there is nothing to count, or a group index has no name.
    """
    observed = observe(model, batches)
    group_U = observed.group_U
    if len(group_U) and not 0 <= group_U.min() <= group_U.max() < len(groups):
        raise UserError(f"A group index is {group_U.max()}, but there are names for {len(groups)} groups: name them.")
    layers = [
        describe_layer(observed, place, num_groups=len(groups), num_permutations=num_permutations, seed=seed)
        for place in range(len(observed.layers))
    ]
    return Specialization(list(groups), layers)


def observe(model: nn.Module, batches: Iterable[Batch]) -> ObservedChoices:
    """Runs the model over the batches and keeps what its layers chose for the tokens that count.

    Raises:
        UserError: the model routes nothing, or no token counts.
    """
    was_training = model.training
    model.eval()
    try:
        with record_choices(model) as recorder, torch.no_grad():
            if not recorder.layers:
                raise UserError("The model has no layer that gives tokens experts, so there is nothing to measure.")
            parts = [_observe_batch(model, recorder, batch) for batch in batches]
    finally:
        model.train(was_training)
    if not any(len(part.unit_T) for part in parts):
        raise UserError("No token is left to count: give batches with text, and masks that are not all zero.")
    return _joined(recorder.layers, parts)


class _Part(NamedTuple):
    expert_TK: list[numpy.ndarray]
    rows_TK: list[numpy.ndarray]
    unit_T: numpy.ndarray
    group_U: numpy.ndarray


def _observe_batch(model: nn.Module, recorder: ChoiceRecorder, batch: Batch) -> _Part:
    inputs, group, mask_BL = batch
    model(**inputs)
    counted_T = mask_BL.flatten().bool().cpu()
    chosen = recorder.take(tokens=len(counted_T))
    if group.dim() == 1:
        group_U = group.cpu().numpy()
        unit_T = torch.arange(len(group)).repeat_interleave(mask_BL.size(1))[counted_T].numpy()
    else:
        group_U = group.cpu().flatten()[counted_T].numpy()
        unit_T = numpy.arange(len(group_U))
    return _Part(
        expert_TK=[choices.expert_TK.cpu()[counted_T].numpy().astype(numpy.int16) for choices in chosen],
        rows_TK=[choices.rows_TK.cpu()[counted_T].numpy() for choices in chosen],
        unit_T=unit_T,
        group_U=group_U,
    )


def _joined(layers: list[RoutedLayer], parts: list[_Part]) -> ObservedChoices:
    starts = numpy.cumsum([0, *(len(part.group_U) for part in parts)])
    return ObservedChoices(
        layers=layers,
        expert_TK=[numpy.concatenate([part.expert_TK[i] for part in parts]) for i in range(len(layers))],
        rows_TK=[numpy.concatenate([part.rows_TK[i] for part in parts]) for i in range(len(layers))],
        unit_T=numpy.concatenate([part.unit_T + start for part, start in zip(parts, starts, strict=False)]),
        group_U=numpy.concatenate([part.group_U for part in parts]).astype(numpy.int64),
    )


def describe_layer(
    observed: ObservedChoices,
    place: int,
    *,
    num_groups: int,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> LayerSpecialization:
    """One layer's experts against the groups.

    `max_bits`, the most that so many experts can tell of so many groups of one size, is log2 min(E / K, G), for a
    token's K experts are different ones.
    """
    layer = observed.layers[place]
    unit_R, expert_R, rows_R = _flat_rows(observed, place)
    rows_GE = count_rows(
        observed.group_U[unit_R], expert_R, rows_R, num_groups=num_groups, num_experts=layer.num_experts
    )
    total_G1 = rows_GE.sum(1, keepdims=True)
    share_GE = numpy.divide(rows_GE, total_G1, out=numpy.zeros_like(rows_GE), where=total_G1 > 0)
    load_E = rows_GE.sum(0)
    rows_per_token = float(load_E.sum() / max(1, len(observed.unit_T)))
    found = association(
        (unit_R, expert_R, rows_R),
        observed.group_U,
        num_groups=num_groups,
        num_experts=layer.num_experts,
        num_permutations=num_permutations,
        seed=seed,
    )
    return LayerSpecialization(
        **vars(found),
        layer=layer.depth,
        name=layer.name,
        num_experts=layer.num_experts,
        rows_per_token=rows_per_token,
        rows=rows_GE.T.tolist(),
        share=share_GE.T.tolist(),
        max_bits=float(numpy.log2(max(1.0, min(layer.num_experts / rows_per_token, num_groups)))),
        group_bits=entropy_bits(total_G1.ravel()),
        entropy=entropy_bits(load_E),
        imbalance=summarize_load(load_E).imbalance,
        dead=numpy.flatnonzero(load_E < DEAD_SHARE * load_E.mean()).tolist(),
    )


def association(
    rows: tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray],
    group_U: numpy.ndarray,
    *,
    num_groups: int,
    num_experts: int,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> Association:
    """Mutual information of expert and group against what chance gives.

    Args:
        rows: unit, expert and amount of every routed row, (R,) each.
        group_U: group of every unit.
        num_groups: G.
        num_experts: E.
        num_permutations: how often the groups are permuted among the units.
        seed: of those.
    """
    unit_R, expert_R, rows_R = _merged(*rows, num_experts=num_experts)

    def measure(label_U: numpy.ndarray) -> float:
        return mutual_information(
            count_rows(label_U[unit_R], expert_R, rows_R, num_groups=num_groups, num_experts=num_experts)
        )

    found = measure(group_U)
    generator = numpy.random.default_rng(seed)
    chance_P = numpy.array([measure(generator.permutation(group_U)) for _ in range(num_permutations)])
    return Association(
        mutual_information=found,
        chance=float(chance_P.mean()),
        chance_high=float(numpy.quantile(chance_P, 0.95)),
        corrected=max(0.0, found - float(chance_P.mean())),
        p_value=float(1 + (chance_P >= found - 1e-12).sum()) / (1 + num_permutations),
    )


def mutual_information(rows_GE: numpy.ndarray) -> float:
    """Counts (G, E) -> bits that a row's expert tells about its group, and its group about its expert."""
    joint_GE = rows_GE / rows_GE.sum()
    apart_GE = joint_GE.sum(1, keepdims=True) * joint_GE.sum(0, keepdims=True)
    seen_GE = joint_GE > 0
    return max(0.0, float((joint_GE[seen_GE] * numpy.log2(joint_GE[seen_GE] / apart_GE[seen_GE])).sum()))


def entropy_bits(amount_X: numpy.ndarray) -> float:
    """Entropy of amounts as shares, in bits."""
    share_X = amount_X[amount_X > 0] / amount_X.sum()
    return float(-(share_X * numpy.log2(share_X)).sum())


def count_rows(
    group_R: numpy.ndarray, expert_R: numpy.ndarray, rows_R: numpy.ndarray, *, num_groups: int, num_experts: int
) -> numpy.ndarray:
    """(R,) each -> (G, E): how many rows of each group went to each expert."""
    counted = numpy.bincount(group_R * num_experts + expert_R, weights=rows_R, minlength=num_groups * num_experts)
    return counted.reshape(num_groups, num_experts)


def _flat_rows(observed: ObservedChoices, place: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Unit, expert and amount of every row of a layer."""
    expert_TK, rows_TK = observed.expert_TK[place], observed.rows_TK[place]
    unit_R = numpy.repeat(observed.unit_T, expert_TK.shape[1])
    return unit_R, expert_TK.astype(numpy.int64).ravel(), rows_TK.ravel().astype(numpy.float64)


def _merged(
    unit_R: numpy.ndarray, expert_R: numpy.ndarray, rows_R: numpy.ndarray, *, num_experts: int
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Rows with the same unit and expert, added up: the counts stay the same, and each permutation takes less time."""
    key_M, place_R = numpy.unique(unit_R * num_experts + expert_R, return_inverse=True)
    return key_M // num_experts, key_M % num_experts, numpy.bincount(place_R, weights=rows_R)
