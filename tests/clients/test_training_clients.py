"""TRL's SFTTrainer and the Hub's upload on a tiny Mixtura model."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from mixtura.data import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM

TEXTS = [f"the ship number {number} leaves the harbour at night" for number in range(8)]


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=280)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_trl_trains_a_model_that_loads_again(family: str, tiny_config: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = importlib.import_module("datasets")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    model = MixtureForCausalLM(tiny_config(family, vocab_size=vocab_size))
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        max_length=16,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
    )
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    trained = model.model.layers[1].mlp.experts.down_proj
    assert not torch.equal(trained, before)
    # TRL forms the loss itself, and adds its balance loss where a model can return router logits.
    assert trainer.aux_loss_enabled is (family == "token_choice")
    trainer.save_model(str(tmp_path / "model"))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(again.config, MixtureConfig)
    assert torch.equal(again.model.layers[1].mlp.experts.down_proj, trained)


def test_push_to_hub_sends_the_configuration_and_safetensors(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network: what would be sent is written to a folder, and loads from there."""
    sent: dict[str, bytes] = {}

    class FakeApi(HfApi):
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id: str, operations: Any, **_: Any) -> Any:
            for operation in operations:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as file:
                    sent[operation.path_in_repo] = file.read()

    api = FakeApi()
    monkeypatch.setattr(hub, "hf_api", lambda: api, raising=False)
    for name in ("create_repo", "create_commit"):  # how older versions call the Hub
        monkeypatch.setattr(hub, name, getattr(api, name), raising=False)
    model = MixtureForCausalLM(tiny_config("mixture_of_tokens"))
    model.push_to_hub("someone/tiny")
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(sent)
    assert not [name for name in sent if name.endswith((".bin", ".pkl", ".py"))]
    assert json.loads(sent["config.json"])["model_type"] == "mixtura"
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
