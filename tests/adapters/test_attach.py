"""Adapters on stock models: nothing at first, saved and loaded bit for bit, heard, counted, refused with a sentence."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from mixtura.adapters.attach import (
    apply_adapter,
    describe,
    load_adapter,
    reach,
    router_losses,
    routing_stats,
)
from mixtura.adapters.mixture_lora import PUBLISHED
from mixtura.adapters.mot import MotExperts
from mixtura.adapters.targets import count_parameters
from mixtura.config import AdapterConfig, UserError
from mixtura.models.batch_context import observe_routing, set_task_ids, task_ids

# PEFT reads a property that transformers deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
MakeBase = Callable[[str], nn.Module]
Batch = dict[str, Tensor]

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "top_k": {"method": "mixture_of_lora"},
    "dense": {"method": "mixture_of_lora", "router": "dense"},
    "share_a": {"method": "mixture_of_lora", "router": "dense", "share_a": True},
    "threshold": {"method": "mixture_of_lora", "router": "threshold"},
    "task": {"method": "mixture_of_lora", "router": "task"},
    "feed_forward_top_k": {"method": "mixture_of_lora", "scope": "feed_forward"},
    "feed_forward_dense": {"method": "mixture_of_lora", "scope": "feed_forward", "router": "dense"},
    "feed_forward_threshold": {"method": "mixture_of_lora", "scope": "feed_forward", "router": "threshold"},
    "feed_forward_task": {"method": "mixture_of_lora", "scope": "feed_forward", "router": "task"},
    "mixture_of_tokens": {"method": "mixture_of_tokens", "group_size": 4},
    "mixture_of_tokens_zero_fill": {"method": "mixture_of_tokens", "group_size": 4, "zero_fill": 0.5},
    "mixture_of_tokens_top_k": {"method": "mixture_of_tokens", "group_size": 4, "alone_top_k": 2},
}
BASES = ("llama", "bert", "mixtura")
each_adapter = pytest.mark.parametrize("name", ADAPTERS)
each_base = pytest.mark.parametrize("base", BASES)
TASKS = torch.tensor([0, 1, 2, 0])


def _config(name: str, **changes: Any) -> AdapterConfig:
    return AdapterConfig(**({"rank": 2, "num_experts": 4} | ADAPTERS[name] | changes))


def _output(model: nn.Module, batch: Batch) -> Tensor:
    return next(value for value in model(**batch).values() if isinstance(value, Tensor) and value.dim() == 3)


def _adapted(model: nn.Module, name: str, **changes: Any) -> PeftModel:
    adapted = apply_adapter(model, _config(name, **changes), num_tasks=3, seed=0)
    if ADAPTERS[name].get("router") == "task":
        set_task_ids(adapted, TASKS)
    return adapted


@torch.no_grad()
def _randomize(model: nn.Module, std: float = 0.3) -> None:
    """Gives every trained parameter a value that is neither zero nor small."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@each_base
@each_adapter
def test_an_adapter_starts_as_nothing(make_base: MakeBase, batch: Batch, base: str, name: str) -> None:
    expected = _output(make_base(base), batch)
    adapted = _adapted(make_base(base), name)
    for training in (False, True):
        torch.testing.assert_close(_output(adapted.train(training), batch), expected, atol=2e-6, rtol=1e-5)


@each_base
@each_adapter
def test_only_the_adapter_is_trained_and_all_of_it_is(make_base: MakeBase, batch: Batch, base: str, name: str) -> None:
    adapted = _adapted(make_base(base), name)
    _randomize(adapted)
    adapted.train()
    _output(adapted, batch).square().mean().backward()
    for key, parameter in adapted.named_parameters():
        belongs = any(part in key for part in ("lora_", "mixture_of_tokens_"))
        assert parameter.requires_grad == belongs, key
        assert (parameter.grad is not None) == belongs, key
        assert not belongs or parameter.grad.abs().sum() > 0, key


@each_base
@each_adapter
def test_a_saved_adapter_loads_into_the_base_bit_for_bit(
    make_base: MakeBase, batch: Batch, tmp_path: Path, base: str, name: str
) -> None:
    adapted = _adapted(make_base(base), name)
    _randomize(adapted)
    expected = _output(adapted.eval(), batch)
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(make_base(base), str(tmp_path), adapter_name="another").eval()
    if ADAPTERS[name].get("router") == "task":
        set_task_ids(loaded, TASKS)
    assert torch.equal(_output(loaded, batch), expected)
    assert not torch.equal(_output(make_base(base), batch), expected)


