"""Gives every reader of users' files spoilt input, and counts what comes back: a value, one sentence, or a crash.

Run `python benchmarks/fuzz.py --seconds 900`: it goes on from the input where the run before it ended, and stores the
counts in benchmarks/results/fuzz.json. Input n of a surface is the same on every machine, so that `--only SURFACE --at
n` repeats a crash. tests/test_fuzz.py runs some inputs of every surface.
"""

import argparse
import bz2
import copy
import gzip
import json
import lzma
import os
import random
import re
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import torch
from safetensors.torch import save
from transformers.utils import logging

from mixtura.checkpoints.source import open_source
from mixtura.checkpoints.tensors import INDEX, WHOLE, StoredWeights
from mixtura.config import DataConfig, UserError, load_recipe, recipe_from_dict
from mixtura.config.schema import ChatDataConfig, ClassificationDataConfig
from mixtura.data.chats import load_chats
from mixtura.data.formats.exchange_files import memory_units
from mixtura.data.formats.table_files import file_rows, select
from mixtura.data.labelled import load_labelled
from mixtura.data.sources import load_corpus
from mixtura.files import check_inside, write_json
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.loading import adapter_advice, folder_settings, load_config
from mixtura.report.html import render_html
from mixtura.report.markdown import render_markdown
from mixtura.report.summary import summarize
from mixtura.results.document import read_results, read_run

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "fuzz.json"
SLOW = 5.0
"""Processor seconds that no input may take."""
PIECES = [
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\r", b"\r\n", b"\n\n", b"\t", b'"', b"'", b'"""', b"\\"),
    *(b",", b";", b"|", b"=", b"#", b"{", b"}", b"[", b"]", b"[[", b":", b"null", b"NaN", b"-Infinity", b"1e999"),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"true", b"1979-05-27T07:32:00Z", b"0x", b"\xed\xa0\x80", b"PAR1"),
    *("\u2028".encode(), "\U0001f600".encode(), b"\\ud800", b"\\u", b"../../x", b"/dev/null", b"nan", b"inf", b"1_0"),
]
ODD: list[Any] = [
    *(True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), "", " ", "none", "\0", "a\nb", "\u202e", "\U0001f600", "\u00e9", "x" * 300, "../x"),
    *("/", ".", "<script>", "{{7*7}}", "%s", "dense", "1", "-1", "nan", "text", "train", "http://x", "~", "a.b.c"),
    *([], {}, [[]], [{}], {"": {}}, [1, "a", None], None, "mixture_of_tokens", "token_choice"),
]


def _odd(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def spoil_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes cut off, flipped, doubled, left out or put in, once to three times."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, len(content))
        end = min(len(content), start + draw.choice((1, 2, 8, 40, 400)))
        before, part, after = content[:start], content[start:end], content[end:]
        flipped = bytes(byte ^ 1 << draw.randint(0, 7) for byte in part)
        piece = draw.choice(PIECES)
        content = draw.choice(
            (
                before,
                part + after,
                before + after,
                before + part + part + after,
                before + piece + after,
                before + piece + part + after,
                before + flipped + after,
                before + draw.randbytes(len(part)) + after,
            )
        )
    return content


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _nodes(inner)


def spoil_tree(draw: random.Random, value: Any) -> Any:
    """The value with one to three of its nodes replaced, removed, renamed, swapped or put deeper; in place."""
    for _ in range(draw.randint(1, 3)):
        nodes = list(_nodes(value))
        if not nodes:
            return _odd(draw)
        holder, key = draw.choice(nodes)
        other, its = draw.choice(nodes)
        change = draw.randint(0, 7)
        if change <= 2:
            holder[key] = _odd(draw)
        elif change == 3:
            del holder[key]
        elif change == 4 and isinstance(holder, dict):
            holder[str(draw.choice(ODD))] = holder.pop(key)
        elif change == 5:
            holder[key] = copy.deepcopy(other[its])
        elif change == 6:
            holder[key] = (
                {"a": holder[key]}
                if draw.random() < 0.5
                else [copy.deepcopy(holder[key]) for _ in range(draw.randint(1, 3))]
            )
        elif isinstance(holder, dict):
            holder[draw.choice(("name", "kind", "task", "path", "é", "a.b", "schema_version"))] = copy.deepcopy(
                draw.choice(ODD)
            )
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value if each is not None] if isinstance(value, list) else value


