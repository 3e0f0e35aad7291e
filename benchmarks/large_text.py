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
import signal
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


def _processor_seconds(process: int) -> float:
    """Of a process, its children, and what these have waited for."""
    try:
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0.0
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK") + sum(_processor_seconds(int(child)) for child in children)


def measure(side: str, text: Path, tokenizer: Path, processes: int, most_seconds: float) -> dict[str, Any]:
    """Runs one side in a new process; seconds on the wall and of the processors, and peak memory.

    After `most_seconds` it is stopped, and the row says how much of the text had been encoded.
    """
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        command = [sys.executable, __file__, "--side", side, str(text), str(tokenizer), folder, str(processes)]
        before, began, peak, used = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0, 0.0
        log = Path(folder, "log")
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, start_new_session=True)
        while job.poll() is None:
            peak, used = max(peak, _own_memory(job.pid)), max(used, _processor_seconds(job.pid))
            if time.perf_counter() - began > most_seconds:
                os.killpg(job.pid, signal.SIGKILL)
                return _stopped(side, log.read_text(), processes, used, time.perf_counter() - began, peak)
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


def _stopped(side: str, log: str, processes: int, used: float, seconds: float, peak: int) -> dict[str, Any]:
    """The row of a side that was stopped, by the last line of its log that says how far it was."""
    done = [line.split()[1] for line in log.splitlines() if line.startswith("encoding: ")]
    return {
        "side": side,
        "stopped_at_megabytes": int(done[-1].replace(",", "")) if done else 0,
        "processes": processes,
        "processor_seconds_with_imports": round(used, 1),
        "wall_seconds_with_imports": round(seconds, 1),
        "peak_megabytes": round(peak / 1e6),
    }


def main() -> None:
    """Measures every size on both sides, or runs one side for that."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which a side is stopped")
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
                rows.append(measure(side, text, tokenizer, options.processes, 60 * options.minutes))
                print(json.dumps(rows[-1]), flush=True)
            text.unlink()
    RECORD.write_text(
        json.dumps({"text": "movie reviews, numbered", "vocab_size": VOCAB_SIZE, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
