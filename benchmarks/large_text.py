"""Tokenising a large text into shards: MB/s beside `datasets`' own multiprocess map, and peak memory by size.

Run `python benchmarks/large_text.py --megabytes 50 200 --processes 2`. The text is movie reviews, repeated with a
number in each so that none is a duplicate, as JSONL. Both sides start with the file and a tokenizer, fitted before, and
end with tokens on the disk: ours with what training maps, duplicates found and documents held out; `datasets` reads
the file with `load_dataset` and maps the tokenizer over it in `--processes` processes. Peak memory is the largest sum
over all processes of the job of what is theirs alone, sampled while it runs. Figures go to
benchmarks/results/large_text.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "large_text.json"
SAMPLE_SECONDS = 0.25
VOCAB_SIZE = 8192


def write_text(path: Path, megabytes: int) -> None:
    """Reviews, numbered, one JSON object a line, until the file has that size."""
    from mixtura.data.labelled import read_movie_reviews

    texts, size, number = list(read_movie_reviews()["text"]), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            size += file.write(json.dumps({"text": f"{number} {texts[number % len(texts)]}"}) + "\n")
            number += 1


def ours(text: Path, tokenizer: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Shards, as a recipe with `shards = true` makes them."""
    from mixtura.config import DataConfig
    from mixtura.data import prepare

    prepare.usable_cores = lambda: processes
    data = DataConfig(source="local", path=str(text), tokenizer=str(tokenizer), max_bytes=10**12, shards=True)
    summary = prepare.prepare_data(
        data, cache_dir=folder, on_progress=lambda line: print(line, file=sys.stderr)
    ).summary
    return {
        "tokens": summary["tokens_train"] + summary["tokens_validation"],
        "bytes": summary["bytes_train"] + summary["bytes_validation"],
    }


def theirs(text: Path, tokenizer: Path, folder: Path, processes: int) -> dict[str, Any]:
    """`datasets`' map over the file in as many processes."""
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = encode(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*row, encode.eos_token_id] for row in ids]}

    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder))
    rows.map(tokens, batched=True, num_proc=processes, remove_columns=["text"])
    return {"tokens": 0, "bytes": 0}


def _own_memory(process: int) -> int:
    """Bytes that are this process's alone, and its children's; pages of mapped files are the system's to take back."""
    total = 0
    try:
        status = Path(f"/proc/{process}/status").read_text()
        total = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return total
    return total + sum(_own_memory(int(child)) for child in children)


def measure(side: str, text: Path, tokenizer: Path, processes: int) -> dict[str, Any]:
    """Runs one side in a new process; seconds on the wall and of the processors, and peak memory."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        command = [sys.executable, __file__, "--side", side, str(text), str(tokenizer), folder, str(processes)]
        before, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while job.poll() is None:
            peak = max(peak, _own_memory(job.pid))
            time.sleep(SAMPLE_SECONDS)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.perf_counter() - began
        assert job.returncode == 0 and job.stdout is not None
        told = json.loads(job.stdout.read().splitlines()[-1])
    megabytes = text.stat().st_size / 1e6
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "side": side,
        "megabytes": round(megabytes),
        "processes": processes,
        "seconds": round(told["seconds"], 1),
        "megabytes_a_second": round(megabytes / told["seconds"], 2),
        "processor_seconds_with_imports": round(used, 1),
        "wall_seconds_with_imports": round(seconds, 1),
        "peak_megabytes": round(peak / 1e6),
        "tokens": told["tokens"],
    }


def main() -> None:
    """Measures every size on both sides, or runs one side for that."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--theirs", type=int, nargs="*", help="sizes at which datasets is measured; all when left out")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, text, tokenizer, folder, processes = options.side
        began = time.perf_counter()
        told = {"ours": ours, "theirs": theirs}[side](Path(text), Path(tokenizer), Path(folder), int(processes))
        print(json.dumps(told | {"seconds": time.perf_counter() - began}))
        return
    from mixtura.data.labelled import read_movie_reviews
    from mixtura.data.prepare import train_tokenizer

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer")
        train_tokenizer(read_movie_reviews()["text"][:4000], vocab_size=VOCAB_SIZE).save_pretrained(tokenizer)
        for megabytes in options.megabytes:
            text = Path(folder, f"{megabytes}.jsonl")
            write_text(text, megabytes)
            for side in ("ours", "theirs"):
                if side == "theirs" and options.theirs is not None and megabytes not in options.theirs:
                    continue
                rows.append(measure(side, text, tokenizer, options.processes))
                print(json.dumps(rows[-1]), flush=True)
            text.unlink()
    RECORD.write_text(
        json.dumps({"text": "movie reviews, numbered", "vocab_size": VOCAB_SIZE, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