class Surface(NamedTuple):
    """A reader, and what a good input for it looks like."""

    read: Callable[[Path], object]
    """Is given the file; whatever it raises but UserError is a crash."""
    file: str
    """Its name, to which the folder's other files belong."""
    seeds: list[bytes]
    tree: Callable[[bytes], Any] | None = None
    """Parses a seed, so that single values of it can be changed; None where only its bytes are."""
    write: Callable[[Any], bytes] = lambda value: json.dumps(value).encode()
    share: float = 1.0
    """Of the inputs of a run, relative to the others."""
    lines: bool = False
    """Whether its error may have several lines, a sentence each, as a recipe's."""


def make_input(surface: Surface, draw: random.Random) -> bytes:
    """A spoilt input: a value of a good one is changed, or its bytes are, or both."""
    content = draw.choice(surface.seeds)
    if surface.tree is not None and draw.random() < 0.75:
        content = surface.write(spoil_tree(draw, surface.tree(content)))
        if draw.random() < 0.75:
            return content
    return spoil_bytes(draw, content)


def attempt(surface: Surface, folder: Path, content: bytes) -> str:
    """What comes back: "value" or "sentence".

    Raises:
        Exception: what the reader raised besides; AssertionError where its sentence is none.
        TooSlow: it took too long, and `_too_slow` handles the alarm.
    """
    path = folder / surface.file
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        surface.read(path)
    except UserError as error:
        message = str(error)
        assert message.strip() and (surface.lines or len(message.splitlines()) == 1), f"no sentence: {message!r}"
        return "sentence"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "value"