@each_base
@each_adapter
def test_a_deployed_adapter_does_not_see_other_examples(
    make_base: MakeBase, batch: Batch, base: str, name: str
) -> None:
    adapted = _adapted(make_base(base), name)
    _randomize(adapted)
    together = _output(adapted.eval(), batch)
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if ADAPTERS[name].get("router") == "task":
            set_task_ids(adapted, TASKS[row : row + 1])
        torch.testing.assert_close(_output(adapted, alone), together[row : row + 1], atol=1e-5, rtol=1e-5)


@each_base
@each_adapter
def test_reach_hears_every_layer_and_leaves_the_model_as_it_was(
    make_base: MakeBase, batch: Batch, base: str, name: str
) -> None:
    adapted = _adapted(make_base(base), name)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    found = reach(adapted, batch)
    assert found.trained == count_parameters(adapted)[1]
    assert found.layers == (2 if "feed_forward" in name or "tokens" in name else 6 if base == "llama" else 4)
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())


def test_reach_names_the_layers_of_an_adapter_that_does_nothing(make_base: MakeBase, batch: Batch) -> None:
    adapted = _adapted(make_base("llama"), "top_k")
    adapted.disable_adapter_layers()
    with pytest.raises(UserError, match="does nothing in 6 of 6 layers"):
        reach(adapted, batch)


@each_base
@each_adapter
def test_the_solved_rank_is_the_largest_that_the_baseline_allows(make_base: MakeBase, base: str, name: str) -> None:
    baseline = 5000
    adapted = apply_adapter(
        make_base(base), _config(name, rank=None), baseline_parameters=baseline, num_tasks=3, seed=0
    )
    trained = count_parameters(adapted)[1]
    rank = next(iter(adapted.peft_config.values())).r
    next_one = apply_adapter(make_base(base), _config(name, rank=rank + 1), num_tasks=3, seed=0)
    assert trained <= baseline < count_parameters(next_one)[1]
    assert f"{trained:,} of" in describe(adapted, baseline_parameters=baseline)
    assert trained == baseline or f"{baseline - trained:,} fewer than" in describe(
        adapted, baseline_parameters=baseline
    )


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_state_alone(make_base: MakeBase) -> None:
    state = torch.get_rng_state()
    first, second = (_adapted(make_base("llama"), "top_k").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


@each_adapter
def test_generation_with_a_cache_equals_generation_without(make_base: MakeBase, batch: Batch, name: str) -> None:
    adapted = _adapted(make_base("llama"), name)
    _randomize(adapted)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    with_cache = adapted.eval().generate(**batch, **settings, use_cache=True)
    without = adapted.generate(**batch, **settings, use_cache=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["top_k", "dense", "threshold", "feed_forward_top_k"])
def test_padding_enters_no_router_loss(make_base: MakeBase, batch: Batch, name: str) -> None:
    adapted = _adapted(make_base("llama"), name)
    _randomize(adapted)
    adapted.train()
    adapted(**batch)
    losses = router_losses(adapted)
    assert losses is not None
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][3, :2] = 60
    adapted(**changed)
    again = router_losses(adapted)
    assert again is not None
    torch.testing.assert_close(again, losses)
    assert losses[0].requires_grad


@pytest.mark.parametrize("name", ["lora", "task", "mixture_of_tokens"])
def test_nothing_is_balanced_where_no_router_chooses(make_base: MakeBase, batch: Batch, name: str) -> None:
    adapted = _adapted(make_base("llama"), name).train()
    adapted(**batch)
    assert router_losses(adapted) is None
    assert (routing_stats(adapted) == ()) == (name == "lora")


@pytest.mark.parametrize("name", ["top_k", "feed_forward_top_k", "mixture_of_tokens"])
def test_statistics_are_kept_in_training_or_when_asked_for(make_base: MakeBase, batch: Batch, name: str) -> None:
    adapted = _adapted(make_base("llama"), name)
    layers = 6 if name == "top_k" else 2
    adapted.eval()(**batch)
    assert routing_stats(adapted) == ()
    with observe_routing(adapted):
        adapted(**batch)
        assert len(routing_stats(adapted)) == layers
    adapted.train()(**batch)
    assert len(routing_stats(adapted)) == layers
    if name != "mixture_of_tokens":
        assert routing_stats(adapted)[0].tokens_per_expert_E.sum() == 2 * batch["attention_mask"].sum()


def _recompute(adapted: Any, *how: dict[str, bool]) -> None:
    """Turns checkpointing of activations on, by the name that this transformers has for it."""
    base = adapted.get_base_model()
    getattr(base, "_activation_checkpointing_enable", base.gradient_checkpointing_enable)(*how)


