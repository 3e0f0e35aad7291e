"""Engines that a receipt tries: each is a function from a model folder and token ids to log-probabilities.

transformers runs here. vLLM and llama.cpp run as scripts under an interpreter of the user's choice, which may belong to
another environment and needs nothing of ours; what they compute comes back in a safetensors file.

Shapes: P probes, L tokens of a probe, V vocabulary.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.exporting.containers import remote_code
from mixtura.models import standalone
from mixtura.models.loading import folder_settings, open_weights

NOT_INSTALLED = 3
"""Exit status of a script whose engine cannot be imported."""


class EngineMissing(Exception):
    """The engine is not installed where it was looked for."""


class EngineFailed(Exception):
    """The engine is there and cannot run this model."""


class Ran(NamedTuple):
    """What an engine computed."""

    log_probs: list[Tensor]
    """(L, V) for each probe: of the token that follows each position."""
    version: str


class Engine(NamedTuple):
    """An engine by name, and the interpreter that has it; None is this one."""

    name: str
    python: str | None = None
    converter: str | None = None
    """For llama.cpp: the folder of its source that has convert_hf_to_gguf.py."""


def parse_engine(text: str, converter: Path | None = None) -> Engine:
    """NAME or NAME=PYTHON, as on the command line.

    Raises:
        UserError: there is no such engine, or no such interpreter.
    """
    name, _, python = text.partition("=")
    if name not in ENGINES:
        raise UserError(f"There is no engine '{name}': choose one of {', '.join(ENGINES)}.")
    if python and not Path(python).is_file():
        raise UserError(f"'{python}' is no Python interpreter: give the path of one that has {name}.")
    return Engine(name, python or None, None if converter is None else str(converter))


def run_engine(engine: Engine, folder: Path, probes: Sequence[list[int]]) -> Ran:
    """Log-probabilities of all tokens after each position of the probes.

    Raises:
        EngineMissing: it is not installed.
        EngineFailed: it cannot load or run the model.
    """
    return ENGINES[engine.name](engine, folder, probes)


def model_log_probs(model: Any, probes: Sequence[list[int]], *, batched: bool = False) -> list[Tensor]:
    """(L, V) for each probe, from a causal language model; one at a time, or all in one padded batch."""
    with torch.inference_mode():
        if not batched:
            return [model(torch.tensor([probe])).logits[0].double().log_softmax(-1) for probe in probes]
        length = max(map(len, probes))
        ids_PL = torch.tensor([probe + [0] * (length - len(probe)) for probe in probes])
        mask_PL = torch.tensor([[1] * len(probe) + [0] * (length - len(probe)) for probe in probes])
        logits_PLV = model(ids_PL, attention_mask=mask_PL).logits.double().log_softmax(-1)
    return [log_probs[: len(probe)] for log_probs, probe in zip(logits_PLV, probes, strict=True)]


def load_causal(folder: Path) -> Any:
    """The model in a folder, in float32 and for inference.

    Code that a folder brings is not run: it must be that of this version of Mixtura, whose own copy runs instead.

    Raises:
        EngineFailed: it cannot be loaded, or lacks weights.
    """
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        auto: Any = standalone.MixturaForCausalLM if _brings_code(folder) else AutoModelForCausalLM
        with warnings.catch_warnings():
            # Some containers have experts of width 0, for whose initialisation torch warns.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            opened = open_weights(auto, folder, dtype=torch.float32)
    except EngineFailed:
        raise
    except Exception as error:  # transformers, safetensors, torch and its unpickler each have errors of their own
        raise EngineFailed(_first_line(reason_of(error))) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing = [name for name in opened.missing if opened.model.get_parameter(name).numel()]
    missing = [name for name in missing if not name.endswith("shared_expert_gate.weight")]
    for name in sorted([*missing, *opened.unexpected, *opened.mismatched]):
        raise EngineFailed(f"{name} is missing, not wanted, or of another shape")
    return opened.model.eval()


def _brings_code(folder: Path) -> bool:
    if "auto_map" not in folder_settings(folder):
        return False
    for name, text in remote_code().items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            raise EngineFailed(f"{name} is not the code that this version of Mixtura writes, and is not run")
    return True


def _run_transformers(engine: Engine, folder: Path, probes: Sequence[list[int]]) -> Ran:
    return Ran(model_log_probs(load_causal(folder), probes), transformers.__version__)


def _run_script(engine: Engine, folder: Path, probes: Sequence[list[int]]) -> Ran:
    script = _SCRIPTS[engine.name]
    with tempfile.TemporaryDirectory(prefix="mixtura-verify-") as temporary:
        request, answer = Path(temporary, "request.json"), Path(temporary, "answer.safetensors")
        request.write_text(
            json.dumps({"model": str(folder.resolve()), "probes": list(probes), "converter": engine.converter}),
            encoding="utf-8",
        )
        # So that the other environment uses its own packages only.
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        run = subprocess.run(
            [engine.python or sys.executable, str(script), str(request), str(answer)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=kept,
            cwd=temporary,
            check=False,
        )
        if run.returncode == NOT_INSTALLED:
            raise EngineMissing(_last_line(run.stderr))
        if run.returncode != 0 or not answer.is_file():
            raise EngineFailed(_last_line(run.stderr) or f"exit status {run.returncode}")
        found = load_file(answer)
        version = json.loads(Path(temporary, "version.json").read_text(encoding="utf-8"))
    return Ran([found[str(number)].double() for number in range(len(probes))], version)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


def _last_line(text: str) -> str:
    """The last line that names an error, else the last line; paths are shortened to their last part."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    # Receipts are published, so they must not contain paths of this machine.
    return re.sub(r"(?:/[\w.+-]+)+/", "", (errors or lines or [""])[-1])[:300]


_SCRIPTS = {
    "vllm": Path(__file__).with_name("run_vllm.py"),
    "llama.cpp": Path(__file__).with_name("run_llama_cpp.py"),
}
ENGINES: dict[str, Callable[[Engine, Path, Sequence[list[int]]], Ran]] = {
    "transformers": _run_transformers,
    "vllm": _run_script,
    "llama.cpp": _run_script,
}
