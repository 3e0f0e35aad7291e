"""Language modelling on packed text: the training task of every model that is trained from scratch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtura.config import TrainingConfig, UserError
from mixtura.config.families import never_served
from mixtura.data.packing import PackedTokens, ScheduledDataset
from mixtura.data.prepare import PreparedData
from mixtura.diagnostics.choices import measure_peakedness
from mixtura.evaluation import check_evaluation, evaluate_loss, evaluation_modes
from mixtura.models.inference import grouped_layers, running_in
from mixtura.models.transition import follow_transition
from mixtura.results import Facts
from mixtura.results.run import Continuation, Peakedness, PretrainingDetails
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, StepLosses, TrainingTask

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 2, 16, 40


@torch.no_grad()
def continue_held_out(model: Any, held_out: PackedTokens, tokenizer: PreTrainedTokenizerBase) -> list[Continuation]:
    """The continuations of a few held-out sequences, as deployed, one at a time; the model is unchanged afterwards.

    Args:
        model: a causal language model with `generate`.
        held_out: sequences of token ids; the beginning of each is the prompt.
        tokenizer: the one that made them.

    Returns:
        Empty where the model cannot generate, since a token's output depends on tokens to come.
    """
    if never_served(getattr(model.config, "mlp_layer_types", None) or []):
        return []
    length = held_out.sequence_length
    prompt_tokens = min(PROMPT_TOKENS, length // 2)
    # The first sequences are often of one text; these come from different ones.
    places = dict.fromkeys(held_out.num_sequences * part // TEXTS for part in range(TEXTS))
    was_training = model.training
    model.eval()
    try:
        with running_in(grouped_layers(model), "alone"):  # one text has no group
            rows = [held_out.sequences_NL[place].astype("int64") for place in places]
            return [_continue(model, row_L, prompt_tokens, tokenizer) for row_L in rows]
    finally:
        model.train(was_training)


def _continue(model: Any, row_L: Any, prompt_tokens: int, tokenizer: Any) -> Continuation:
    prompt_L, next_L = row_L[:prompt_tokens], row_L[prompt_tokens : prompt_tokens + NEW_TOKENS]
    ids_BL = torch.from_numpy(prompt_L)[None].to(model.device)
    room = getattr(model.config, "max_position_embeddings", prompt_tokens + NEW_TOKENS) - prompt_tokens
    output_BL = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=False,
        max_new_tokens=max(1, min(NEW_TOKENS, room)),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    parts = (prompt_L, next_L, output_BL[0, prompt_tokens:].tolist())
    prompt, reference, output = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return Continuation(prompt=prompt, reference=reference, output=output)


_CURVE_MEASURES = ("loss", "bits_per_byte")


class LanguageModelling(TrainingTask):
    """Predicts the next token of packed text with a `MixtureForCausalLM`; router losses follow its configuration."""

    def __init__(self, data: PreparedData, config: TrainingConfig) -> None:
        """Trains on `data.train` and evaluates on `data.validation` as `config` says."""
        self.data, self.config = data, config

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a sequence; packing leaves no padding."""
        return self.data.train.sequence_length

    def settings(self, model: Any) -> Facts:
        """The model's architecture, and the facts on the text."""
        return {"model": checkpoints.architecture(model.config), "data": self.data.summary}

    def check(self, model: Any, *, batch_size: int) -> None:
        """Refuses evaluations that cannot be run as configured, and a model for a smaller vocabulary.

        Raises:
            UserError: see `check_evaluations`, or the tokenizer has more tokens than the model.
        """
        self.check_evaluations(model.config, batch_size=batch_size)
        if self.data.summary["vocab_size"] > model.config.vocab_size:
            raise UserError(
                f"The tokenizer has {self.data.summary['vocab_size']} tokens but the model's vocab_size is "
                f"{model.config.vocab_size}: build the model for this tokenizer."
            )

    def check_evaluations(self, config: Any, *, batch_size: int) -> None:
        """Refuses evaluations that cannot be run as configured; needs no model, only its configuration.

        Raises:
            UserError: there are too few held-out sequences, or they do not fill groups.
        """
        held_out = self.data.validation.num_sequences
        batch_size = self._evaluation_batch(batch_size)
        if self.config.eval_sequences > held_out:
            raise UserError(
                f"'training.eval_sequences' is {self.config.eval_sequences} but only {held_out} sequences are held "
                "out: lower it, give more text or raise 'data.validation_fraction'."
            )
        for wanted in (self.config.eval_sequences, self._final_sequences(batch_size)):
            check_evaluation(config, self.data.validation, num_sequences=wanted, batch_size=batch_size)

    def dataset(self, *, length: int, seed: int) -> ScheduledDataset:
        """The run's sequences in order, epochs as needed."""
        return ScheduledDataset(self.data.train, length=length, seed=seed)

    def count_targets(self, batch: Batch) -> Tensor:
        """Predicted tokens: all but the first of a sequence."""
        return batch["labels"][:, 1:].ne(-100).sum()

    def losses(self, model: Any, batch: Batch, *, num_targets: Tensor | int) -> StepLosses:
        """The language loss without, and beside it, the router losses."""
        # A cache would copy the keys and values of every layer, and keep them.
        wanted: Batch = {"use_cache": False, "output_routing": True, "skip_logits": True}
        outputs = model(**batch, **wanted, num_items_in_batch=num_targets)
        return StepLosses(outputs.language_loss, outputs.aux_loss, outputs.z_loss, outputs.routing)

    def evaluate(self, model: Any, *, final: bool) -> dict[str, dict[str, float]]:
        """Held-out losses: during training `curve_modes` on `eval_sequences`, at the end all modes on all sequences.

        A model that will become token choice has its loss `alone` as `causal` during training, so that the curve of
        what could be deployed at each step goes through the change.
        """
        config = self.config
        measured = evaluate_loss(
            model,
            self.data.validation,
            num_sequences=self._final_sequences(config.batch_size) if final else config.eval_sequences,
            batch_size=self._evaluation_batch(config.batch_size),
            modes=None if final else curve_modes(model.config),
        )
        if final:
            return measured
        if model.config.transition_to is not None:
            measured["causal"] = measured.pop("alone")
        return {mode: {key: of[key] for key in _CURVE_MEASURES} for mode, of in measured.items()}

    def details(self, model: Any, *, out: Path) -> PretrainingDetails:
        """What the model writes; and how peaked the weights of mixture-of-tokens layers are, on one held-out batch."""
        peakedness: list[Peakedness] = []
        if "mixture_of_tokens" in (model.config.mlp_layer_types or []):
            rows = self.data.validation.sequences_NL[: self.config.batch_size]
            peakedness = measure_peakedness(model, [torch.from_numpy(rows.astype("int64"))])
        written = continue_held_out(model, self.data.validation, self.data.tokenizer)
        return PretrainingDetails(peakedness=peakedness, continuations=written)

    def save(self, model: Any, folder: Path) -> None:
        """Writes weights and configuration as `from_pretrained` reads them."""
        checkpoints.save_model(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        """Reads the weights that `save` wrote.

        Raises:
            UserError: they are damaged or of another model.
        """
        follow_transition(model, folder)
        checkpoints.check_architecture(folder, model.config)
        checkpoints.load_weights(model, folder)

    def save_for_use(self, model: Any, folder: Path) -> None:
        """Adds the tokenizer to what `save` writes."""
        self.save(model, folder)
        self.data.tokenizer.save_pretrained(folder)

    def _final_sequences(self, batch_size: int) -> int:
        """As many as wanted or there are, in whole batches so that every group is full."""
        batch_size = self._evaluation_batch(batch_size)
        wanted = min(self.config.final_eval_sequences, self.data.validation.num_sequences)
        return max(1, wanted // batch_size) * batch_size

    def _evaluation_batch(self, batch_size: int) -> int:
        return min(batch_size, self.data.validation.num_sequences)


def curve_modes(config: Any) -> tuple[str, ...]:
    """The evaluation modes of a training curve: `alone_all` runs every expert on every token, too slow to repeat."""
    return tuple(mode for mode in evaluation_modes(config) if mode != "alone_all")
