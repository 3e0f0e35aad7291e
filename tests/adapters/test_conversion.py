"""Every exact conversion gives the adapter's outputs; every other is refused with an alternative."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.conversion import export_task_loras, merge_into_mixture, upcycle_with_lora
from mixtura.adapters.mixture_lora import MixtureLoraConfig
from mixtura.adapters.targets import feed_forward_linears
from mixtura.config import AdapterConfig, UserError
from mixtura.models.batch_context import set_task_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
MakeBase = Callable[[str], nn.Module]
Batch = dict[str, Tensor]


def _randomized(adapted: Any) -> Any:
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def _adapted(base: nn.Module, **settings: Any) -> Any:
    defaults = {"method": "mixture_of_lora", "rank": 2, "num_experts": 4, "scope": "feed_forward"}
    return _randomized(apply_adapter(base, AdapterConfig(**(defaults | settings)), num_tasks=3, seed=0))


def _mistral() -> nn.Module:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=3,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return MistralForCausalLM(config).eval()


def _output(model: Any, batch: Batch) -> Tensor:
    return next(value for value in model(**batch).values() if isinstance(value, Tensor) and value.dim() == 3)


@pytest.mark.parametrize("base", ["llama", "bert", "mixtura"])
@pytest.mark.parametrize("scope", ["linear", "feed_forward"])
@pytest.mark.parametrize("share_a", [False, True])
def test_routing_by_task_is_one_stock_lora_a_task(
    make_base: MakeBase, batch: Batch, tmp_path: Path, base: str, scope: str, share_a: bool
) -> None:
    adapted = _adapted(make_base(base), scope=scope, router="task", share_a=share_a)
    folders = export_task_loras(adapted, tmp_path)
    assert [folder.name for folder in folders] == ["task_0", "task_1", "task_2"]
    for task, folder in enumerate(folders):
        assert '"peft_type": "LORA"' in (folder / "adapter_config.json").read_text(encoding="utf-8")
        set_task_ids(adapted, torch.full((4,), task))
        stock = PeftModel.from_pretrained(make_base(base), str(folder)).eval()
        torch.testing.assert_close(_output(stock, batch), _output(adapted, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share_a", [False, True])
def test_learned_weights_of_a_task_are_folded_into_its_lora(
    make_base: MakeBase, batch: Batch, tmp_path: Path, share_a: bool
) -> None:
    base = make_base("llama")
    config = MixtureLoraConfig(
        r=2, router="task", num_experts=4, num_tasks=2, share_a=share_a, target_modules=feed_forward_linears(base)
    )
    adapted: Any = _randomized(get_peft_model(base, config))
    for task, folder in enumerate(export_task_loras(adapted, tmp_path)):
        set_task_ids(adapted, torch.full((4,), task))
        stock = PeftModel.from_pretrained(make_base("llama"), str(folder)).eval()
        torch.testing.assert_close(_output(stock, batch), _output(adapted, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("share_a", [False, True])
def test_a_mixture_of_lora_is_a_stock_mixture_of_experts(
    make_base: MakeBase, batch: Batch, tmp_path: Path, base: str, share_a: bool
) -> None:
    adapted = _adapted(_mistral() if base == "mistral" else make_base(base), share_a=share_a)
    mixture = merge_into_mixture(adapted)
    real = batch["attention_mask"].bool()
    expected = _output(adapted, batch)[real]
    torch.testing.assert_close(_output(mixture, batch)[real], expected, atol=1e-5, rtol=1e-5)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == ("Qwen3MoeForCausalLM" if base == "qwen3" else "MixtralForCausalLM")
    torch.testing.assert_close(_output(loaded, batch)[real], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["llama", "qwen3"])
def test_a_mixture_of_lora_is_a_stock_lora_on_copies_of_the_frozen_layer(
    make_base: MakeBase, batch: Batch, tmp_path: Path, base: str
) -> None:
    adapted = _adapted(make_base(base))
    expected = _output(adapted, batch)
    upcycled: Any = upcycle_with_lora(adapted)
    torch.testing.assert_close(_output(upcycled, batch), expected, atol=1e-5, rtol=1e-5)
    upcycled.save_pretrained(tmp_path / "adapter")
    upcycled.unload().save_pretrained(tmp_path / "base")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(mixture, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(_output(stock, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "linear"}, "scope 'feed_forward', or distil"),
        ({"router": "dense"}, "router 'top_k', or distil"),
        ({"router": "threshold"}, "router 'top_k', or distil"),
        ({"router": "task"}, "router 'top_k', or distil"),
    ],
)
def test_what_no_stock_mixture_is_is_refused(make_base: MakeBase, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_into_mixture(_adapted(make_base("llama"), **settings))


def test_bases_without_a_container_and_other_adapters_are_refused(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mixtura' has no stock mixture"):
        merge_into_mixture(_adapted(make_base("mixtura")))
    with pytest.raises(UserError, match="depends on the token"):
        export_task_loras(_adapted(make_base("llama")), tmp_path)
    lora = apply_adapter(make_base("llama"), AdapterConfig(rank=2), seed=0)
    with pytest.raises(UserError, match="no mixture of LoRA"):
        merge_into_mixture(lora)
