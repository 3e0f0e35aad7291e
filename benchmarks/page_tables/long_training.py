"""Pages on losses at several budgets: the long runs with their law, and studies of mixture of tokens."""

from statistics import fmean
from typing import Any

from mixtura.config import ArmConfig
from mixtura.config.initialization import derived_scales
from mixtura.planning.evidence import FEWEST_TOKENS, Evidence, load_evidence
from mixtura.planning.laws import fit_law, held_out_forecasts, noise_of
from mixtura.report.significance import paired_difference
from page_tables.layout import count_seeds, deployed_loss, margin_of, page_top, stored_records, table_of

SEARCHES = ("search", "scale")
"""Names of long runs that are no evidence of an arm."""


def long_runs() -> str:
    """Losses of every family at several budgets, the searches before them, and the law fitted to them."""
    text = page_top(
        "How do the families compare as training goes on?",
        "`benchmarks/results/long-runs-cpu.json`",
        "Held-out nats a token at several budgets of `python benchmarks/long_runs.py train`: one constant rate a run, "
        "and for each budget a copy that decays. Differences are paired by seed, with 95 % t-intervals where there are "
        "two seeds or more. Mixtures of tokens count as deployed: the better of `population` and `alone`, two mixtures "
        "a token. "
        "[Results](../results.md) says what follows.",
    )
    ((name, record),) = stored_records("long-runs-cpu.json")
    runs, evidence = [record["settings"] | row for row in record["rows"]], load_evidence()
    runs = [run | {"name": "scale"} if run["tokens"] < FEWEST_TOKENS else run for run in runs]
    made, about = record["created"][:10], record["environment"]
    processors = " and ".join(sorted({run["processor"] for run in runs}))
    text += f"{made}, {processors}, torch {about['torch']}, transformers {about['transformers']} (`{name}`).\n\n"
    text += f"## Difference to dense\n\n{_differences(runs)}\n"
    text += f"## Mixture of tokens by mode\n\n{_modes(runs)}\n"
    text += f"## Load, time and spikes\n\n{_loads(runs, evidence)}\n"
    width, rate = record["settings"]["width"], record["settings"]["rate"]
    text += f"## Searches of scales, seed 0 unless said\n\n{_searches(runs, width=width, rate=rate)}\n"
    if rates := _rates(runs, width=width):
        text += (
            f"## Searches of the rate, width {width}, seed 0\n\n"
            "Loss, and after a stroke the difference to dense; in the last rows each at its own best rate. Where that "
            "is the highest tried, as of ReMoE and expert threshold at 1 million tokens, the arm may be better still."
            f"\n\n{rates}\n"
        )
    if scales := _scales(runs):
        text += f"## Scales at three widths\n\n{scales}\n"
    text += f"## The law\n\n{_law(evidence)}"
    return text


def _named(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[int, dict[int, dict[str, Any]]]]:
    """Runs that are evidence: by arm and width, then by budget, then by seed."""
    found: dict[tuple[str, int], dict[int, dict[int, dict[str, Any]]]] = {}
    for run in runs:
        if run["name"] not in SEARCHES:
            of_arm = found.setdefault((run["name"], run["width"]), {})
            of_arm.setdefault(run["tokens"], {})[run["seed"]] = run
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0] != "dense", item[0][0])))


def _differences(runs: list[dict[str, Any]]) -> str:
    named = _named(runs)
    budgets = sorted({tokens for of_arm in named.values() for tokens in of_arm})
    rows = []
    for (arm, width), of_arm in named.items():
        cells = []
        for tokens in budgets:
            own = {seed: deployed_loss(run) for seed, run in of_arm.get(tokens, {}).items()}
            base = {seed: deployed_loss(run) for seed, run in named.get(("dense", width), {}).get(tokens, {}).items()}
            if arm == "dense" and own:
                cells.append(f"{sum(own.values()) / len(own):.3f} ({count_seeds(len(own))})")
            else:
                cells.append(margin_of(paired_difference(own, base)))
        rows.append([arm.replace("_", " "), str(width), *cells])
    return table_of(["arm", "width", *(f"{tokens / 1e6:.1f} M tokens" for tokens in budgets)], rows)


