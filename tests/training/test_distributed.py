"""Two processes on the CPU, started as a user would start them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixtura.training import read_metrics

SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
import numpy as np
import torch
from mixtura.config import TrainingConfig
from mixtura.data import PackedTokens, PreparedData, train_tokenizer
from mixtura.models import MixtureForCausalLM
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training import train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
tokenizer = train_tokenizer(["some text to fit a tokenizer on"], vocab_size=270)
packed = {name: PackedTokens(np.load(folder / f"{name}.npy"), bytes_per_token=2.0) for name in ("train", "validation")}
data = PreparedData(tokenizer, **packed, summary=settings["summary"])
config = TrainingConfig(**settings["training"])
train(
    MixtureForCausalLM.from_pretrained(folder / "initial"),
    task=LanguageModelling(data, config),
    config=config,
    learning_rate=3e-3,
    seed=0,
    out=folder / "two",
    label="two processes",
    resume="--resume" in sys.argv,
)
"""
ARMS = {
    "dense": {},
    "token_choice": {
        "balance_over": "global",
        "router_aux_loss_coef": 0.5,
        "router_z_loss_coef": 0.1,
        "expert_bias_update_rate": 0.01,
        "num_experts_per_tok": 2,
    },
    "mixture_of_tokens": {"group_size": 2},
}


@pytest.fixture
def run_two(tmp_path, tiny_data, tiny_training):
    """Trains a model in two processes of two sequences each, where `run` takes one of four."""

    def start(model, *flags, **settings):
        config = tiny_training(batch_size=2, **settings)
        model.save_pretrained(tmp_path / "initial")
        for name in ("train", "validation"):
            np.save(tmp_path / f"{name}.npy", getattr(tiny_data, name).sequences_NL)
        (tmp_path / "settings.json").write_text(_json({"training": vars(config), "summary": tiny_data.summary}))
        (tmp_path / "script.py").write_text(SCRIPT)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, str(tmp_path / "script.py"), str(tmp_path), *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
        assert result.returncode == 0, result.stderr
        return load_file(tmp_path / "two" / "checkpoint" / "model.safetensors")

    return start


def _json(value):
    import json

    return json.dumps(value)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_are_one_with_the_whole_batch(run, run_two, tiny_model, tmp_path, arm, accumulation):
    weights = run_two(tiny_model(arm, **ARMS[arm]), gradient_accumulation_steps=accumulation)
    model = tiny_model(arm, **ARMS[arm])
    run(model, out="one", gradient_accumulation_steps=accumulation)
    expected = model.state_dict()
    for name, actual in weights.items():
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=1e-5)
    one, two = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("one", "two"))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() & {"loss", "aux_loss", "z_loss", "grad_norm", "tokens"}:
            assert first[key] == pytest.approx(second[key], abs=2e-5), key
        if "load" in first:
            np.testing.assert_allclose(first["load"], second["load"], atol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(run_two, tiny_model, tmp_path):
    arm = ARMS["token_choice"]
    straight = run_two(tiny_model("token_choice", **arm))
    (tmp_path / "two" / "checkpoint").rename(tmp_path / "straight")
    for path in (tmp_path / "two" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "two" / "checkpoint-6").rmdir()
    resumed = run_two(tiny_model("token_choice", **arm), "--resume")
    for name, expected in straight.items():
        assert torch.equal(resumed[name], expected), name
