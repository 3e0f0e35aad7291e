"""What a comparison ran on and what its arms write.

Data, budget, versions and hardware as (term, value) pairs; on which held-out data curves and final values are measured,
in words; and the same beginnings of held-out texts, continued by each arm.
"""

from dataclasses import dataclass

from mixtura.report.wording import NONE, capital, compact, duration, number
from mixtura.results import Facts, Results, Summary
from mixtura.results.run import PretrainingDetails


def data_facts(results: Results, summary: Summary) -> list[tuple[str, str]]:
    """What the arms were trained on and for how long, as (term, value)."""
    data, budget = results.data, summary.budget
    seeds = sorted({seed for arm in summary.arms.values() for seed in arm.seeds})
    run = f"{budget.steps:,} steps of {budget.tokens_per_step:,} tokens, {compact(budget.tokens)} tokens in all"
    return [
        ("Text", data.description),
        *(_text_facts(data.facts) if results.task == "pretraining" else _counts(data.facts)),
        ("Budget of a run", f"{run}, {number(data.epochs, 2)} passes over the text"),
        ("Seeds", ", ".join(map(str, seeds))),
    ]


def _text_facts(facts: Facts) -> list[tuple[str, str]]:
    size, per_token = number(_amount(facts, "vocab_size"), 0), number(_amount(facts, "bytes_per_token"), 2)
    return [
        ("Training text", _amounts(facts, "train")),
        ("Held-out text", _amounts(facts, "validation")),
        ("Vocabulary", f"{size}, {per_token} bytes a token"),
        ("Tokenizer", str(facts.get("tokenizer", NONE))),
        ("Sequence length", f"{number(_amount(facts, 'sequence_length'), 0)} tokens"),
    ]


def _counts(facts: Facts) -> list[tuple[str, str]]:
    """A task's own facts on its data, each under its key; a table or list in one line."""
    return [(capital(key.replace("_", " ")), _fact(value)) for key, value in facts.items()]


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_fact(of)}" for key, of in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or NONE
    if value is None or isinstance(value, bool):
        return {None: NONE, True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value, 2)
    return str(value)


def _amount(facts: Facts, key: str) -> float | None:
    value = facts.get(key)
    return value if isinstance(value, int | float) else None


def _amounts(facts: Facts, part: str) -> str:
    documents, size, tokens = (_amount(facts, f"{what}_{part}") for what in ("documents", "bytes", "tokens"))
    return (
        f"{compact(size, 'B')} in {NONE if documents is None else f'{documents:,}'} documents, {compact(tokens)} tokens"
    )


def environment_facts(results: Results) -> list[tuple[str, str]]:
    """Versions and hardware, as (term, value)."""
    named = {"cpu_count": "CPU cores", "threads": "threads", "device": "device"}
    facts = [(str(named.get(key, key)), str(value)) for key, value in results.environment.items() if value is not None]
    return [*facts, ("whole comparison", duration(results.total_seconds))]


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


@dataclass(frozen=True)
class ShownContinuation:
    """The beginning of a held-out text, how the text goes on, and how each arm goes on: (arm, text)."""

    prompt: str
    reference: str
    outputs: list[tuple[str, str]]


def continuations_section(results: Results) -> list[ShownContinuation]:
    """The continuations of each arm's first run; empty where none were stored."""
    shown: dict[str, ShownContinuation] = {}
    for name, arm in results.arms.items():
        details = arm.runs[0].details if arm.runs else None
        for sample in details.continuations if isinstance(details, PretrainingDetails) else ():
            place = shown.setdefault(sample.prompt, ShownContinuation(sample.prompt, sample.reference, []))
            place.outputs.append((name, sample.output))
    return list(shown.values())
