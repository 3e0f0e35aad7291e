"""Held-out loss of a language model, in every mode in which its feed-forward layers can run.

A mixture-of-tokens model runs in several modes: `group`, as it was trained, where a token sees other examples of its
batch, and `alone` or `population`, as it is deployed. All are measured on the same sequences in the same order, always
in the parameters' own precision, whatever training used.

Shapes: B batch, L length, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mixtura.config import DataConfig, UserError
from mixtura.config.families import FAMILIES, facts_of, never_served
from mixtura.data.packing import PackedTokens, pack
from mixtura.data.sources import read_documents
from mixtura.models.loading import load_model
from mixtura.models.losses import large
from mixtura.models.modeling_mixture import MixtureForCausalLM


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on a held-out text, in three units."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    perplexity: float
    tokens: int
    """Predicted tokens that the loss is the mean of; the first of a sequence is not predicted."""
    sequences: int
    """Measured sequences."""
    sequence_length: int
    """Tokens of one."""
    sequences_left_out: int
    """Sequences of the text that were not measured: beyond the most that were asked for, or no full batch."""
    rows_skipped: dict[str, int]
    """Rows without a text, by reason."""

    def extent(self) -> str:
        """How much of the text was measured, in one sentence."""
        of = f" of {self.sequences + self.sequences_left_out:,}" if self.sequences_left_out else ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rows_skipped.items())
        skipped = f"; rows skipped: {reasons}" if reasons else ""
        return f"{self.tokens:,} tokens in {self.sequences:,}{of} sequences of {self.sequence_length:,}{skipped}."


def evaluation_modes(config: Any) -> tuple[str, ...]:
    """The modes in which a model with this configuration is evaluated.

    - mixture of tokens: `group` as trained, `alone` as deployed (`alone_top_k` mixtures a token), `alone_all` with all;
      `population` (`alone_top_k` too) if the model keeps a population's averages;
    - expert choice and soft: `group` only, there is no form of them that can be deployed in a causal model;
    - everything else: `causal`.
    """
    families = _families(config)
    if _serves_token_by_token(config):
        kept = ("population",) if getattr(config, "population", False) else ()
        return "group", "alone", "alone_all", *kept
    return ("group",) if never_served(families) else ("causal",)


def evaluate_loss(
    model: PreTrainedModel,
    packed: PackedTokens,
    *,
    num_sequences: int,
    batch_size: int,
    modes: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Loss of the first `num_sequences` sequences in each mode; the model is unchanged afterwards.

    Args:
        model: a causal language model, of this library or not.
        packed: held-out sequences.
        num_sequences: how many of them, from the first.
        batch_size: sequences at once; groups are formed within a batch.
        modes: some of `evaluation_modes`; None means all.

    Returns:
        For each mode `loss` in nats a token, `bits_per_byte` and `perplexity`.

    Raises:
        UserError: see `check_evaluation`.
    """
    modes = evaluation_modes(model.config) if modes is None else tuple(modes)
    check_evaluation(model.config, packed, num_sequences=num_sequences, batch_size=batch_size, modes=modes)
    was_training = model.training
    served = getattr(model.config, "inference_mode", None), getattr(model.config, "alone_top_k", None)
    losses: dict[str, float] = {}
    model.eval()
    try:
        for mode in modes:
            if mode == "alone_all" and "alone" in losses and served[1] is None:
                losses[mode] = losses["alone"]
                continue
            top_k = None if mode == "alone_all" else served[1]
            _set_inference_mode(model, "alone" if mode == "alone_all" else mode, top_k=top_k)
            losses[mode] = _mean_loss(model, packed, num_sequences=num_sequences, batch_size=batch_size)
    finally:
        _set_inference_mode(model, served[0], top_k=served[1])
        model.train(was_training)
    return {mode: loss_measures(loss, bytes_per_token=packed.bytes_per_token) for mode, loss in losses.items()}


def loss_measures(loss: float, *, bytes_per_token: float) -> dict[str, float]:
    """A loss in nats a token, with its bits per byte of text and its perplexity."""
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }


def check_evaluation(
    config: Any,
    packed: PackedTokens,
    *,
    num_sequences: int,
    batch_size: int,
    modes: Sequence[str] | None = None,
) -> None:
    """Refuses an evaluation that cannot be run as asked; costs nothing, so call it before a long training.

    Raises:
        UserError: there are too few sequences, a mode is unknown, or groups would not be full.
    """
    known = evaluation_modes(config)
    modes = known if modes is None else modes
    for mode in modes:
        if mode not in known:
            raise UserError(f"There is no evaluation mode '{mode}' for this model: use {', '.join(known)}.")
    if num_sequences < 1 or batch_size < 1:
        raise UserError(f"{num_sequences} sequences in batches of {batch_size} cannot be evaluated: give 1 or more.")
    if num_sequences > packed.num_sequences:
        raise UserError(
            f"An evaluation asks for {num_sequences} held-out sequences but there are {packed.num_sequences}: lower "
            "'training.eval_sequences' and 'training.final_eval_sequences', or raise 'data.validation_fraction'."
        )
    grouped = {family for family in _families(config) if facts_of(family).group_over}
    if grouped and ("group" in modes or never_served(grouped)):
        _check_groups(config, packed, num_sequences=num_sequences, batch_size=batch_size)


