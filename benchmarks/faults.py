"""Kills training, alone and in shards, comparing, fine-tuning, tokenising and exporting, and lets each go on.

Run `python benchmarks/faults.py --kills 72`. Each job runs undisturbed first. Then it is started again and again in
another folder: a SIGKILL comes after a random share of its processor time, and at the latest the fifth start is left
alone. What it has made must then be the same bits. Counts go to benchmarks/results/faults.json. In shards, two
processes train together; either is killed, and then the other too, as torchrun does.

Children are forks of this process, which has imported everything: so a start costs no seconds. `--job NAME` runs one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mixtura
from mixtura.comparison.runner import compare
from mixtura.comparison.verbs import train
from mixtura.config import DataConfig, recipe_from_dict
from mixtura.data.prepare import prepare_data, train_tokenizer
from mixtura.exporting.stock_folder import export
from mixtura.files import write_json
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.report import html

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "faults.json"
MOST_KILLS = 4
"""Of one attempt, so that it ends."""
WORDS = ("the", "film", "plot", "actor", "music", "river", "house", "story", "good", "bad", "long", "cold", "old")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TRAINING = {"batch_size": 4, "eval_every": 2, "eval_sequences": 4, "final_eval_sequences": 4, "save_every": 1}
MIXTURE = {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4}
IN_SHARDS = {"shards": 0, "expert_ranks": 2}
CHOICE = {"family": "token_choice", "num_experts": 4}


class Job(NamedTuple):
    """What is killed, and what must be the same afterwards."""

    start: Callable[[Path], object]
    made: Callable[[Path], Any]
    """Numbers and digests of what it left in its folder."""
    processes: int = 1


def material(folder: Path) -> None:
    """Writes the text, the labelled texts and the model that the jobs work on."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 40))) + "." for _ in range(150)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    rows = [{"text": f"{' '.join(draw.choices(WORDS, k=4))} {n}", "label": ("no", "yes")[n % 2]} for n in range(80)]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "moe_intermediate_size": 8, "max_position_embeddings": 64, "hidden_act": "silu"}
    config = MixtureConfig(
        **SHAPE, **sizes, vocab_size=300, eos_token_id=2, pad_token_id=0, gated=True, mlp_layer_types=["dense"] * 2
    )
    MixtureForCausalLM(config).save_pretrained(folder / "model")
    train_tokenizer(texts, vocab_size=300).save_pretrained(folder / "model")


def jobs(folder: Path) -> dict[str, Job]:
    """All jobs, on the material in `folder`."""
    data = {"source": "local", "path": str(folder / "text.txt"), "vocab_size": 300, "sequence_length": 16}
    tiny = {"name": "tiny", "seeds": [0], "data": data | {"validation_fraction": 0.2}, "model": SHAPE}
    arms = {"dense": {"family": "dense"}, "mixture": MIXTURE}
    pretraining = recipe_from_dict(tiny | {"training": TRAINING | {"steps": 6}, "arms": arms})
    in_shards = recipe_from_dict(
        tiny | {"training": TRAINING | IN_SHARDS | {"steps": 6}, "arms": {"dense": arms["dense"], "choice": CHOICE}}
    )
    classification = recipe_from_dict(
        {
            "task": "classification",
            "name": "labels",
            "seeds": [0],
            "baseline": "head",
            "base": {"name": str(folder / "model")},
            "data": {
                "source": "local",
                "path": str(folder / "labelled.jsonl"),
                "max_length": 16,
                "validation_examples": 16,
                "test_examples": 16,
            },
            "training": TRAINING | {"steps": 4},
            "arms": {"head": {}, "whole": {"tune": "full"}},
        }
    )
    text = DataConfig(**data, validation_fraction=0.2)
    return {
        "train": Job(lambda out: train(pretraining, arm="mixture", out=out), _runs),
        "shards": Job(lambda out: train(in_shards, arm="choice", out=out), _runs, processes=2),
        "compare": Job(lambda out: compare(pretraining, out=out), _runs),
        "finetune": Job(lambda out: compare(classification, out=out), _runs),
        "tokenise": Job(lambda out: prepare_data(text, cache_dir=out), lambda out: _tokens(text, out)),
        "export": Job(lambda out: export(folder / "model", out / "exported", to="llama"), _files),
    }