class TooSlow(BaseException):
    """An input took longer than `SLOW`; no reader catches this."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"longer than {SLOW:.0f} s")


# The surfaces: what is read, and by which function.

_RECIPE = """
name = "fine"
description = "A recipe."
seeds = [0, 1]
baseline = "dense"
[data]
source = "local"
path = "text.txt"
sequence_length = 16
validation_fraction = 0.2
[model]
hidden_size = 32
num_attention_heads = 2
[training]
steps = 4
batch_size = 4
learning_rate = 1e-3
[search]
learning_rates = [1e-3, 3e-3]
[arms.dense]
family = "dense"
[arms.mixture]
family = "mixture_of_tokens"
num_experts = 4
group_size = 4
[arms.control]
control = "uniform_router"
control_of = "mixture"
"""
_STARTS = """
name = "on"
seeds = [0]
baseline = "a"
[data]
source = "local"
path = "text.txt"
[arms.a]
init_from = "somewhere/checkpoint"
learning_rate = 1e-3
[arms.b]
init_from = "smollm2"
learning_rate = 1e-3
"""
_TASKS = ("translation-quick", "classification-quick", "chat-quick")
_WORDS = [
    "good film",
    "a bad, bad plot",
    'the "best" cut',
    "quiet; slow|dull",
    "two\tparts",
    "ünïcode \U0001f600",
    " ",
    "no",
]
_ROWS = [{"text": f"{word} {number}", "label": number % 2} for number, word in enumerate(_WORDS * 4)]
_CHATS = [
    {"messages": [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": word + "!"}]}
    for n, word in enumerate(_WORDS[:5] * 3)
]
_SIZES = {
    **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 16, "gated": True, "hidden_act": "silu"},
}


def _json(content: bytes) -> Any:
    return json.loads(content)


def _lines(content: bytes) -> Any:
    return [json.loads(line) for line in content.splitlines()]


def _write_lines(rows: Any) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in (rows if isinstance(rows, list) else [rows]))


def _toml(value: Any) -> bytes:
    value = _without_none(value)
    return tomli_w.dumps(value if isinstance(value, dict) else {"a": value}).encode()


_DOCUMENT = b"""<?xml version="1.0" encoding="UTF-8"?>
<xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2"><file source-language="en" target-language="pt">
<body><trans-unit id="1"><source>Open <g id="1">it</g>.</source><target state="final">Abra <g id="1">o</g>.</target>
</trans-unit><trans-unit id="2"><source>Go.</source><target state="new">Go.</target></trans-unit></body></file></xliff>
"""
_MEMORY = b"""<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-US"><seg>Open <bpt i="1">&lt;b></bpt>it<ept i="1"/> &amp; go.</seg></tuv>
<tuv xml:lang="pt"><seg>Abra-o e <hi>siga</hi>.</seg></tuv></tu>
</body></tmx>
"""


def _cells(mark: str) -> bytes:
    rows = [f'"{row["text"].replace(chr(34), chr(34) * 2)}"{mark}{row["label"]}' for row in _ROWS]
    return "\n".join([f"text{mark}label", *(row for row in rows if row.count(mark) == 1 or mark != "\t")]).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _table(path: Path) -> None:
    columns = {"data.text_column": "text", "data.label_column": "label"}
    for _ in select(file_rows(path, ["text", "label"]), columns, Counter(), source="the file"):
        pass


def _configuration(path: Path) -> None:
    folder_settings(path.parent)
    load_config(MixtureConfig, path.parent)


def _start(path: Path) -> None:
    recipe_from_dict({"name": "a", "seeds": [0], "baseline": "a", "arms": {"a": {"init_from": str(path.parent)}}})


def _weights(path: Path) -> None:
    check_inside(path.parent)
    weights = StoredWeights(path.parent)
    for name in weights.tensors:
        weights.read(name)


def _report(path: Path) -> None:
    results = read_results(path)
    if results is None:
        return
    try:  # as `report_folder` does, without its pictures and its plots, which take seconds
        summary = summarize(results)
        render_markdown(results, summary)
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"its parts do not fit together: {type(error).__name__}") from error


def _page(path: Path) -> None:
    results = read_results(path)
    if results is None:
        return
    try:
        render_html(results, summarize(results))
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"its parts do not fit together: {type(error).__name__}") from error


def surfaces(folder: Path) -> dict[str, Surface]:
    """All surfaces; `folder` gets one folder for each, with the files that belong to the one that is spoilt."""
    model = MixtureForCausalLM(MixtureConfig(**_SIZES, mlp_layer_types=["dense"]))
    model.save_pretrained(folder / "config")
    config = (folder / "config" / "config.json").read_bytes()
    tensors = {"a": torch.zeros(2, 2), "b": torch.ones(3)}
    index = json.dumps({"metadata": {"total_size": 28}, "weight_map": {"a": WHOLE, "b": WHOLE}}).encode()
    mixture = json.dumps(json.loads(config) | {"mlp_layer_types": ["mixture_of_tokens"], "alone_top_k": 1}).encode()
    stored = ROOT / "tests" / "results" / "stored"
    results = [(stored / f"{name}.json").read_bytes() for name in ("pretraining", "translation", "classification")]
    adapter = json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}).encode()
    jsonl, rows = _write_lines(_ROWS), json.dumps(_ROWS).encode()
    recipes = [_RECIPE.encode(), _RECIPE.encode(), _STARTS.encode()]
    recipes += [(ROOT / "recipes" / f"{name}.toml").read_bytes() for name in _TASKS]
    held_out = {"validation_examples": 2, "test_examples": 2}
    found = {
        "recipe": Surface(load_recipe, "a.toml", recipes, _read_toml, _toml, lines=True, share=2),
        "index": Surface(_weights, INDEX, [index], _json),
        "safetensors": Surface(_weights, WHOLE, [save(tensors)], share=2),
        "config": Surface(_configuration, "config.json", [config, mixture], _json),
        "source": Surface(lambda path: open_source(str(path.parent)), "config.json", [config], _json, share=0.03),
        "start": Surface(_start, "config.json", [config, mixture], _json, lines=True),
        "adapter": Surface(lambda path: adapter_advice(path.parent), "adapter_config.json", [adapter], _json),
        "results": Surface(_report, "results.json", results, _json, share=0.1),
        "page": Surface(_page, "results.json", results, _json, share=0.002),
        "run": Surface(read_run, "result.json", [(stored / "run.json").read_bytes()], _json),
        "jsonl": Surface(_table, "a.jsonl", [jsonl], _lines, _write_lines, share=4),
        "json": Surface(_table, "a.json", [rows, b'{"data": ' + rows + b"}"], _json, share=2),
        "csv": Surface(_table, "a.csv", [_cells(","), _cells(";")], share=4),
        "tsv": Surface(_table, "a.tsv", [_cells("\t")], share=4),
        "parquet": Surface(_table, "a.parquet", [_parquet(_ROWS)], share=1),
        "text": Surface(
            lambda path: load_corpus(DataConfig(source="local", path=str(path), validation_fraction=0.3)),
            "a.txt",
            ["\n\n".join(_WORDS * 3).encode()],
        ),
        "labelled": Surface(
            lambda path: load_labelled(ClassificationDataConfig(source="local", path=str(path), **held_out)),
            "a.jsonl",
            [jsonl],
            _lines,
            _write_lines,
        ),
        "chats": Surface(
            lambda path: load_chats(ChatDataConfig(source="local", path=str(path), validation_chats=2, test_chats=2)),
            "a.jsonl",
            [_write_lines(_CHATS)],
            _lines,
            _write_lines,
        ),
        "label lines": Surface(
            lambda path: load_labelled(ClassificationDataConfig(source="local", path=str(path), **held_out)),
            "a.txt",
            ["\n".join(f"__label__{number % 2} {words}" for number, words in enumerate(_WORDS * 3)).encode()],
            share=0.5,
        ),
        "gzip": Surface(_table, "a.jsonl.gz", [gzip.compress(jsonl, mtime=0)]),
        "bzip2": Surface(_table, "a.jsonl.bz2", [bz2.compress(jsonl)], share=0.5),
        "xz": Surface(_table, "a.jsonl.xz", [lzma.compress(jsonl)]),
        "document": Surface(lambda path: list(memory_units(path, ("en", "pt"))), "a.xlf", [_DOCUMENT], share=0.5),
        "memory": Surface(lambda path: list(memory_units(path, ("en", "pt"))), "a.tmx", [_MEMORY]),
    }
    for name, surface in found.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        (place / surface.file).write_bytes(surface.seeds[0])
        if name == "index":
            (place / WHOLE).write_bytes(save(tensors))
        if name == "source":
            model.save_pretrained(place)
    return found


def _read_toml(content: bytes) -> Any:
    return tomllib.loads(content.decode())


def input_of(name: str, surface: Surface, number: int) -> bytes:
    """Input number `number` of a surface, on every machine the same."""
    return make_input(surface, random.Random(f"{name} {number}"))


def run(seconds: float, journal: Path, only: str | None, at: int | None) -> int:
    """Runs inputs for so many seconds and stores the counts; returns how many crashed."""
    logging.set_verbosity(logging.CRITICAL)
    signal.signal(signal.SIGPROF, _too_slow)
    record = json.loads(journal.read_text()) if journal.exists() else {"inputs": {}, "crashes": {}, "seconds": 0.0}
    crashes, start = 0, time.process_time()
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as temporary:
        folder = Path(temporary)
        found = surfaces(folder)
        if only is not None and at is not None:
            print(attempt(found[only], folder / only, input_of(only, found[only], at)))
            return 0
        while time.process_time() - start < seconds:
            for name in [only] if only else found:
                counts = record["inputs"].setdefault(name, {"value": 0, "sentence": 0, "crash": 0})
                for number in range(
                    sum(counts.values()), sum(counts.values()) + max(1, round(500 * found[name].share))
                ):
                    try:
                        counts[attempt(found[name], folder / name, input_of(name, found[name], number))] += 1
                    except (Exception, TooSlow):  # which is what is looked for
                        counts["crash"] += 1
                        crashes += 1
                        lines = traceback.format_exc().strip().splitlines()
                        kind = f"{name}: {re.sub('[0-9]+', '0', lines[-1])[:120]} | {lines[-3].strip()[:120]}"
                        record["crashes"].setdefault(kind, number)
            write(journal, record | {"seconds": record["seconds"] + time.process_time() - start})
    return crashes


def write(journal: Path, record: dict[str, Any]) -> None:
    """Stores the counts, and their sum."""
    record["total"] = sum(sum(counts.values()) for counts in record["inputs"].values())
    write_json(journal, record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=900.0, help="processor time of this run")
    parser.add_argument("--journal", type=Path, default=RECORD)
    parser.add_argument("--only", help="one surface")
    parser.add_argument("--at", type=int, help="with --only: this input alone")
    given = parser.parse_args()
    sys.exit(1 if run(given.seconds, given.journal, given.only, given.at) else 0)
