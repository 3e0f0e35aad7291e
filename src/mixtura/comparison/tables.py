"""The report's tables as plain values: groups of rows, a cell for each arm, ready for HTML and for Markdown.

A cell is {"text", "note"}: the number, and in smaller type what belongs to it.
"""

from typing import Any

from mixtura.comparison.cautions import is_searched
from mixtura.comparison.wording import (
    NBSP,
    NONE,
    TIMES,
    compact,
    count,
    digits_for,
    duration,
    interval,
    memory,
    number,
    percent,
    rate,
    signed,
    times,
)

Cell = dict[str, str]


def main_table(results: dict[str, Any], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The main table: {"title", "rows": [{"label", "hint", "cells"}]}, cells in the order of the arms."""
    base = next(arm["label"] for arm in summary["arms"].values() if arm["baseline"])
    spread = f"as deployed; 95{NBSP}% interval over seeds" if summary["budget"]["seeds"] > 1 else "as deployed"
    groups = {
        "Held-out loss": [
            ("As deployed", "nats a token; the verdict's number", _deployed),
            (f"Minus {base}'s", spread, _difference),
            ("Bits per byte", "as deployed", _bits),
            ("As trained", "never the headline", _trained),
            ("Deployed minus trained", "what leaving the training groups costs", _mode_gap),
        ],
        "Time": [
            ("Seconds a step", f"side by side; {TIMES} {base}'s, by paired steps", _pace),
            (f"Steps to {base}'s final loss", "times fewer", _steps_to),
            (f"Time to {base}'s final loss", "times less", _time_to),
            ("Loss difference at equal time", "where the faster of the two ends", _equal_time),
            ("Training time", "mean of a run", _train_time),
        ],
        "Size and cost": [
            ("Parameters, total", "", _parameters),
            ("Parameters, active", "used for one token", _active),
            ("FLOPs a token", "forward and backward, routing and mixing counted", _flops),
            ("Peak memory", "while training", _memory),
        ],
        "Experts": [
            ("Load imbalance", "busiest expert over the average; 1 is even", _imbalance),
            ("Dropped", "share of routed rows", _dropped),
            ("Router entropy", "1 is undecided, 0 is hard", _entropy),
            ("Leaks while training", "what a token's output depends on", _leaks),
            ("Leaks as deployed", "", _leaks_deployed),
        ],
        "Stability": [
            ("Gradient norm", "mean, and largest", _gradient),
            ("Spikes", "of the loss, and of the gradient norm, over all seeds", _spikes),
            ("Learning rate", "peak, and where it comes from", _rate),
        ],
    }
    pairs = [(results["arms"][name], summary["arms"][name]) for name in results["arms"]]
    return [
        {
            "title": title,
            "rows": [
                {"label": label, "hint": hint, "cells": [cell(arm, said) for arm, said in pairs]}
                for label, hint, cell in rows
            ],
        }
        for title, rows in groups.items()
    ]


def _cell(text: str, note: str = "") -> Cell:
    return {"text": text, "note": note}


def _deployed(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    if arm["deployed_mode"] is None:
        return _cell(NONE, "cannot be deployed")
    if said["diverged"]:
        return _cell(NONE, f"{said['diverged']} of {count(len(said['seeds']), 'run')} diverged")
    return _cell(
        number(said["loss"]["deployed"]), "" if arm["deployed_mode"] == "causal" else f"mode {arm['deployed_mode']}"
    )


def _difference_cell(difference: dict[str, Any] | None, missing: str = "") -> Cell:
    if difference is None:
        return _cell(NONE, missing)
    digits = digits_for(difference["mean"], difference["low"], difference["high"])
    spread = "one seed" if difference["low"] is None else interval(difference["low"], difference["high"], digits)
    return _cell(signed(difference["mean"], digits), spread)


def _difference(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _difference_cell(said["difference"]["deployed"], "baseline" if said["baseline"] else "")


def _bits(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(NONE if said["diverged"] else number(said["bits_per_byte"]["deployed"]))


def _trained(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    if said["diverged"]:
        return _cell(NONE, "diverged")
    mode = arm["training_mode"]
    return _cell(number(said["loss"]["trained"]), "" if mode == "causal" else f"mode {mode}")


def _mode_gap(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _difference_cell(said["mode_gap"], "" if arm["deployed_mode"] is None else "one mode")


def _pace(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    pace = arm["seconds_per_step"]
    return _cell(number(pace, 3 if pace is None or pace >= 0.1 else 4), times(arm["seconds_ratio"]))


def _ratio_cell(said: dict[str, Any], key: str) -> Cell:
    speed = said["speed_up"]
    if speed is None:
        return _cell(NONE, "baseline" if said["baseline"] else "")
    if speed["ratio_steps"] is None:
        return _cell("not reached", f"in {speed['n'] - speed['reached']} of {count(speed['n'], 'seed')}")
    ratio = speed[key]
    return _cell(NONE) if ratio is None else _cell(times(ratio["mean"]), _ratio_note(ratio))


def _ratio_note(ratio: dict[str, Any]) -> str:
    return "one seed" if ratio["low"] is None else interval(ratio["low"], ratio["high"], 2)


def _steps_to(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _ratio_cell(said, "ratio_steps")


def _time_to(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _ratio_cell(said, "ratio_seconds")


def _equal_time(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _difference_cell(said["equal_time"], "baseline" if said["baseline"] else "")


def _train_time(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(duration(said["averages"]["train_seconds"]))


def _parameters(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(compact(arm["parameters_total"]))


def _active(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(compact(arm["parameters_active"]))


def _flops(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(compact(arm["flops_per_token"], "FLOP"), times(arm["flops_ratio"], 3))


def _memory(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(memory(arm["peak_memory_bytes"]))


def _imbalance(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(number(said["averages"]["load_imbalance"], 2))


def _dropped(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(percent(said["averages"]["dropped_share"]))


def _entropy(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(number(said["averages"]["router_entropy"], 2))


def _leaks(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    found = [word for key, word in (("future", "later tokens"), ("batch", "other examples")) if arm["leaks"][key]]
    return _cell(" and ".join(found) or "none")


def _leaks_deployed(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    if arm["deployed_mode"] is None:
        return _cell(NONE)
    found = ["later tokens"] if arm["leaks"]["future"] else []
    return _cell(" and ".join([*found, *(["other examples"] if arm["leaks"].get("batch_deployed") else [])]) or "none")


def _gradient(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    averages = said["averages"]
    return _cell(number(averages["grad_norm_mean"], 2), f"max {number(averages['grad_norm_max'], 2)}")


def _spikes(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    return _cell(f"{said['averages']['spikes_loss']} / {said['averages']['spikes_grad_norm']}")


def _rate(arm: dict[str, Any], said: dict[str, Any]) -> Cell:
    if not is_searched(arm):
        return _cell(rate(arm["learning_rate"]), "not searched")
    edge = ", at the edge" if arm["learning_rate_search"]["at_edge"] else ""
    return _cell(rate(arm["learning_rate"]), f"searched{edge}")


def seed_table(summary: dict[str, Any]) -> dict[str, Any]:
    """The final losses of every run: {"columns": [{"arm", "mode"}], "rows": [{"seed", "cells"}], "mean": cells}.

    A column for each arm and inference mode, the deployed mode first.
    """
    columns = [(name, mode) for name, arm in summary["arms"].items() for mode in _ordered_modes(arm)]
    seeds = sorted({seed for arm in summary["arms"].values() for seed in arm["seeds"]})
    rows = [
        {"seed": seed, "cells": [_run_loss(summary["arms"][name], mode, seed) for name, mode in columns]}
        for seed in seeds
    ]
    means = [_mean_loss(summary["arms"][name], mode) for name, mode in columns]
    return {
        "columns": [{"arm": name, "mode": _mode_words(summary["arms"][name], mode)} for name, mode in columns],
        "rows": rows,
        "mean": means,
    }


def _ordered_modes(arm: dict[str, Any]) -> list[str]:
    return sorted(arm["modes"], key=lambda mode: (mode != arm["deployed_mode"], mode != arm["training_mode"]))


def _mode_words(arm: dict[str, Any], mode: str) -> str:
    roles = [word for word, key in (("deployed", "deployed_mode"), ("trained", "training_mode")) if arm[key] == mode]
    said = "alone, all experts" if mode == "alone_all" else mode
    return said if len(roles) != 1 else f"{said}, as {roles[0]}"


def _run_loss(arm: dict[str, Any], mode: str, seed: int) -> str:
    if seed not in arm["seeds"]:
        return NONE
    value = arm["modes"][mode]["loss"]["values"][arm["seeds"].index(seed)]
    return "diverged" if value is None else number(value, 4)


def _mean_loss(arm: dict[str, Any], mode: str) -> str:
    # The mean of the runs that did not diverge would flatter the arm.
    loss = arm["modes"][mode]["loss"]
    return NONE if None in loss["values"] else number(loss["mean"], 4)


def pair_table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Every pair of arms in the verdict: {"first", "second", "text", "note", "outcome"}."""
    words = {"beats": "beats", "loses": "loses to", "draw": "draws with", "one_seed": "against"}
    return [
        {
            "first": pair["arm"],
            "second": pair["against"],
            "outcome": words.get(pair["outcome"], NONE),
            **_difference_cell(pair["difference"]),
        }
        for pair in summary["pairs"]
    ]


def data_facts(results: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the arms were trained on and for how long, as (term, value)."""
    data, budget = results["data"], summary["budget"]
    seeds = sorted({seed for arm in summary["arms"].values() for seed in arm["seeds"]})
    run = (
        f"{budget['steps']:,} steps of {budget['tokens_per_step']:,} tokens, {compact(budget['tokens'])} tokens in all"
    )
    return [
        ("Text", data["description"]),
        ("Training text", _amounts(data, "train")),
        ("Held-out text", _amounts(data, "validation")),
        ("Vocabulary", f"{number(data.get('vocab_size'), 0)}, {number(data.get('bytes_per_token'), 2)} bytes a token"),
        ("Tokenizer", str(data.get("tokenizer", NONE))),
        ("Sequence length", f"{number(data.get('sequence_length'), 0)} tokens"),
        ("Budget of a run", f"{run}, {number(data.get('epochs'), 2)} passes over the text"),
        ("Seeds", ", ".join(map(str, seeds))),
    ]


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
