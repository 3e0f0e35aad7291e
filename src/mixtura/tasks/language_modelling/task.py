"""Language modelling on packed text: the training task of every model that is trained from scratch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.config import TrainingConfig, UserError
from mixtura.data.packing import ScheduledDataset
from mixtura.data.prepare import PreparedData
from mixtura.diagnostics.choices import measure_peakedness
from mixtura.evaluation import check_evaluation, evaluate_loss, evaluation_modes
from mixtura.models.transition import follow_transition
from mixtura.results import Facts
from mixtura.results.run import Peakedness, PretrainingDetails
from mixtura.tasks.language_modelling.continuations import continue_held_out
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, StepLosses, TrainingTask

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
        outputs = model(**batch, output_routing=True, num_items_in_batch=num_targets)
        return StepLosses(outputs.language_loss, outputs.aux_loss, outputs.z_loss, outputs.routing)

    def evaluate(self, model: Any, *, final: bool) -> dict[str, dict[str, float]]:
        """Held-out losses: on the way `curve_modes` on `eval_sequences`, at the end all modes on all that was asked.

        A model that will become token choice has its loss `alone` as `causal` on the way, so that the curve of what
        could be deployed at each step goes through the change.
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
