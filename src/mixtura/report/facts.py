"""What a comparison ran on, as (term, value) pairs for the report: data, budget, versions and hardware."""

from typing import Any

from mixtura.report.wording import NONE, capital, compact, duration, number


def data_facts(results: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the arms were trained on and for how long, as (term, value)."""
    data, budget = results["data"], summary["budget"]
    seeds = sorted({seed for arm in summary["arms"].values() for seed in arm["seeds"]})
    run = (
        f"{budget['steps']:,} steps of {budget['tokens_per_step']:,} tokens, {compact(budget['tokens'])} tokens in all"
    )
    return [
        ("Text", data["description"]),
        *(_text_facts(data) if results["task"] == "pretraining" else _counts(data)),
        ("Budget of a run", f"{run}, {number(data.get('epochs'), 2)} passes over the text"),
        ("Seeds", ", ".join(map(str, seeds))),
    ]


def _text_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Training text", _amounts(data, "train")),
        ("Held-out text", _amounts(data, "validation")),
        ("Vocabulary", f"{number(data.get('vocab_size'), 0)}, {number(data.get('bytes_per_token'), 2)} bytes a token"),
        ("Tokenizer", str(data.get("tokenizer", NONE))),
        ("Sequence length", f"{number(data.get('sequence_length'), 0)} tokens"),
    ]


def _counts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """A task's own facts on its data, each under its key; a table or list in one line."""
    shown = {key: value for key, value in data.items() if key not in ("description", *_BUDGET)}
    return [(capital(key.replace("_", " ")), _fact(value)) for key, value in shown.items()]


_BUDGET = ("tokens_per_step", "tokens_per_run", "epochs")


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_fact(of)}" for key, of in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or NONE
    if value is None or isinstance(value, bool):
        return {None: NONE, True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value, 2)
    return str(value)


def _amounts(data: dict[str, Any], part: str) -> str:
    documents, size, tokens = (data.get(f"{what}_{part}") for what in ("documents", "bytes", "tokens"))
    return (
        f"{compact(size, 'B')} in {NONE if documents is None else f'{documents:,}'} documents, {compact(tokens)} tokens"
    )


def environment_facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions and hardware, as (term, value)."""
    named = {"cpu_count": "CPU cores", "threads": "threads", "device": "device"}
    facts = [
        (str(named.get(key, key)), str(value)) for key, value in results["environment"].items() if value is not None
    ]
    return [*facts, ("whole comparison", duration(results.get("total_seconds")))]
