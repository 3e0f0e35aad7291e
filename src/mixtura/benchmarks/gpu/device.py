"""The process of one stage: picks the device, opens the journal, and runs the stage's items."""

import sys
from importlib import metadata
from pathlib import Path

import torch

from mixtura.benchmarks.gpu.journal import Journal
from mixtura.benchmarks.gpu.kernel_checks import run_checks
from mixtura.benchmarks.gpu.side_by_side import run_evidence
from mixtura.benchmarks.gpu.timings import run_layers, run_steps
from mixtura.results.document import Plain


def run_stage(name: str, path: Path, *, seconds: float, pack: Path, smoke: bool) -> None:
    """Runs what is left of a stage.

    Args:
        name: of one of `stages.STAGES`.
        path: its journal.
        seconds: until it ends.
        pack: folder of the packed text.
        smoke: everything tiny.
    """
    if not (smoke or torch.cuda.is_available()):
        sys.exit("There is no GPU here: pass --smoke to see that the run goes through.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    journal = Journal(path, seconds=seconds, settings=_settings(smoke=smoke))
    torch.manual_seed(0)
    if name == "kernels":
        run_checks(journal, device, smoke=smoke)
    elif name == "layers":
        run_layers(journal, device, smoke=smoke)
    elif name == "steps":
        run_steps(journal, device, smoke=smoke)
    else:
        run_evidence(journal, device, smoke=smoke, pack=pack)
    journal.finish()


def _settings(*, smoke: bool) -> Plain:
    """What decides the numbers besides the versions that every record has."""
    found: Plain = {"smoke": smoke, "cuda": torch.version.cuda, "triton": None, "capability": None}
    for package in ("triton", "scattermoe"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found["capability"] = list(torch.cuda.get_device_capability())
    return found
