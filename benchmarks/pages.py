"""Writes docs/results/: the tables of the records under benchmarks/results/ and of the searches beside the recipes.

A page holds what its records hold and nothing else, so a number is corrected by measuring again and never by hand.
`make docs` runs `python benchmarks/pages.py`; a test fails where a page and its records differ.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from mixtura.benchmarks.decoding_bound import bound
from mixtura.config import ArmConfig
from mixtura.config.initialization import derived_scales
from mixtura.planning.evidence import FEWEST_TOKENS, Evidence, fit_law, held_out_forecasts, load_evidence, noise_of
from mixtura.report.significance import paired_difference
from mixtura.results.conclusions import Difference

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
NOTE = "`python benchmarks/pages.py` makes this page from {source}. Do not edit it by hand."
PASSES = {
    "training": "Forward and backward",
    "forward": "Forward alone",
    "step": "Forward, backward and fused AdamW",
}
SEARCHES = ("search", "scale")
"""Names of long runs that are no evidence of an arm."""
PARTS = ("attention", "feed-forward", "head and loss", "rest", "clipping", "optimizer")
"""What the benchmark of whole steps tells apart, as its records name it."""


def pages() -> dict[str, str]:
    """Content of every page by file name."""
    makers = {
        "layers": layers,
        "steps": steps,
        "runs": runs,
        "decoding": decoding,
        "experts": experts,
        "rates": rates,
        "initialisation": initialisation,
        "long-runs": long_runs,
        "fine-tuning": fine_tuning,
    }
    if _records("families-*.json"):
        makers["families"] = families
    if _records("studies-*.json"):
        makers["studies"] = studies
    if _records("gpu-*.json"):
        makers["gpu"] = gpu
    return {f"{name}.md": make() for name, make in makers.items()}


def layers() -> str:
    """Single layers against a dense layer and other libraries."""
    text = _top(
        "How fast is one layer?",
        "`benchmarks/results/layers-*.json`",
        "A cell is the time relative to a dense layer of equal FLOPs (median of the rounds, then lowest and highest "
        "round) and the utilisation: the time of one large product of the same FLOPs over the layer's. "
        "[Performance](../performance.md) says how this is measured and what follows. *Plain* stands for the textbook "
        "formulation in torch operators.",
    )
    for name, record in _records("layers-*.json"):
        sizes = record["sizes"]
        shape = sizes[0]["size"]
        text += f"## {shape['tokens']:,} tokens x {shape['hidden']:,}\n\n{_machine(name, record)}\n\n"
        for what, title in PASSES.items():
            cells = [_of_pass(entry, what) for entry in sizes]
            if any(cells):
                names = dict.fromkeys(name for column in cells for name in column)
                rows = ([contender, *(column.get(contender, "-") for column in cells)] for contender in names)
                text += f"### {title}\n\n{_table(['contender', *map(_size, sizes)], rows)}\n"
        left_out = sorted({f"{name}: {reason}" for entry in sizes for name, reason in entry["left_out"].items()})
        text += "Left out at one size or more:\n\n" + "".join(f"- {line}\n" for line in left_out) + "\n"
    return text.rstrip("\n") + "\n"


def steps() -> str:
    """Whole training steps of models."""
    text = _top(
        "How fast is a whole training step?",
        "`benchmarks/results/steps-*.json`",
        "Models whose layers are all mixtures, with attention, embeddings and a head; a step is forward, backward, "
        "clipping and fused AdamW, and the models alternate. The last six columns are milliseconds, medians of their "
        "own: of a module forward and backward, the loss with the head, norms and embedding with the rest. "
        "[Performance](../performance.md) says what follows.",
    )
    head = ["experts", "family", "time relative to dense (range)", "tokens/s", *PARTS]
    for name, record in _records("steps-*.json"):
        settings = record["settings"]
        text += f"## {settings['tokens']:,} tokens a step\n\n{_machine(name, record)} "
        text += f"{settings['layers']} layers, {settings['hidden']} hidden, vocabulary {settings['vocabulary']:,}.\n\n"
        rows = (
            [
                f"{row['experts']}, top {row['top_k']}",
                row["family"].replace("_", " "),
                f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})",
                f"{row['tokens_per_second']:,.0f}",
                *(f"{1000 * row['seconds'][part]:,.0f}" for part in PARTS),
            ]
            for row in record["rows"]
        )
        text += _table(head, rows) + "\n"
    return text.rstrip("\n") + "\n"


def runs() -> str:
    """Whole runs against a loop written by hand."""
    text = _top(
        "How fast is a whole run?",
        "`benchmarks/results/runs-*.json`",
        "`mixtura train` against a bare torch loop of 60 lines (`benchmarks/bare_loop.py`) with the same model, text, "
        "batches and steps; medians of alternating rounds, of processor seconds on one thread and seconds on the wall "
        "on two, where the loop's threads wait as torch has them. *Speed* is that of Mixtura's steps, the loop's being "
        "1. *Around* is what passes between the command and the last checkpoint outside the steps, with the text "
        "prepared before: in Mixtura with leak probes and two evaluations, which the loop has not. What follows the "
        "last checkpoint is not counted, and is the last two columns of the second table. *Default* is that recipe as "
        "it was on the day of the record: on one thread with plain layers of width 128. Forward, backward, clipping "
        "and optimizer take 97 % of Mixtura's steps (token choice at the quick size, under a profiler), so a speed "
        "below 0.97 is how much such medians scatter.",
    )
    head = ["size", "arm", "tokens a step", "speed (range)", "tokens/s", "loop", "around, s", "loop, s"]
    for name, record in sorted(_records("runs-*.json"), key=lambda item: item[1]["settings"]["threads"]):
        imports = sorted(record["trainer_imports"])
        settings = record["settings"]
        text += f"## {settings['threads']} thread{'s' if settings['threads'] > 1 else ''}\n\n"
        text += f"{_machine(name, record)} {settings['steps']} steps a run. "
        if settings.get("beside"):
            busy = " to ".join(f"{load:.1f}" for load in sorted(settings["load_average"]))
            text += f"Beside them ran {settings['beside']}: {busy} programs wanted a core. "
        text += "Importing torch and "
        text += f"transformers' Trainer alone takes {imports[0]:.1f} to {imports[-1]:.1f} s.\n\n"
        text += _table(head, map(_run_speeds, record["rows"])) + "\nSeconds of the parts around the steps:\n\n"
        parts = list(record["rows"][0]["parts"])
        seconds = (
            [row["size"], row["arm"].replace("_", " "), *(f"{row['parts'][part]:.2f}" for part in parts)]
            for row in record["rows"]
        )
        text += _table(["size", "arm", *parts], seconds) + "\n"
    return text.rstrip("\n") + "\n"


def _run_speeds(row: dict[str, Any]) -> list[str]:
    own, bare, ratio = row["mixtura"], row["bare"], row["speed_ratio"]
    return [
        row["size"],
        row["arm"].replace("_", " "),
        f"{row['tokens_a_step']:,}",
        f"{ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})",
        f"{own['tokens_per_second']:,.0f}",
        f"{bare['tokens_per_second']:,.0f}",
        f"{own['around']:.1f}",
        f"{bare['around']:.1f}",
    ]


def decoding() -> str:
    """Generation token by token."""
    text = _top(
        "How fast is decoding?",
        "`benchmarks/results/decode-*.json` and `served-*.json`",
        "Whole models with a cache and random weights, at equal active width; medians of alternating rounds. *Speed* "
        "is tokens per second relative to the dense model, prompt and sampling included. *By weights* is what it would "
        "be if steps waited for weights alone: bytes that a dense step reads over those of the mixture, attention and "
        "head included. A batch of B sequences that choose K of E experts evenly runs E (1 - (1 - K/E)^B) of them. "
        "*Layer* is the time of one feed-forward layer, router and Python included, for one token of each sequence. "
        "*Least* is what the machine allows it: reading as many bytes as the experts have that these tokens chose, or "
        "as many FLOPs in one large product, if that takes longer; *of it* is the share reached. The last table has "
        "exports in the programs that serve them. [Deploying mixture of tokens](../deploying-mot.md#speed) says what "
        "follows.",
    )
    head = ["batch", "form", "speed, dense 1", "by weights", "tokens/s", "layer, us", "least, us", "of it", "model, MB"]
    for name, record in sorted(_records("decode-*.json"), key=lambda item: item[1]["settings"]["hidden"]):
        settings = record["settings"]
        sizes = {key: settings[key] for key in ("hidden", "layers", "experts")}
        text += f"## {settings['hidden']} hidden, {settings['layers']} layers, {settings['experts']} experts\n\n"
        rows = (
            [
                str(row["batch"]),
                row["form"],
                f"{row['model_ratio']:.2f}",
                f"{bound(row['form'], batch=row['batch'], **sizes):.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['layer_microseconds']:,.0f}",
                f"{row['layer_bound_microseconds']:,.0f}",
                f"{row['layer_of_bound']:.2f}",
                f"{row['megabytes']:,.0f}",
            ]
            for row in record["rows"]
        )
        text += f"{_machine(name, record)}\n\n{_table(head, rows)}\n"
    for name, record in _records("served-*.json"):
        text += _served(name, record)
    return text.rstrip("\n") + "\n"


def _served(name: str, record: dict[str, Any]) -> str:
    """Exports of models in other engines."""
    settings, rows = record["settings"], record["rows"]
    own = {(row["form"], row["batch"]): row["tokens_per_second"] for row in rows if row["engine"] == "Mixtura"}
    text = f"## Exports, {settings['hidden']} hidden, {settings['layers']} layers, {settings['experts']} experts\n\n"
    text += f"{_machine(name, record)} Gated SiLU models, `generate` of {settings['tokens']} tokens on one thread"
    text += (
        f"; llama-cpp-python {settings['llama_cpp_python']}, float32.\n\n" if settings["llama_cpp_python"] else ".\n\n"
    )
    cells = (
        [
            str(row["batch"]),
            row["form"],
            row["engine"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / own[row['form'], row['batch']]:.2f}",
            f"{row['tokens_per_second'] / _dense_rate(rows, row):.2f}",
        ]
        for row in sorted(rows, key=lambda row: row["batch"])
    )
    return text + _table(["batch", "form", "engine", "tokens/s", "Mixtura 1", "dense in it 1"], cells) + "\n"


def _dense_rate(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """Tokens a second of the dense model in the same program, whatever architecture the export has."""
    program = row["engine"].partition(",")[0]
    return next(
        other["tokens_per_second"]
        for other in rows
        if other["form"] == "dense" and other["batch"] == row["batch"] and other["engine"].startswith(program)
    )


def experts() -> str:
    """Experts of transformers' mixtures on Mixtura's kernels."""
    text = _top(
        "How fast are transformers' mixtures on Mixtura's kernels?",
        "`benchmarks/results/experts-*.json`",
        "How many times as fast as transformers' eager experts: medians of alternating rounds. "
        "[Other tools](../tools.md) says how a model chooses its kernels.",
    )
    for name, record in _records("experts-*.json"):
        settings = record["settings"]
        text += f"## {settings['hidden']} hidden, width {settings['width']}, top {settings['top_k']}\n\n"
        measured: dict[tuple[int, int, str], dict[str, float]] = {}
        for row in record["rows"]:
            measured.setdefault((row["experts"], row["tokens"], row["pass"]), {})[row["implementation"]] = row[
                "times_eager"
            ]
        names = list(dict.fromkeys(name for cells in measured.values() for name in cells))
        rows = (
            [*map(str, key), *(f"{cells[name]:.2f}" if name in cells else "" for name in names)]
            for key, cells in measured.items()
        )
        text += f"{_machine(name, record)}\n\n{_table(['experts', 'tokens', 'pass', *names], rows)}\n"
    return text.rstrip("\n") + "\n"


def rates() -> str:
    """The learning-rate searches whose results the recipes ship."""
    text = _top(
        "Which learning rates were tried for the shipped recipes?",
        "`recipes/*.search.json`",
        "A cell is the held-out loss of a trial, the mean over the seeds of the search; the bold one was chosen. A "
        "rate that is the lowest or highest of its row is at the edge of what was tried, and reports warn of it. "
        "[Comparing](../compare.md) says why every arm has a rate of its own.",
    )
    for path in sorted((ROOT / "recipes").glob("*.search.json")):
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        text += f"## {path.name.removesuffix('.search.json')}\n\n"
        tried = sorted({_pair(trial) for arm in arms.values() for trial in arm["trials"]})
        heads = [f"{rate:g}" + ("" if scale == 1 else f", scale {scale:g}") for rate, scale in tried]
        rows = (
            [f"`{name}`", str(arm["steps"]), ", ".join(map(str, arm["seeds"])), *_trials(arm, tried)]
            for name, arm in arms.items()
        )
        text += _table(["arm", "steps", "seeds", *heads], rows) + "\n"
    return text.rstrip("\n") + "\n"


def gpu() -> str:
    """The prepared run on GPUs."""
    text = _top(
        "What was measured on GPUs?",
        "`benchmarks/results/gpu-*.json`",
        "Times are relative to the dense layer or model of equal FLOPs in the same round; utilisation is the share of "
        "the speed of one large product. [On a GPU](../gpu.md) says what the run does.",
    )
    for name, record in _records("gpu-*.json"):
        about = record["environment"]
        text += f"## {about['device']}\n\n{record['created'][:10]}, torch {about['torch']}, transformers "
        text += f"{about['transformers']}, Triton {record['settings']['triton']} (`{name}`).\n\n"
        text += "".join(f"{title}:\n\n{_table(head, rows)}\n" for title, head, rows in _gpu_tables(record) if rows)
        if record["left_out"]:
            text += "Left out:\n\n" + "".join(f"- {what}: {why}\n" for what, why in record["left_out"].items()) + "\n"
    return text.rstrip("\n") + "\n"


def _gpu_tables(record: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table of a record from the prepared run."""
    checks = [
        [name, f"{row['error']:.1e}", f"{row['gradient_error'] or 0:.1e}", "yes" if row["passed"] else "**no**"]
        for name, row in record["checks"].items()
    ]
    layers = [
        [row["size"], row["contender"], row["pass"], f"{row['milliseconds']:.2f}", *_to_dense(row)]
        for row in record["layers"]
    ]
    models = [
        [row["family"], row["variant"], f"{row['tokens_per_second']:,.0f}", *_to_dense(row)] for row in record["models"]
    ]
    rounds = [
        [f"{one['rate']:g}", name, f"{last['tokens']:,}", f"{last['seconds']:.0f}", _losses(last["held_out"])]
        for one in record["evidence"]["rounds"]
        for name, arm in one["arms"].items()
        for last in arm["curve"][-1:]
    ]
    return [
        ("Errors of the kernels and layers", ["check", "output", "gradients", "passed"], checks),
        ("Layers", ["size", "contender", "pass", "ms", "to dense", "utilisation", "peak MiB"], layers),
        ("Whole steps", ["family", "variant", "tokens/s", "to dense", "utilisation", "peak MiB"], models),
        ("Trained side by side", ["rate", "arm", "tokens", "seconds", "held-out loss"], rounds),
    ]