def _modes(runs: list[dict[str, Any]]) -> str:
    modes = ("group", "alone_top2", "population_top2", "alone_all", "population_all")
    mixing = [run for run in runs if "group" in run["losses"] and run["name"] not in SEARCHES]
    rows = (
        [
            run["name"].replace("_", " "),
            str(run["width"]),
            str(run["seed"]),
            f"{run['tokens'] / 1e6:.1f} M",
            *(f"{run['losses'][mode]:.3f}" if mode in run["losses"] else "" for mode in modes),
        ]
        for run in mixing
    )
    return table_of(["arm", "width", "seed", "tokens", *(mode.replace("_", " ") for mode in modes)], rows)


def _loads(runs: list[dict[str, Any]], evidence: Evidence) -> str:
    rows = []
    for (arm, width), of_arm in _named(runs).items():
        last = of_arm[max(of_arm)]
        loads = [run["load"] for run in last.values() if run["load"]]
        mean = {key: sum(load[key] for load in loads) / len(loads) for key in loads[0]} if loads else {}
        step = evidence.step_ratio(arm, width=width) if evidence.of("dense", width=width) else None
        parameters = next(iter(last.values()))["parameters"]
        rows.append(
            [
                arm.replace("_", " "),
                str(width),
                f"{parameters:,}",
                "" if step is None or step.width != width else f"{step.ratio:.2f}",
                *(f"{mean[key]:.2f}" if mean else "" for key in ("busiest", "idle", "active")),
                str(sum(run["spikes"] for run in last.values())),
            ]
        )
    head = ["arm", "width", "parameters", "step, dense 1", "busiest expert, even 1", "idle experts", "active", "spikes"]
    return table_of(head, rows)


def _derived(family: str, placement: str, width: int) -> float:
    """The scale of gated experts, or of dense layers, that an arm without one of its own takes."""
    arm = ArmConfig(family=family, placement=placement)  # pyright: ignore[reportArgumentType]
    scales = derived_scales(arm, hidden_size=width, gated=True)
    return round(scales.expert_scale or scales.dense_scale or 0.0, 3)


def _scales(runs: list[dict[str, Any]]) -> str:
    """Searches over the scale at which feed-forward layers start, at several widths and placements."""
    found: dict[tuple[str, str, int, int], dict[float, dict[int, float]]] = {}
    for run in (run for run in runs if run["name"] == "scale"):
        scale = run["arm"]["dense_scale" if run["family"] == "dense" else "expert_scale"]
        losses = found.setdefault((run["family"], run["placement"], run["width"], run["tokens"]), {})
        losses.setdefault(scale, {})[run["seed"]] = deployed_loss(run)
    rows = []
    for (family, placement, width, tokens), losses in sorted(found.items()):
        if len(losses) < 2:
            continue
        cells = [
            f"{scale:g}: {fmean(of.values()):.3f} ({count_seeds(len(of))})" for scale, of in sorted(losses.items())
        ]
        derived = losses.get(_derived(family, placement, width), {})
        # On the same seeds, which differ more than scales do.
        behind = [
            fmean(derived[seed] - of[seed] for seed in of.keys() & derived)
            for of in losses.values()
            if of.keys() & derived
        ]
        setting = [family.replace("_", " "), placement.replace("_", " "), str(width), f"{tokens / 1e6:.1f} M"]
        unknown = f"not run ({_derived(family, placement, width):g})"
        rows.append([*setting, ", ".join(cells), f"{max(behind):.3f}" if behind else unknown])
    if not rows:
        return ""
    return table_of(["family", "mixtures in", "width", "tokens", "scale: loss", "derived behind the best"], rows)