@pytest.mark.parametrize("name", ["top_k", "feed_forward_top_k", "mixture_of_tokens", "task"])
def test_gradients_and_losses_are_the_same_under_checkpointing(make_base: MakeBase, batch: Batch, name: str) -> None:
    found = []
    for checkpointing in (False, True):
        adapted = _adapted(make_base("llama"), name)
        _randomize(adapted)
        adapted.train()
        if checkpointing:
            _recompute(adapted)
        loss = _output(adapted, batch).square().mean()
        losses = router_losses(adapted)
        stats = [layer.tokens_per_expert_E for layer in routing_stats(adapted)]
        (loss if losses is None else loss + 0.1 * losses[0] + 0.1 * losses[1]).backward()
        found.append((stats, [p.grad for p in adapted.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1])


def test_reentrant_checkpointing_is_refused_where_a_router_has_a_loss(make_base: MakeBase, batch: Batch) -> None:
    adapted = _adapted(make_base("llama"), "top_k").train()
    adapted.get_base_model().enable_input_require_grads()
    _recompute(adapted, {"use_reentrant": True})
    adapted(**batch)
    with pytest.raises(UserError, match="use_reentrant"):
        router_losses(adapted)


def test_a_task_is_repeated_in_place_for_beams_and_forgotten_after_the_block(make_base: MakeBase, batch: Batch) -> None:
    adapted = _adapted(make_base("llama"), "task")
    _randomize(adapted)
    set_task_ids(adapted, None)
    with pytest.raises(UserError, match="set_task_ids"):
        adapted(**batch)
    twice = {key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}
    with task_ids(adapted.eval(), TASKS):
        once = _output(adapted, batch)
        torch.testing.assert_close(_output(adapted, twice), once.repeat_interleave(2, dim=0), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="between 0 and 3 but the adapter has 3 tasks"):
        set_task_ids(adapted, torch.tensor([0, 3]))
    with task_ids(adapted, TASKS[:3]), pytest.raises(UserError, match="3 task ids for a batch of 4"):
        adapted(**batch)


def test_a_model_with_an_adapter_can_be_copied_after_training(make_base: MakeBase, batch: Batch) -> None:
    for base in ("llama", "bert"):
        adapted = _adapted(make_base(base), "feed_forward_top_k").train()
        _output(adapted, batch).sum().backward()
        twin = copy.deepcopy(adapted)
        _randomize(twin)
        before = _output(adapted.eval(), batch)
        assert not torch.equal(_output(twin.eval(), batch), before)
        assert torch.equal(_output(adapted, batch), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("up_project",)}, "'up_project', which is no linear layer.*gate_proj"),
        ({"top_k": 1}, "no gradient"),
        ({"top_k": 5}, "between 1 and num_experts"),
        ({"num_experts": 1, "top_k": 1}, "plain LoRA"),
        ({"router": "threshold", "threshold_max": 0.5}, "1 / num_experts"),
        ({"router": "task"}, "no tasks or languages"),
        ({"rank": None}, "no baseline"),
        ({"scope": "feed_forward", "targets": ("up_proj",)}, "whole feed-forward layers"),
        ({"method": "mixture_of_tokens", "alone_top_k": 9}, "alone_top_k"),
        ({"method": "mixture_of_tokens", "group_size": 1}, "at least 2"),
        ({"method": "mixture_of_tokens", "zero_fill": 1.0}, "a share of the groups, from 0 to below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_sentence(
    make_base: MakeBase, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        apply_adapter(make_base("llama"), _config("top_k", **changes), seed=0)


def test_a_baseline_too_small_for_rank_one_is_refused_with_both_numbers(make_base: MakeBase) -> None:
    with pytest.raises(UserError, match=r"rank 1 trains [\d,]+ parameters, more than the baseline's 10"):
        apply_adapter(make_base("llama"), _config("top_k", rank=None), baseline_parameters=10, seed=0)


def test_a_model_without_feed_forward_layers_is_refused() -> None:
    with pytest.raises(UserError, match="has none: name linear layers"):
        apply_adapter(nn.Sequential(nn.Linear(4, 4)), _config("top_k"), seed=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_are_settings_that_work(make_base: MakeBase, batch: Batch, name: str) -> None:
    config = AdapterConfig(method="mixture_of_lora", **PUBLISHED[name])
    adapted = apply_adapter(make_base("llama"), config, num_tasks=3, seed=0)
    set_task_ids(adapted, TASKS)
    _randomize(adapted)
    adapted.train()(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@each_base
@pytest.mark.parametrize("name", ["top_k", "feed_forward_top_k", "mixture_of_tokens"])
def test_switched_off_or_taken_off_an_adapter_leaves_the_base(
    make_base: MakeBase, batch: Batch, base: str, name: str
) -> None:
    expected = _output(make_base(base), batch)
    adapted = _adapted(make_base(base), name)
    _randomize(adapted)
    changed = _output(adapted.eval(), batch)
    assert not torch.equal(changed, expected)
    with adapted.disable_adapter():
        assert torch.equal(_output(adapted, batch), expected)
    assert torch.equal(_output(adapted, batch), changed)
    bare = adapted.unload()
    assert torch.equal(_output(bare, batch), expected)
    again = _adapted(bare, name)
    _randomize(again)
    assert torch.equal(_output(again.eval(), batch), changed)


@each_base
@pytest.mark.parametrize("name", ["top_k", "feed_forward_top_k", "mixture_of_tokens"])
def test_two_adapters_live_side_by_side(
    make_base: MakeBase, batch: Batch, tmp_path: Path, base: str, name: str
) -> None:
    first = _adapted(make_base(base), name)
    _randomize(first)
    first.save_pretrained(tmp_path)
    expected = _output(first.eval(), batch)
    both = _adapted(make_base(base), name)
    _randomize(both, std=0.1)
    own = _output(both.eval(), batch)
    both.load_adapter(str(tmp_path), "other")
    assert torch.equal(_output(both, batch), own)
    both.set_adapter("other")
    assert torch.equal(_output(both, batch), expected)
    both.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "other" / "adapter_model.safetensors").is_file()


def test_an_adapter_added_to_a_model_in_eval_does_not_mix_the_examples(make_base: MakeBase, batch: Batch) -> None:
    both = _adapted(make_base("llama"), "mixture_of_tokens").eval()
    both.add_adapter("other", both.peft_config["default"])
    both.set_adapter("other")
    _randomize(both)
    assert not any(module.training for module in both.modules())
    assert torch.equal(_output(both, batch), _output(both.eval(), batch))


@each_base
@each_adapter
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_adapters_run_in_half_precision(make_base: MakeBase, batch: Batch, base: str, name: str, how: str) -> None:
    adapted = _adapted(make_base(base), name)
    _randomize(adapted, std=0.05)
    expected = _output(adapted.eval(), batch)
    if how == "bfloat16":
        adapted = _adapted(make_base(base).to(torch.bfloat16), name)
        _randomize(adapted, std=0.05)
        assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            actual = _output(adapted.train(training), batch)
        if not training:
            error = (actual.float() - expected).norm() / expected.norm()
            assert error < 0.1
    actual.float().square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_a_share_of_the_groups_trains_as_it_is_deployed(make_base: MakeBase) -> None:
    layers = {}
    for share in (0.0, 0.25):
        adapted = _adapted(make_base("llama"), "mixture_of_tokens", zero_fill=share)
        _randomize(adapted)
        layers[share] = next(module for module in adapted.modules() if isinstance(module, MotExperts))
    x_BLD = torch.randn(4, 40, layers[0.0].mixture.gate.in_features)
    alone_BLD, _ = layers[0.0].eval()(x_BLD, None, False)
    (grouped_BLD, _), (mixed_BLD, _) = (layers[share].train()(x_BLD, None, False) for share in (0.0, 0.25))
    is_alone_L = torch.isclose(mixed_BLD, alone_BLD, atol=1e-6).all(-1).all(0)
    is_grouped_L = torch.isclose(mixed_BLD, grouped_BLD, atol=1e-6).all(-1).all(0)
    # A group is the tokens at one position: a quarter of the 40 positions.
    assert is_alone_L.sum() == 10 and torch.equal(is_grouped_L, ~is_alone_L)
    assert torch.equal(layers[0.25].eval()(x_BLD, None, False)[0], alone_BLD)


def test_a_folder_without_an_adapter_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(make_base("llama"), tmp_path)


def test_an_adapter_that_was_cut_is_one_sentence(make_base: MakeBase, tmp_path: Path) -> None:
    _adapted(make_base("llama"), "top_k").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"The adapter in '.*' cannot be loaded \(.*\): train it again\."):
        load_adapter(make_base("llama"), tmp_path)


def test_a_routed_adapter_is_not_merged(make_base: MakeBase) -> None:
    for name in ("top_k", "mixture_of_tokens"):
        with pytest.raises(UserError, match="cannot be merged"):
            _adapted(make_base("llama"), name).merge_and_unload()