def _to_dense(row: dict[str, Any]) -> list[str]:
    peak = row["peak_mebibytes"]
    return [f"{row['to_dense']:.2f}", f"{row['utilisation']:.2f}", "-" if peak is None else f"{peak:,.0f}"]


def _losses(held_out: dict[str, float]) -> str:
    return ", ".join(f"{mode.replace('_', ' ')} {loss:.4f}" for mode, loss in held_out.items())


def initialisation() -> str:
    """Losses of models whose weights start at different scales."""
    text = _top(
        "How much does the scale of the first weights matter?",
        "`benchmarks/results/initialisation-*.json`",
        "Held-out nats a token after short runs of layers without a gate, by an earlier form of "
        "`benchmarks/long_runs.py`. A scale multiplies "
        "1 / sqrt(fan-in); a dash is the standard deviation 0.02. Up and down are the two projections of dense layers "
        "and of experts. "
        "One row a run. The [log](../log.md) says what follows.",
    )
    head = [
        "family",
        "layers",
        "width",
        "rate",
        "seed",
        "dense up, down",
        "expert up, down",
        "router",
        "tokens",
        "loss",
    ]
    for name, record in _records("initialisation-*.json"):
        made, about = record["created"][:10], record["environment"]
        text += f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']} "
        text += f"(`{name}`).\n\n"
        rows = (_start(record["settings"] | row) for row in record["rows"])
        text += _table(head, rows) + "\n"
    return text.rstrip("\n") + "\n"


