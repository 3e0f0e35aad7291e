"""On what held-out data the curves of a report are measured, and on what its final values, in words."""

from dataclasses import dataclass

from mixtura.results import Results


@dataclass(frozen=True)
class HeldOut:
    """What was evaluated, each to stand after "on"."""

    curve: str
    """On the way of a run."""
    final: str
    """At its end: what the tables have."""

    @property
    def note(self) -> str:
        """Why a curve does not end at its final value."""
        if self.curve == self.final:
            return f"Lines and rings: the loss on {self.curve}; a ring is the final value, as in the table."
        return f"Lines: the loss on {self.curve}. Rings: the final loss, as in the table, on {self.final}."


def held_out(results: Results) -> HeldOut:
    """The held-out data of a comparison, with counts where the results have them."""
    if results.task == "pretraining":
        return _sequences(results)
    if results.task == "translation":
        curve = _count(results, "eval_sequences", "sentences_validation")
        return HeldOut(
            f"{curve}validation sentences", f"{_count(results, 'final_eval_sequences', 'sentences_test')}test sentences"
        )
    curve = _count(results, "eval_sequences", "examples_validation")
    return HeldOut(f"{curve}validation texts", f"{_number(results.data.facts.get('examples_test'))}test texts")


def _sequences(results: Results) -> HeldOut:
    facts, training = results.data.facts, _training(results)
    values = [facts.get("tokens_validation"), facts.get("sequence_length")]
    values += [training.get(key) for key in ("final_eval_sequences", "eval_sequences", "batch_size")]
    known = [value for value in values if isinstance(value, int) and value]
    if len(known) < len(values):
        return HeldOut("some of the held-out sequences", "more of the held-out sequences")
    tokens, length, wanted, first, batch = known
    # The final evaluation takes whole batches, so that every group is full.
    final = max(1, min(wanted, tokens // length) // batch) * batch
    return HeldOut(f"the first {first:,} held-out sequences", f"the first {final:,} held-out sequences")


def _training(results: Results) -> dict[str, object]:
    table = results.recipe.get("training")
    return table if isinstance(table, dict) else {}


def _count(results: Results, limit: str, amount: str) -> str:
    """The smaller of a limit in the recipe and an amount of data, with a space behind it; nothing if one is unknown."""
    most, there = _training(results).get(limit), results.data.facts.get(amount)
    return _number(min(most, there)) if isinstance(most, int) and isinstance(there, int) else ""


def _number(value: object) -> str:
    return f"{value:,} " if isinstance(value, int) else ""
