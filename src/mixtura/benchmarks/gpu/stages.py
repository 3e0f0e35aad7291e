"""The order of the prepared run: each stage in processes of its own that cannot outlast it, and one record of all.

This process imports no torch and touches no device, so nothing that happens there can stop it. A stage's process writes
its journal; where the process hangs or dies, the item that it was in is named and a new process goes on after it.
"""

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mixtura.files import write_json
from mixtura.results.document import Plain

BROKEN_CONTEXT = 70
"""Exit code of a process whose CUDA context can run nothing more."""
MOST_PROCESSES = 8
"""Of one stage."""
STARTING = 30.0
"""Seconds that a process may take beside its stage's, to import torch and transformers."""
COMPILED, MOST_COMPILED_BYTES = "compiled", 16_000_000
"""What Triton compiled, as a folder and as an archive that can be sent back and forth."""


@dataclass(frozen=True)
class Stage:
    """A part of the run."""

    name: str
    seconds: float


STAGES = (Stage("kernels", 60), Stage("layers", 150), Stage("steps", 90), Stage("evidence", 240))


@dataclass(frozen=True)
class Request:
    """What the run is asked for."""

    command: Sequence[str]
    """Starts a stage's process; `--stage NAME --seconds S` come after it."""
    out: Path
    pack: Path
    budget: float
    """Seconds of the whole run."""
    times: float = 1.0
    """Multiplies the seconds of every stage."""


def run_all(request: Request, stages: Sequence[Stage] = STAGES) -> Path:
    """Runs the stages and returns the path of the record, which is written anew after each of them."""
    journals = request.out / "stages"
    journals.mkdir(parents=True, exist_ok=True)
    _unpack_compiled(request.pack)
    end, path = time.monotonic() + request.budget, request.out / "gpu-none.json"
    with (request.out / "gpu.log").open("w", encoding="utf-8") as log:
        for stage in stages:
            seconds = min(stage.seconds * request.times, end - time.monotonic())
            left = _run_stage(request, stage, seconds, log)
            path = _write_record(request, stages)
            print(f"{stage.name}: {left} {'seconds left' if left else 'seconds were used up'}; {path}", flush=True)
    _pack_compiled(request)
    return path


def _run_stage(request: Request, stage: Stage, seconds: float, log: IO[str]) -> int:
    """Processes of one stage until it is finished or its time is used up; the whole seconds that are left."""
    journal = journal_path(request.out, stage.name)
    journal.unlink(missing_ok=True)
    end, why = time.monotonic() + seconds, "the time was used up before it began"
    for _ in range(MOST_PROCESSES):
        left = end - time.monotonic()
        if left <= 0:
            break
        code = _run_process(request, stage, left, log)
        why = "the time was used up" if code is None else f"the process ended with {code}"
        if not settle(journal, why, broken=code == BROKEN_CONTEXT):
            break
    if not journal.is_file():
        write_json(journal, {"items": {}, "seconds": {}, "left_out": {stage.name: why}, "finished": False})
    return max(0, int(end - time.monotonic()))


def _run_process(request: Request, stage: Stage, seconds: float, log: IO[str]) -> int | None:
    """One process of a stage; its exit code, or None where it was stopped with its time."""
    compiled = request.pack / COMPILED
    environment = os.environ | {"TRITON_CACHE_DIR": str(compiled.absolute()), "PYTHONUNBUFFERED": "1"}
    command = [*request.command, "--stage", stage.name, "--seconds", f"{seconds:.1f}"]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds + STARTING * request.times)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # compilers that it started end with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def journal_path(out: Path, stage: str) -> Path:
    """Where a stage leaves its file."""
    return out / "stages" / f"{stage}.json"


def read_journal(path: Path) -> Plain:
    """A stage's file."""
    return json.loads(path.read_text(encoding="utf-8"))


def settle(path: Path, why: str, *, broken: bool = False) -> bool:
    """After a process of a stage has ended: names the item that it ended in; whether another one should go on.

    Args:
        path: the stage's file.
        why: the process ended, such as "the process ended with -11".
        broken: whether it ended since its device could run nothing more; the item is named then.
    """
    if not path.is_file():
        return False
    record = read_journal(path)
    if record["finished"]:
        return False
    running = record["running"]
    if running is not None:
        record["left_out"][running], record["running"] = why, None
    elif not broken:
        record["left_out"][f"{path.stem}, what came after"] = why
    write_json(path, record)
    return running is not None or broken


def _write_record(request: Request, stages: Sequence[Stage]) -> Path:
    """All stages so far in one file, as the page reads it."""
    found = {stage.name: journal_path(request.out, stage.name) for stage in stages}
    journals = {name: read_journal(path) for name, path in found.items() if path.is_file()}
    first = next((journal for journal in journals.values() if "environment" in journal), {})
    items: Plain = {}
    for journal in journals.values():
        items |= journal["items"]
    record: Plain = {key: first.get(key) for key in ("created", "environment", "settings")}
    record["checks"] = items.get("checks", {})
    record["ceilings"] = items.get("ceilings", {}).get("ceilings")
    for section in ("layers", "models", "trainer"):
        record[section] = list(items.get(section, {}).values())
    plan = items.get("evidence_plan", {}).get("steps of a round")
    record["evidence"] = {"plan": plan, "rounds": list(items.get("evidence", {}).values())}
    record["left_out"] = {what: why for journal in journals.values() for what, why in journal["left_out"].items()}
    record["seconds"] = {name: journal["seconds"] for name, journal in journals.items()}
    device = (record["environment"] or {}).get("device", "none")
    path = request.out / f"gpu-{device.replace(' ', '-').lower()}.json"
    write_json(path, record)
    return path


def _unpack_compiled(pack: Path) -> None:
    """Kernels that an earlier run compiled on such a machine are not compiled again."""
    archive = pack / f"{COMPILED}.tar.gz"
    if archive.is_file() and not (pack / COMPILED).exists():
        with tarfile.open(archive) as opened:
            opened.extractall(pack, filter="data")


def _pack_compiled(request: Request) -> None:
    """Leaves what was compiled beside the record, for the next run."""
    folder, archive = request.pack / COMPILED, request.out / f"{COMPILED}.tar.gz"
    if folder.is_dir() and any(folder.iterdir()):
        with tarfile.open(archive, "w:gz") as opened:
            opened.add(folder, COMPILED)
        if archive.stat().st_size > MOST_COMPILED_BYTES:
            archive.unlink()