def families() -> str:
    """Every family at the default comparison's size."""
    text = _top(
        "How do all families compare at one size?",
        "`benchmarks/results/families-*.json`",
        "`mixtura compare --preset families`: the default comparison's model, text and steps, with half its warm-up; "
        "every arm at equal FLOPs a token and at the best of its own learning rates, which were tried as the second "
        "table says. *Minus dense* is the loss as deployed, paired by seed, with a 95 % t-interval; below zero is "
        "better. A family without a deployed mode is judged as it trains, and another example of the batch, or a later "
        "token, may leak.",
    )
    for name, record in _records("families-*.json"):
        made, about, rows = record["created"][:10], record["environment"], record["rows"]
        base = _judged(next(row for row in rows if row["arm"] == record["settings"]["baseline"]))
        text += f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']}, "
        text += f"{record['settings']['tokens']:,} tokens a run (`{name}`).\n\n"
        head = ["arm", "loss as deployed", "minus dense", "mode", "other modes", "rate", "parameters", "step, dense 1"]
        cells = []
        for row in sorted(rows, key=lambda row: fmean(_judged(row).values())):
            own, mode = _judged(row), row["deployed_mode"] or row["training_mode"]
            others = {of: fmean(losses.values()) for of, losses in row["losses"].items() if of != mode}
            leaks = "" if row["deployed_mode"] else ", not deployable"
            cells.append(
                [
                    row["arm"].replace("_", " "),
                    f"{fmean(own.values()):.3f} ({_seeds(len(own))})",
                    "" if own == base else _margin(paired_difference(own, base)),
                    mode + leaks,
                    ", ".join(f"{of.replace('_', ' ')} {loss:.3f}" for of, loss in others.items()),
                    f"{row['rate']:g}",
                    f"{row['parameters'] / 1e6:.2f} M",
                    f"{row['seconds_ratio']:.2f}",
                ]
            )
        recipe = tomllib.loads(record["settings"]["recipe"])
        search, steps = recipe["search"], recipe["training"]["steps"]
        seeds = ", ".join(map(str, search["seeds"]))
        text += _table(head, cells)
        text += f"\nThe searches ({search.get('steps', steps)} of {steps} steps, seed {seeds}):\n\n"
        tried = sorted({rate for row in rows for rate, _ in row["trials"]})
        of_rate = [(row["arm"], {rate: loss for rate, loss in row["trials"]}) for row in rows if row["trials"]]
        text += _table(
            ["arm", *(f"{rate:g}" for rate in tried)],
            ([arm.replace("_", " "), *(_loss(losses.get(rate)) for rate in tried)] for arm, losses in of_rate),
        )
    return text


