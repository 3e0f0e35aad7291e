"""What is said before a run that is many times slower than it need be."""

from pathlib import Path

import pytest
import torch

from mixtura.config import TrainingConfig
from mixtura.threads import usable_cores
from mixtura.training import process
from mixtura.training.process import slow_memory, slow_settings


@pytest.fixture
def machine(monkeypatch):
    """A machine of one thread a core, without a GPU, whose bfloat16 is so many times slower."""

    def make(*, cores=1, slower=1.0, busy=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(process, "_idle_accelerator", lambda: None)
        monkeypatch.setattr(process, "usable_cores", lambda: cores)
        monkeypatch.setattr(process, "crowded", lambda: busy)
        monkeypatch.setattr(process, "_seconds", lambda dtype: slower if dtype == torch.bfloat16 else 1.0)

    return make


def test_a_machine_as_it_should_be_is_not_remarked_on(machine):
    machine(cores=torch.get_num_threads())
    assert slow_settings(TrainingConfig()) == slow_settings(TrainingConfig(dtype="bfloat16")) == []


def test_bfloat16_that_the_processor_lacks_is_said_with_how_much_it_costs(machine):
    machine(slower=12.3)
    (told,) = slow_settings(TrainingConfig(dtype="bfloat16"))
    assert "take 12.3 times as long as in float32" in told and 'to "float32"' in told
    assert slow_settings(TrainingConfig()) == []


@pytest.mark.parametrize(("threads", "cores", "told"), [(1, 16, "stay idle"), (64, 2, "wait for each other")])
def test_threads_that_do_not_fit_the_cores_are_said(machine, threads, cores, told):
    machine(cores=cores)
    (found,) = slow_settings(TrainingConfig(threads=threads))
    assert f"is {threads} on {cores} cores" in found and told in found and f"to {cores}" in found


def test_the_processes_of_one_start_share_the_cores(machine, monkeypatch):
    machine(cores=16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert slow_settings(TrainingConfig(threads=2)) == []


def test_threads_that_would_spin_on_a_busy_machine_are_said(machine, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    machine(cores=2, busy=True)
    (told,) = slow_settings(TrainingConfig(threads=2))
    assert "set GOMP_SPINCOUNT=5000 in the environment before Python starts" in told
    assert slow_settings(TrainingConfig(threads=1)) == []
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert slow_settings(TrainingConfig(threads=2)) == []


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert any("has an NVIDIA GPU" in told for told in slow_settings(TrainingConfig()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not any("has an NVIDIA GPU" in told for told in slow_settings(TrainingConfig()))


def test_training_that_does_not_fit_into_memory_is_said(monkeypatch):
    model = torch.nn.Linear(1000, 1000, bias=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process, "_free_memory", lambda: 11_999_999)
    told = slow_memory(model, "dense seed 0")
    assert told is not None and told.startswith("dense seed 0 keeps 0.0 GB of weights") and "will swap" in told
    for free in (12_000_000, None):
        monkeypatch.setattr(process, "_free_memory", lambda free=free: free)
        assert slow_memory(model, "dense seed 0") is None
    monkeypatch.setattr(process, "_free_memory", lambda: 0)
    assert slow_memory(model.requires_grad_(False), "dense seed 0") is None


def test_the_machine_is_asked_and_answers():
    assert usable_cores() >= 1
    assert process._seconds(torch.float32) > 0
    free = process._free_memory()
    assert free is None or free > 0