def _check_groups(config: Any, packed: PackedTokens, *, num_sequences: int, batch_size: int) -> None:
    sizes = {"sequences of an evaluation batch": batch_size, "evaluated sequences": num_sequences}
    if config.group_over == "sequence":
        sizes = {"tokens of a sequence": packed.sequence_length}
    for name, size in sizes.items():
        if size % config.group_size:
            raise UserError(
                f"The {size} {name} do not fill groups of {config.group_size}: make them a multiple of the group size."
            )


def _families(config: Any) -> set[str]:
    """The families of our layers; another library's configuration may use the field for words of its own."""
    return {family for family in getattr(config, "mlp_layer_types", None) or () if family in FAMILIES}


def _serves_token_by_token(config: Any) -> bool:
    return any(facts_of(family).serving == "token by token" for family in _families(config))


def _set_inference_mode(model: Any, mode: str | None, *, top_k: int | None) -> None:
    """Sets how mixture-of-tokens layers run; the other families have no choice."""
    if _serves_token_by_token(model.config):
        model.set_inference_mode(mode, top_k=top_k)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, packed: PackedTokens, *, num_sequences: int, batch_size: int) -> float:
    """Nats a predicted token; a sequence of L tokens predicts L - 1."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, num_sequences, batch_size):
        rows = packed.sequences_NL[start : min(start + batch_size, num_sequences)]
        ids_BL = torch.from_numpy(rows.astype("int64")).to(model.device)
        total = total.to(model.device) + _summed_loss(model, ids_BL)
    return total.item() / (num_sequences * (packed.sequence_length - 1))


def _summed_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """Sum over all predicted tokens, in float64 so that the order of batches does not show."""
    if isinstance(model, MixtureForCausalLM) and large(ids_BL.numel(), model.config.vocab_size):
        wanted = {"labels": ids_BL, "num_items_in_batch": 1, "skip_logits": True}
        return model(input_ids=ids_BL, use_cache=False, **wanted).language_loss.double()
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    return cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="sum").double()


def evaluate(
    model: Path | str,
    text: Path | str,
    *,
    text_column: str = "text",
    batch_size: int = 16,
    sequence_length: int | None = None,
    max_sequences: int = 512,
) -> dict[str, HeldOutLoss]:
    """Loss of the model in a folder on a text, in each of its modes; all of the text counts as held out.

    Args:
        model: a folder as `save_pretrained` writes it, tokenizer included.
        text: a file or folder of .txt, .jsonl or .parquet.
        text_column: key or column that holds the text.
        batch_size: sequences at once, a multiple of the group size.
        sequence_length: tokens of a sequence; None takes the model's longest, 512 at most.
        max_sequences: stop after so many sequences.

    Returns:
        The loss by mode, see `evaluation_modes`.

    Raises:
        UserError: the model or the text cannot be read, the text is too short for one batch, or the loss is no number.
    """
    if max_sequences < batch_size:
        raise UserError(
            f"--max-sequences {max_sequences:,} is fewer than one batch of {batch_size:,}: raise it, or lower "
            "--batch-size."
        )
    loaded, tokenizer = load_model(Path(model))
    length = sequence_length or min(loaded.config.max_position_embeddings, 512)
    _check_settings(loaded.config, length=length, batch_size=batch_size)
    skipped: Counter[str] = Counter()
    documents = read_documents(DataConfig(source="local", path=str(text), text_column=text_column), skipped)
    packed = pack(documents, tokenizer, sequence_length=length, name=f"'{text}'")
    whole = min(packed.num_sequences, max_sequences) // batch_size * batch_size
    if not whole:
        raise UserError(
            f"'{text}' fills {packed.num_sequences} sequences of {length} tokens, fewer than one batch of "
            f"{batch_size}: give more text, or lower --batch-size or --sequence-length."
        )
    losses = evaluate_loss(loaded, packed, num_sequences=whole, batch_size=batch_size)
    for mode, measured in losses.items():
        if not math.isfinite(measured["loss"]):
            raise UserError(
                f"The loss of '{model}' in mode {mode} is {measured['loss']}: its weights are no usable numbers, so "
                "train or export it again."
            )
    extent = {
        "tokens": whole * (length - 1),
        "sequences": whole,
        "sequence_length": length,
        "sequences_left_out": packed.num_sequences - whole,
        "rows_skipped": dict(skipped),
    }
    return {mode: HeldOutLoss(**measured, **extent) for mode, measured in losses.items()}


def _check_settings(config: Any, *, length: int, batch_size: int) -> None:
    """Refuses, in the words of `evaluate`, what the model or its groups cannot take."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(
            f"The model has {positions:,} positions, fewer than {length:,} tokens: lower --sequence-length."
        )
    grouped = any(facts_of(family).group_over for family in _families(config))
    sizes = {"sequence": (length, "--sequence-length"), "batch": (batch_size, "--batch-size")}
    if not grouped or config.group_over not in sizes:
        return
    whole, flag = sizes[config.group_over]
    if whole % config.group_size:
        raise UserError(
            f"{flag} {whole} does not fill groups of {config.group_size}: make it a multiple of {config.group_size}."
        )