ASKED = ("full", "LoRA", "mixture of LoRA", "MoT adapter", "expert-specialised", "upcycled experts")
"""Ways of fine-tuning that the page compares, or names as not measured."""


def fine_tuning() -> str:
    """Full tuning, adapters and heads over the records of all tasks, with an advice."""
    records = _records("finetuning-*.json")
    against = [row for _, record in records for row in _beside_lora(record)]
    ahead = [row["arm"] for row in against if _side(*row["minus_baseline_better"]) > 0]
    behind = [row["arm"] for row in against if _side(*row["minus_baseline_better"]) < 0]
    measured = {row["method"] for _, record in records for row in record["rows"]}
    missing = [method for method in ASKED if method not in measured]
    counted = f"{_are(len(ahead))} better and {_are(len(behind))} worse by 95 % intervals"
    text = _top(
        "Which way of fine-tuning should I use?",
        "`benchmarks/results/finetuning-*.json`",
        "**Tune with LoRA first, each way at a searched rate, and compare a mixture of LoRA, and full tuning where the "
        "model is small enough**: of "
        f"{len(against)} comparisons of another way with LoRA, {counted}; all are of bases with at most 254 million "
        "parameters, at most a few hundred steps and one kind of machine, so nothing here is known of larger models or "
        "longer runs.\n\nWhere a base stays frozen, read all its layers and not the last alone. "
        + (f"Not measured yet: {' and '.join(missing)}. " if missing else "")
        + "`python benchmarks/finetuning.py FOLDER` adds the record of a comparison of your own.",
    )
    for name, record in records:
        text += f"## {record['task'].capitalize()}: {record['name']}\n\n{_run_of(name, record)}\n\n"
        text += _table(_HEAD, [_tuned(row, record) for row in record["rows"]]) + "\n"
    return text.rstrip("\n") + "\n"