def _rates(runs: list[dict[str, Any]], *, width: int) -> str:
    """Losses of the arms at several rates, all else as in the runs that count."""
    shown = [run for run in runs if run["width"] == width and run["seed"] == 0 and run["tokens"] >= FEWEST_TOKENS]
    arms = {run["family"]: run["arm"] for run in shown if run["name"] == run["family"]}
    found: dict[tuple[int, float], dict[str, float]] = {}
    for run in shown:
        as_arm = run["arm"] == arms[run["family"]] and run["intermediate"] is None
        if as_arm and run["name"] in ("search", run["family"]):
            found.setdefault((run["tokens"], run["rate"]), {})[run["family"]] = deployed_loss(run)
    budgets = sorted({tokens for tokens, rate in found if len(found[tokens, rate]) > 1})
    rows = []
    for tokens in budgets:
        tried = {rate: losses for (budget, rate), losses in sorted(found.items()) if budget == tokens}
        if len(tried) < 2:
            continue
        seen = {family: [of[family] for of in tried.values() if family in of] for family in arms}
        best = {family: min(losses) for family, losses in seen.items() if len(losses) > 1}
        for name, losses in [*((f"{rate:g}", losses) for rate, losses in tried.items()), ("best", best)]:
            cells = []
            for family in arms:
                to_dense = family != "dense" and "dense" in losses and family in losses
                gap = f" / {losses[family] - losses['dense']:+.3f}" if to_dense else ""
                cells.append(f"{losses[family]:.3f}{gap}" if family in losses else "")
            rows.append([f"{tokens / 1e6:.1f} M", name, *cells])
    return table_of(["tokens", "rate", *(family.replace("_", " ") for family in arms)], rows) if rows else ""


def _searches(runs: list[dict[str, Any]], *, width: int, rate: float) -> str:
    runs = [run for run in runs if run["name"] != "scale" and run["rate"] == rate]
    least = min(run["tokens"] for run in runs)
    shown = [run for run in runs if run["tokens"] == least and run["width"] == width]
    hidden = ("top_k", "normalize_top_k")
    rows = (
        [
            (run["family"] if run["name"] in SEARCHES else run["name"]).replace("_", " "),
            run["placement"].replace("_", " "),
            ", ".join(f"{key} {value}" for key, value in run["arm"].items() if key not in hidden) or "derived",
            str(run["seed"]),
            f"{deployed_loss(run):.3f}",
        ]
        for run in sorted(shown, key=lambda run: (run["family"], deployed_loss(run)))
        if run["name"] == "search" or run["seed"] == 0
    )
    return table_of(["arm", "layers", "scales", "seed", f"loss at {least / 1e6:.1f} M tokens"], rows)


def _law(evidence: Evidence) -> str:
    ends = evidence.ends(evidence.arms())
    law, forecasts = fit_law(ends), held_out_forecasts(ends)
    noise = noise_of(ends, law)
    size = "" if law.alpha is None else f"Size exponent {law.alpha:.3f}; "
    text = f"{size}{'r' if size else 'R'}uns scatter by {noise.of_run:.4f} nats between seeds and "
    text += f"{noise.of_end:.4f} within a run, lack of fit included.\n\n"
    rows = [
        [
            arm.replace("_", " "),
            f"{law.floors[arm]:.3f}",
            f"{law.betas[arm]:.3f}" if law.betas else "",
            f"{law.data_terms.get(arm, 0):,.0f}",
            f"{law.size_terms.get(arm, 0):.2f}",
        ]
        for arm in law.floors
    ]
    text += table_of(["arm", "floor c", "data exponent beta", "data term b", "size term n"], rows)
    if not forecasts:
        return text + "\nToo few budgets to hold the longest out.\n"
    rows = [
        [
            each.arm.replace("_", " "),
            f"{each.parameters:,.0f}",
            f"{each.tokens / 1e6:.1f} M",
            f"{each.predicted:.3f}",
            f"{each.measured:.3f}",
            f"{each.predicted - each.measured:+.3f}",
        ]
        for each in forecasts
    ]
    text += "\nThe longest runs, predicted from the shorter ones:\n\n"
    return text + table_of(["arm", "parameters", "tokens", "predicted", "measured", "error"], rows)