def _runs(out: Path) -> Any:
    """Losses of all runs, and their models."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("arms/*/*/result.json")):
        run = json.loads(path.read_text())
        points = [(point["step"], point["measures"]) for point in run["curve"]]
        losses = [(point["step"], point["loss"]) for point in run["train_curve"]]
        model = _digest(path.parent / "checkpoint" / "model.safetensors")
        found[str(path.relative_to(out))] = [run["final"], points, losses, run["steps"], model]
    assert found, "nothing was trained"
    return found


def _tokens(text: DataConfig, out: Path) -> Any:
    """Digests of the cached tokens, which must be those that are read back."""
    notes: list[str] = []
    prepare_data(text, cache_dir=out, on_progress=notes.append)
    assert notes == ["loading cached tokens"], notes
    entries = [entry for entry in out.iterdir() if not entry.name.startswith(".")]
    return [_digest(path) for entry in entries for path in sorted(entry.glob("*.npy"))]


def _files(out: Path) -> Any:
    return {path.name: _digest(path) for path in sorted((out / "exported").glob("*.safetensors"))}


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def run_child(job: Job, out: Path, kill_after: float | None, victim: int = 0) -> tuple[bool, float]:
    """Starts the job in forks, one for each of its processes.

    Args:
        job: what to start.
        out: its folder.
        kill_after: processor seconds of a process, after which all are killed, that one first; None kills none.
        victim: which process.

    Returns:
        Whether they were killed, and the processor seconds that the process had.

    Raises:
        RuntimeError: it failed.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = [_fork(job, out, rank, port) for rank in range(job.processes)]
    ended: dict[int, tuple[int, float]] = {}
    killed = False
    while len(ended) < len(children):
        for child in {*children} - ended.keys():
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                ended[child] = status, used.ru_utime + used.ru_stime
        due = kill_after is not None and children[victim] not in ended and _seconds_of(children[victim]) >= kill_after
        broken = any(status for status, _ in ended.values())
        if due or broken:
            killed = killed or due
            for child in {*children} - ended.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status, _ in ended.values()) and not killed:
        raise RuntimeError("it failed after a kill")
    return killed, ended[children[victim]][1]


def _fork(job: Job, out: Path, rank: int, port: int) -> int:
    """The number of a new process that runs the job, alone or as one of several."""
    child = os.fork()
    if child == 0:
        if job.processes > 1:
            several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in several.items()}, MASTER_ADDR="localhost")
        try:
            job.start(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def _seconds_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disturb(name: str, job: Job, folder: Path, draw: random.Random, kills: int) -> dict[str, int]:
    """Attempts with random kills until there were so many.

    Returns:
        Counts of kills, of attempts, and of attempts whose numbers differ.
    """
    undisturbed = folder / f"{name}-undisturbed"
    undisturbed.mkdir()
    _, seconds = run_child(job, undisturbed, None)
    expected = job.made(undisturbed)
    counts = {"kills": 0, "attempts": 0, "different": 0}
    while counts["kills"] < kills:
        out = folder / f"{name}-{counts['attempts']}"
        out.mkdir()
        for start in range(MOST_KILLS + 1):
            alone = start == MOST_KILLS or counts["kills"] == kills
            moment = None if alone else draw.uniform(0, seconds)
            killed, _ = run_child(job, out, moment, draw.randrange(job.processes) if job.processes > 1 else 0)
            counts["kills"] += killed
            if not killed:
                break
            if name == "export":
                assert not (out / "exported").exists() or job.made(out) == expected, "a part of an export is there"
        counts["attempts"] += 1
        counts["different"] += job.made(out) != expected
        shutil.rmtree(out)
    return counts


def main(kills: int, seed: int, only: list[str], journal: Path | None) -> int:
    """Runs all jobs, prints their counts and stores them; returns how many attempts ended differently."""
    torch.set_num_threads(1)
    html.write_report = lambda results, out: out  # its pictures take longer than everything else
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        material(folder)
        found = {name: job for name, job in jobs(folder).items() if not only or name in only}
        record = {}
        for number, (name, job) in enumerate(found.items()):
            share = kills // len(found) + (number < kills % len(found))
            record[name] = disturb(name, job, folder, random.Random(f"{name} {seed}"), share)
            print(name, record[name], flush=True)
    if journal is not None:
        record = (json.loads(journal.read_text())["jobs"] if journal.exists() else {}) | record
        total = sum(counts["kills"] for counts in record.values())
        write_json(journal, {"version": mixtura.__version__, "total": total, "seed": seed, "jobs": record})
    return sum(counts["different"] for counts in record.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="append", default=[], help="one job; repeatable")
    parser.add_argument("--journal", type=Path, help=f"where counts go, such as {RECORD.relative_to(ROOT)}")
    given = parser.parse_args()
    sys.exit(1 if main(given.kills, given.seed, given.job, given.journal) else 0)