def _are(count: int) -> str:
    return f"{count or 'none'} {'are' if count > 1 else 'is'}"


_HEAD = ["arm", "way", "trained", "step time (training)", "score", "minus baseline (95 %)", "minus untuned base (95 %)"]


def _run_of(name: str, record: dict[str, Any]) -> str:
    about, measure = record["environment"], record["measure"]
    how = f", {record['measured']}" if record["measured"] else ""
    unit = f" in {measure['unit']}" if measure["unit"] else ""
    minutes = f" {record['minutes']:g} minutes." if record["minutes"] else ""
    return (
        f"`{record['command']}`: base {record['base']}, {record['steps']} steps of {record['examples_a_step']}, "
        f"{measure['name']}{unit} ({measure['better']} is better), baseline {record['baseline'].replace('_', ' ')}. "
        f"{record['created'][:10]}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']}"
        f"{how}; from {record['source']} (`{name}`).{minutes}"
    )


def _tuned(row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    ratio, seconds = row["seconds_ratio"], row["train_seconds"]
    time = "-" if ratio is None else f"{ratio:.2f}" + ("" if seconds is None else f" ({seconds:,.0f} s)")
    return [
        row["arm"].replace("_", " "),
        row["method"],
        "-" if row["trained"] is None else f"{row['trained']:,}",
        time,
        f"{row['value']:.{record['measure']['digits']}f} ({_seeds(row['seeds'])})",
        _interval(row["minus_baseline"], record),
        _interval(row["minus_base"], record),
    ]


def _interval(found: dict[str, Any] | None, record: dict[str, Any]) -> str:
    if found is None:
        return ""
    digits = record["measure"]["digits"]
    if found["low"] is None:
        return f"{found['mean']:+.{digits}f} ({found['over']})"
    return f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f}, {found['over']})"