def studies() -> str:
    """Variants of mixture of tokens, each beside the plain one and dense of the same seeds."""
    text = page_top(
        "What else helps mixture of tokens?",
        "`benchmarks/results/studies-cpu.json` and `long-runs-cpu.json`",
        "Held-out nats a token of variants, by `python benchmarks/long_runs.py train benchmarks/studies.jsonl`: "
        "16 experts in groups of 16 in the later half of the layers where the variant does not say otherwise. "
        "Differences are paired by seed, with 95 % t-intervals where there are two seeds or more; below zero the "
        "variant is better. [Results](../results.md) has the plain arms, the [log](../log.md) says what follows.",
    )
    ((name, record),) = stored_records("studies-cpu.json")
    ((_, plain),) = stored_records("long-runs-cpu.json")
    named = _named([plain["settings"] | row for row in plain["rows"]])
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    scales, large = [], []
    for run in (record["settings"] | row for row in record["rows"]):
        if run["name"] == "scale":
            scales.append(run)
        elif run["batch"] != record["settings"]["batch"]:
            large.append(run)
        else:
            found.setdefault((run["name"], run["tokens"]), {})[run["seed"]] = run
    about = record["environment"]
    text += f"{record['created'][:10]}, {about['processor']}, torch {about['torch']}, "
    text += f"transformers {about['transformers']} (`{name}`).\n\n"
    rows = []
    for (variant, tokens), of_seed in found.items():
        width = record["settings"]["width"]
        own = {seed: deployed_loss(run) for seed, run in of_seed.items()}
        base = [
            {seed: deployed_loss(run) for seed, run in named.get((arm, width), {}).get(tokens, {}).items()}
            for arm in ("mixture_of_tokens", "dense")
        ]
        modes = [_mean_of(of_seed, mode) for mode in ("group", "alone_top2", "population_top2")]
        rows.append(
            [variant, f"{tokens / 1e6:.1f} M", *modes, *(margin_of(paired_difference(own, other)) for other in base)]
        )
    head = ["variant", "tokens", "in groups", "`alone`", "`population`", "to plain, as deployed", "to dense"]
    text += table_of(head, rows)
    if scales:
        text += f"\n## Scales of wide models\n\n{_scales(scales)}"
    return text + (f"\n## Large batches\n\n{_large_batches(large)}" if large else "")


def _large_batches(runs: list[dict[str, Any]]) -> str:
    """Mixture of tokens beside dense with steps of many tokens, a row for each rate."""
    found: dict[tuple[int, int, float, int], dict[str, dict[str, Any]]] = {}
    for run in runs:
        key = (run["batch"] * run["context"], run["tokens"], run["rate"], run["seed"])
        found.setdefault(key, {})[run["family"]] = run
    rows = []
    for (step, tokens, rate, seed), arms in sorted(found.items()):
        dense, mixture = arms["dense"], arms["mixture_of_tokens"]
        modes = [f"{mixture['losses'][mode]:.3f}" for mode in ("group", "alone_top2", "population_top2")]
        margin = f"{deployed_loss(mixture) - deployed_loss(dense):+.3f}"
        cells = [f"{step:,}", f"{tokens / 1e6:.1f} M", f"{rate:g}", str(seed), f"{deployed_loss(dense):.3f}"]
        rows.append([*cells, *modes, margin])
    head = ["tokens a step", "tokens", "rate", "seed", "dense", "in groups", "`alone`", "`population`", "to dense"]
    return table_of(head, rows)


def _mean_of(runs: dict[int, dict[str, Any]], mode: str) -> str:
    return f"{fmean(run['losses'][mode] for run in runs.values()):.3f}"
