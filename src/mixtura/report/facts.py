"""What a comparison ran on, as (term, value) pairs for the report: data, budget, versions and hardware."""

from mixtura.report.wording import NONE, capital, compact, duration, number
from mixtura.results import Facts, Results, Summary


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
