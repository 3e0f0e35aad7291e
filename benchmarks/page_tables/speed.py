"""Pages on time: single layers, whole steps and runs, decoding, experts of other models, and GPUs."""

from typing import Any

from mixtura.benchmarks.decoding_bound import bound
from page_tables.layout import machine_of, page_top, stored_records, table_of

PASSES = {
    "training": "Forward and backward",
    "forward": "Forward alone",
    "step": "Forward, backward and fused AdamW",
}

PARTS = ("attention", "feed-forward", "head and loss", "rest", "clipping", "optimizer")
"""What the benchmark of whole steps tells apart, as its records name it."""


def layers() -> str:
    """Single layers against a dense layer and other libraries."""
    text = page_top(
        "How fast is one layer?",
        "`benchmarks/results/layers-*.json`",
        "A cell is the time relative to a dense layer of equal FLOPs (median of the rounds, then lowest and highest "
        "round) and the utilisation: the time of one large product of the same FLOPs over the layer's. "
        "[Performance](../performance.md) says how this is measured and what follows. *Plain* stands for the textbook "
        "formulation in torch operators.",
    )
    for name, record in stored_records("layers-*.json"):
        sizes = record["sizes"]
        shape = sizes[0]["size"]
        on = record["environment"]["processor"].removesuffix(" Processor").replace("(R)", "")
        text += f"## {shape['tokens']:,} tokens x {shape['hidden']:,}, {on}\n\n{machine_of(name, record)}\n\n"
        for what, title in PASSES.items():
            cells = [_of_pass(entry, what) for entry in sizes]
            if any(cells):
                names = dict.fromkeys(name for column in cells for name in column)
                rows = ([contender, *(column.get(contender, "-") for column in cells)] for contender in names)
                text += f"### {title}\n\n{table_of(['contender', *map(_size, sizes)], rows)}\n"
        left_out = sorted({f"{name}: {reason}" for entry in sizes for name, reason in entry["left_out"].items()})
        text += "Left out at one size or more:\n\n" + "".join(f"- {line}\n" for line in left_out) + "\n"
    return text.rstrip("\n") + "\n"


def _of_pass(entry: dict[str, Any], what: str) -> dict[str, str]:
    return {
        row["contender"]: f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f}), {row['utilisation']:.2f}"
        for row in entry["rows"]
        if row["what"] == what
    }


def _size(entry: dict[str, Any]) -> str:
    size = entry["size"]
    return f"{size['experts']} experts, top {size['top_k']}" + (", skewed" if size["skew"] else "")


def steps() -> str:
    """Whole training steps of models."""
    text = page_top(
        "How fast is a whole training step?",
        "`benchmarks/results/steps-*.json`",
        "Models whose layers are all mixtures, with attention, embeddings and a head; a step is forward, backward, "
        "clipping and fused AdamW, and the models alternate. The last six columns are milliseconds, medians of their "
        "own: of a module forward and backward, the loss with the head, norms and embedding with the rest. "
        "[Performance](../performance.md) says what follows.",
    )
    head = ["experts", "family", "time relative to dense (range)", "tokens/s", *PARTS]
    for name, record in stored_records("steps-*.json"):
        settings = record["settings"]
        text += f"## {settings['tokens']:,} tokens a step\n\n{machine_of(name, record)} "
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
        text += table_of(head, rows) + "\n"
    return text.rstrip("\n") + "\n"


def runs() -> str:
    """Whole runs against a loop written by hand."""
    text = page_top(
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
    for name, record in sorted(stored_records("runs-*.json"), key=lambda item: item[1]["settings"]["threads"]):
        imports = sorted(record["trainer_imports"])
        settings = record["settings"]
        text += f"## {settings['threads']} thread{'s' if settings['threads'] > 1 else ''}\n\n"
        text += f"{machine_of(name, record)} {settings['steps']} steps a run. "
        if settings.get("beside"):
            busy = " to ".join(f"{load:.1f}" for load in sorted(settings["load_average"]))
            text += f"Beside them ran {settings['beside']}: {busy} programs wanted a core. "
        text += "Importing torch and "
        text += f"transformers' Trainer alone takes {imports[0]:.1f} to {imports[-1]:.1f} s.\n\n"
        text += table_of(head, map(_run_speeds, record["rows"])) + "\nSeconds of the parts around the steps:\n\n"
        parts = list(record["rows"][0]["parts"])
        seconds = (
            [row["size"], row["arm"].replace("_", " "), *(f"{row['parts'][part]:.2f}" for part in parts)]
            for row in record["rows"]
        )
        text += table_of(["size", "arm", *parts], seconds) + "\n"
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
    text = page_top(
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
    for name, record in sorted(stored_records("decode-*.json"), key=lambda item: item[1]["settings"]["hidden"]):
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
        text += f"{machine_of(name, record)}\n\n{table_of(head, rows)}\n"
    for name, record in stored_records("served-*.json"):
        text += _served(name, record)
    return text.rstrip("\n") + "\n"


def _served(name: str, record: dict[str, Any]) -> str:
    """Exports of models in other engines."""
    settings, rows = record["settings"], record["rows"]
    own = {(row["form"], row["batch"]): row["tokens_per_second"] for row in rows if row["engine"] == "Mixtura"}
    text = f"## Exports, {settings['hidden']} hidden, {settings['layers']} layers, {settings['experts']} experts\n\n"
    text += f"{machine_of(name, record)} Gated SiLU models, `generate` of {settings['tokens']} tokens on one thread"
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
    return text + table_of(["batch", "form", "engine", "tokens/s", "Mixtura 1", "dense in it 1"], cells) + "\n"


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
    text = page_top(
        "How fast are transformers' mixtures on Mixtura's kernels?",
        "`benchmarks/results/experts-*.json`",
        "How many times as fast as transformers' eager experts: medians of alternating rounds. "
        "[Other tools](../tools.md) says how a model chooses its kernels.",
    )
    for name, record in stored_records("experts-*.json"):
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
        text += f"{machine_of(name, record)}\n\n{table_of(['experts', 'tokens', 'pass', *names], rows)}\n"
    return text.rstrip("\n") + "\n"


def gpu() -> str:
    """The prepared run on GPUs."""
    text = page_top(
        "What was measured on GPUs?",
        "`benchmarks/results/gpu-*.json`",
        "Times are relative to the dense layer or model of equal FLOPs in the same round; utilisation is the share of "
        "the speed of one large product. [On a GPU](../gpu.md) says what the run does.",
    )
    for name, record in stored_records("gpu-*.json"):
        about = record["environment"]
        text += f"## {about['device']}\n\n{record['created'][:10]}, torch {about['torch']}, transformers "
        text += f"{about['transformers']}, Triton {record['settings']['triton']} (`{name}`).\n\n"
        text += "".join(f"{title}:\n\n{table_of(head, rows)}\n" for title, head, rows in _gpu_tables(record) if rows)
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