def _beside_lora(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that were compared with LoRA, with the interval turned so that more is better."""
    methods = {row["arm"]: row["method"] for row in record["rows"]}
    if methods[record["baseline"]] != "LoRA":
        return []
    sign = 1 if record["measure"]["better"] == "higher" else -1
    return [
        row | {"minus_baseline_better": sorted(sign * row["minus_baseline"][end] for end in ("low", "high"))}
        for row in record["rows"]
        if row["minus_baseline"] is not None and row["minus_baseline"]["low"] is not None
    ]


def _side(low: float, high: float) -> int:
    """1 or -1 where an interval lies on one side of zero, else 0."""
    return int(low > 0) - int(high < 0)


def _judged(row: dict[str, Any]) -> dict[int, float]:
    """Losses by seed in the mode that counts."""
    losses = row["losses"][row["deployed_mode"] or row["training_mode"]]
    return {int(seed): loss for seed, loss in losses.items()}


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def long_runs() -> str:
    """Losses of every family at several budgets, the searches before them, and the law fitted to them."""
    text = _top(
        "How do the families compare as training goes on?",
        "`benchmarks/results/long-runs-cpu.json`",
        "Held-out nats a token at several budgets of `python benchmarks/long_runs.py train`: one constant rate a run, "
        "and for each budget a copy that decays. Differences are paired by seed, with 95 % t-intervals where there are "
        "two seeds or more. Mixtures of tokens count as deployed: the better of `population` and `alone`, two mixtures "
        "a token. "
        "[Results](../results.md) says what follows.",
    )
    ((name, record),) = _records("long-runs-cpu.json")
    runs, evidence = [record["settings"] | row for row in record["rows"]], load_evidence()
    runs = [run | {"name": "scale"} if run["tokens"] < FEWEST_TOKENS else run for run in runs]
    made, about = record["created"][:10], record["environment"]
    text += (
        f"{made}, {about['processor']}, torch {about['torch']}, transformers {about['transformers']} (`{name}`).\n\n"
    )
    text += f"## Difference to dense\n\n{_differences(runs)}\n"
    text += f"## Mixture of tokens by mode\n\n{_modes(runs)}\n"
    text += f"## Load, time and spikes\n\n{_loads(runs, evidence)}\n"
    text += f"## Searches, seed 0 unless said\n\n{_searches(runs, width=record['settings']['width'])}\n"
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


def _deployed(run: dict[str, Any]) -> float:
    losses = run["losses"]
    return losses["causal"] if "causal" in losses else min(losses["population_top2"], losses["alone_top2"])


def _differences(runs: list[dict[str, Any]]) -> str:
    named = _named(runs)
    budgets = sorted({tokens for of_arm in named.values() for tokens in of_arm})
    rows = []
    for (arm, width), of_arm in named.items():
        cells = []
        for tokens in budgets:
            own = {seed: _deployed(run) for seed, run in of_arm.get(tokens, {}).items()}
            base = {seed: _deployed(run) for seed, run in named.get(("dense", width), {}).get(tokens, {}).items()}
            if arm == "dense" and own:
                cells.append(f"{sum(own.values()) / len(own):.3f} ({_seeds(len(own))})")
            else:
                cells.append(_margin(paired_difference(own, base)))
        rows.append([arm.replace("_", " "), str(width), *cells])
    return _table(["arm", "width", *(f"{tokens / 1e6:.1f} M tokens" for tokens in budgets)], rows)


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count > 1 else "")


def _margin(found: Difference | None) -> str:
    if found is None:
        return ""
    half = "" if found.high is None else f" ± {found.high - found.mean:.3f}"
    return f"{found.mean:+.3f}{half} ({_seeds(found.n)})"


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
    return _table(["arm", "width", "seed", "tokens", *(mode.replace("_", " ") for mode in modes)], rows)


def _loads(runs: list[dict[str, Any]], evidence: Evidence) -> str:
    rows = []
    for (arm, width), of_arm in _named(runs).items():
        last = of_arm[max(of_arm)]
        loads = [run["load"] for run in last.values() if run["load"]]
        mean = {key: sum(load[key] for load in loads) / len(loads) for key in loads[0]} if loads else {}
        ratio, at = evidence.step_ratio(arm, width=width) if evidence.of("dense", width=width) else (None, None)
        parameters = next(iter(last.values()))["parameters"]
        rows.append(
            [
                arm.replace("_", " "),
                str(width),
                f"{parameters:,}",
                "" if ratio is None or at != width else f"{ratio:.2f}",
                *(f"{mean[key]:.2f}" if mean else "" for key in ("busiest", "idle", "active")),
                str(sum(run["spikes"] for run in last.values())),
            ]
        )
    head = ["arm", "width", "parameters", "step, dense 1", "busiest expert, even 1", "idle experts", "active", "spikes"]
    return _table(head, rows)


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
        losses.setdefault(scale, {})[run["seed"]] = _deployed(run)
    rows = []
    for (family, placement, width, tokens), losses in sorted(found.items()):
        if len(losses) < 2:
            continue
        cells = [f"{scale:g}: {fmean(of.values()):.3f} ({_seeds(len(of))})" for scale, of in sorted(losses.items())]
        derived = losses.get(_derived(family, placement, width), {})
        # On the same seeds, which differ more than scales do.
        behind = [
            fmean(derived[seed] - of[seed] for seed in of.keys() & derived)
            for of in losses.values()
            if of.keys() & derived
        ]
        setting = [family.replace("_", " "), placement.replace("_", " "), str(width), f"{tokens / 1e6:.1f} M"]
        rows.append([*setting, ", ".join(cells), f"{max(behind):.3f}" if behind else ""])
    if not rows:
        return ""
    return _table(["family", "mixtures in", "width", "tokens", "scale: loss", "derived behind the best"], rows)


def studies() -> str:
    """Variants of mixture of tokens, each beside the plain one and dense of the same seeds."""
    text = _top(
        "What else helps mixture of tokens?",
        "`benchmarks/results/studies-cpu.json` and `long-runs-cpu.json`",
        "Held-out nats a token of variants, by `python benchmarks/long_runs.py train benchmarks/studies.jsonl`: "
        "16 experts in groups of 16 in the later half of the layers where the variant does not say otherwise. "
        "Differences are paired by seed, with 95 % t-intervals where there are two seeds or more; below zero the "
        "variant is better. [Results](../results.md) has the plain arms, the [log](../log.md) says what follows.",
    )
    ((name, record),) = _records("studies-cpu.json")
    ((_, plain),) = _records("long-runs-cpu.json")
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
        own = {seed: _deployed(run) for seed, run in of_seed.items()}
        base = [
            {seed: _deployed(run) for seed, run in named.get((arm, width), {}).get(tokens, {}).items()}
            for arm in ("mixture_of_tokens", "dense")
        ]
        modes = [_mean_of(of_seed, mode) for mode in ("group", "alone_top2", "population_top2")]
        rows.append(
            [variant, f"{tokens / 1e6:.1f} M", *modes, *(_margin(paired_difference(own, other)) for other in base)]
        )
    head = ["variant", "tokens", "in groups", "`alone`", "`population`", "to plain, as deployed", "to dense"]
    text += _table(head, rows)
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
        margin = f"{_deployed(mixture) - _deployed(dense):+.3f}"
        cells = [f"{step:,}", f"{tokens / 1e6:.1f} M", f"{rate:g}", str(seed), f"{_deployed(dense):.3f}"]
        rows.append([*cells, *modes, margin])
    head = ["tokens a step", "tokens", "rate", "seed", "dense", "in groups", "`alone`", "`population`", "to dense"]
    return _table(head, rows)


def _mean_of(runs: dict[int, dict[str, Any]], mode: str) -> str:
    return f"{fmean(run['losses'][mode] for run in runs.values()):.3f}"


def _searches(runs: list[dict[str, Any]], *, width: int) -> str:
    runs = [run for run in runs if run["name"] != "scale"]
    least = min(run["tokens"] for run in runs)
    shown = [run for run in runs if run["tokens"] == least and run["width"] == width]
    hidden = ("top_k", "normalize_top_k")
    rows = (
        [
            run["family"].replace("_", " "),
            run["placement"].replace("_", " "),
            ", ".join(f"{key} {value}" for key, value in run["arm"].items() if key not in hidden) or "derived",
            f"{run['rate']:g}",
            str(run["seed"]),
            f"{_deployed(run):.3f}",
        ]
        for run in sorted(shown, key=lambda run: (run["family"], _deployed(run)))
        if run["name"] == "search" or run["seed"] == 0
    )
    return _table(["family", "layers", "scales", "rate", "seed", f"loss at {least / 1e6:.1f} M tokens"], rows)


def _law(evidence: Evidence) -> str:
    ends = evidence.ends(evidence.arms())
    law, forecasts = fit_law(ends), held_out_forecasts(ends)
    noise = noise_of(ends, law)
    size = "" if law.alpha is None else f", size exponent {law.alpha:.3f}"
    data = "One budget, so no data exponent" if law.beta is None else f"Data exponent {law.beta:.3f}"
    text = f"{data}{size}; runs scatter by {noise.of_run:.4f} nats between seeds and "
    text += f"{noise.of_end:.4f} within a run, lack of fit included.\n\n"
    rows = [
        [
            arm.replace("_", " "),
            f"{law.floors[arm]:.3f}",
            f"{law.data_terms.get(arm, 0):.1f}",
            f"{law.size_terms.get(arm, 0):.2f}",
        ]
        for arm in law.floors
    ]
    text += _table(["arm", "floor c", "data term b", "size term n"], rows)
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
    return text + _table(["arm", "parameters", "tokens", "predicted", "measured", "error"], rows)


def _start(run: dict[str, Any]) -> list[str]:
    scale = {
        key: "-" if run[key] is None else f"{run[key]:g}" for key in run if key.endswith(("_up", "_down", "router"))
    }
    losses = ", ".join(f"{mode.replace('_', ' ')} {loss:.3f}" for mode, loss in run["losses"].items())
    return [
        run["family"].replace("_", " "),
        run["placement"].replace("_", " "),
        str(run["width"]),
        f"{run['rate']:g}",
        str(run["seed"]),
        f"{scale['dense_up']}, {scale['dense_down']}",
        f"{scale['expert_up']}, {scale['expert_down']}",
        scale["router"],
        f"{run['tokens']:,}",
        losses,
    ]


def _of_pass(entry: dict[str, Any], what: str) -> dict[str, str]:
    return {
        row["contender"]: f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f}), {row['utilisation']:.2f}"
        for row in entry["rows"]
        if row["what"] == what
    }


def _size(entry: dict[str, Any]) -> str:
    size = entry["size"]
    return f"{size['experts']} experts, top {size['top_k']}" + (", skewed" if size["skew"] else "")


def _pair(trial: dict[str, Any]) -> tuple[float, float]:
    """The rate of a trial and its `feed_forward_scale`."""
    return trial["learning_rate"], trial.get("scale") or 1.0


def _trials(arm: dict[str, Any], tried: list[tuple[float, float]]) -> list[str]:
    losses = {_pair(trial): trial["loss"] for trial in arm["trials"]}
    best = arm["best"], arm.get("best_scale") or 1.0
    cells = []
    for pair in tried:
        loss = losses.get(pair)
        cell = ("diverged" if pair in losses else "") if loss is None else f"{loss:.4f}"
        cells.append(f"**{cell}**" if pair == best else cell)
    return cells


def _records(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    paths = sorted(RECORDS.glob(pattern), key=lambda path: (len(path.name), path.name))
    return [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _top(title: str, source: str, first: str) -> str:
    return f"# {title}\n\n{NOTE.format(source=source)}\n\n{first}\n\n"


def _machine(name: str, record: dict[str, Any]) -> str:
    made, about = record["created"][:10], record["environment"]
    return (
        f"{made}, {about['processor']}, {about['threads']} of {about['cpu_count']} cores, torch {about['torch']}, "
        f"transformers {about['transformers']}, {record['settings']['rounds']} rounds (`{name}`)."
    )


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Writes every page."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
