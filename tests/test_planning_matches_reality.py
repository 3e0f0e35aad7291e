"""The formulas of `mixtura.planning` against the real modules: parameters, FLOPs and bytes."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixtura.config import ArmConfig, ModelConfig, TrainingConfig
from mixtura.diagnostics import live_bytes
from mixtura.diagnostics.health import measure_peak_memory
from mixtura.models import MixtureConfig, MixtureForCausalLM, losses
from mixtura.models.build import build_model_config
from mixtura.planning import flops_per_token, flops_ratio, model_parameters, state_memory
from mixtura.planning.formulas import attention_flops, head_flops, layer_flops
from mixtura.planning.shapes import feed_forward_shapes
from mixtura.planning.step_memory import Division, ModelSizes, step_memory
from mixtura.training.optimization import build_optimizer

BATCH, LENGTH = 8, 12

CASES = {
    "dense": ("dense", {}),
    "dense gated": ("dense", {"gated": True}),
    "untied": ("dense", {"tie_word_embeddings": False}),
    "wide heads": ("dense", {"head_dim": 12}),
    "layer mix": ("dense", {"layer_mix": True}),
    "token choice": ("token_choice", {}),
    "token choice gated": ("token_choice", {"gated": True}),
    "shared experts": ("token_choice", {"num_shared_experts": 2}),
    "loss-free balancing": ("token_choice", {"expert_bias_update_rate": 1e-3, "scoring_func": "sigmoid"}),
    "expert choice": ("expert_choice", {}),
    "expert choice, rounded up": ("expert_choice", {"num_experts": 5, "num_experts_per_tok": 1}),
    "all experts run in training": ("token_choice", {"dense_router_gradient": True}),
    "experts in groups": ("token_choice", {"n_group": 2, "topk_group": 1}),
    "latent experts": ("token_choice", {"latent_size": 8, "num_shared_experts": 1}),
    "expert threshold, choosing over the batch": ("expert_threshold", {}),
    "expert choice and shared experts": ("expert_choice", {"num_shared_experts": 1}),
    "soft and shared experts": ("soft", {"num_shared_experts": 1}),
    "mixture of tokens and shared experts": ("mixture_of_tokens", {"num_shared_experts": 2}),
    "shared experts, a quarter alone": ("mixture_of_tokens", {"num_shared_experts": 1, "zero_fill": 0.25}),
    "merged experts": ("merged_experts", {"segment_length": 4}),
    "merged by all before, gated": (
        "merged_experts",
        {"segment_length": 6, "merge_by": "prefix", "gated": True, "num_shared_experts": 1},
    ),
    "merged experts, the last segment not full": ("merged_experts", {"segment_length": 5}),
    "merged experts, segments longer than sequences": ("merged_experts", {"segment_length": 20, "gated": True}),
    "soft": ("soft", {}),
    "soft, three slots": ("soft", {"mixtures_per_expert": 3}),
    "mixture of tokens": ("mixture_of_tokens", {}),
    "mixture of tokens gated": ("mixture_of_tokens", {"gated": True}),
    "two mixtures an expert": ("mixture_of_tokens", {"mixtures_per_expert": 2}),
    "separate combine": ("mixture_of_tokens", {"combine": "separate"}),
    "a quarter of the groups alone": ("mixture_of_tokens", {"zero_fill": 0.25}),
    "all alone": ("mixture_of_tokens", {"zero_fill": 1.0, "alone_top_k": None, "mixtures_per_expert": 2}),
    "last steps alone": ("mixture_of_tokens", {"alone_fraction": 1.0, "combine": "separate"}),
    "fewer experts than tokens": ("mixture_of_tokens", {"group_size": 8}),
}
case = pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES.keys())


def build(config: MixtureConfig) -> MixtureForCausalLM:
    # Eager attention is made of matrix products; fused attention hides them from the counter.
    model = MixtureForCausalLM._from_config(config, attn_implementation="eager").train()
    model.prepare_step(0, steps=1)
    return model


@case
def test_parameters_are_exact(tiny_config: Callable[..., MixtureConfig], family: str, settings: dict) -> None:
    config = tiny_config(family, **settings)
    assert model_parameters(config) == sum(p.numel() for p in build(config).parameters())


@case
def test_forward_flops_are_exact_in_every_module(
    tiny_config: Callable[..., MixtureConfig], family: str, settings: dict
) -> None:
    config = tiny_config(family, **settings)
    model = build(config)
    ids = torch.randint(64, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids)
    counted = {name: sum(parts.values()) / (BATCH * LENGTH) for name, parts in counter.get_flop_counts().items()}
    for depth, layer in enumerate(feed_forward_shapes(config, sequence_length=LENGTH)):
        where = f"MixtureForCausalLM.model.layers.{depth}"
        assert counted[f"{where}.mlp"] == pytest.approx(layer_flops(layer), rel=1e-6)
        assert counted[f"{where}.self_attn"] == pytest.approx(attention_flops(config, sequence_length=LENGTH), rel=1e-6)
    assert counted["MixtureForCausalLM.lm_head"] == pytest.approx(head_flops(config), rel=1e-6)
    whole = flops_per_token(config, sequence_length=LENGTH, backward=False)
    assert counted["Global"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("family", ["expert_threshold", "remoe"])
def test_flops_are_exact_for_the_mean_number_of_experts_that_tokens_run(
    tiny_config: Callable[..., MixtureConfig], family: str
) -> None:
    config = tiny_config(family, num_shared_experts=1)
    model = MixtureForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(64, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        stats = model(ids, output_routing=True).routing[1]
    rows = (stats.tokens_per_expert_E.sum() / stats.routed_rows).item()
    assert 0 < rows < 4 and rows != 2
    layer = dataclasses.replace(feed_forward_shapes(config, sequence_length=LENGTH)[1], top_k=rows)
    counted = sum(counter.get_flop_counts()["MixtureForCausalLM.model.layers.1.mlp"].values()) / (BATCH * LENGTH)
    assert counted == pytest.approx(layer_flops(layer), rel=1e-6)


def test_free_experts_cost_their_router_and_take_rows_from_the_others(
    tiny_config: Callable[..., MixtureConfig],
) -> None:
    config = tiny_config("token_choice", zero_experts=1, copy_experts=2, constant_experts=2, free_expert_balance=0.5)
    model = MixtureForCausalLM._from_config(config, attn_implementation="eager").eval()
    assert model_parameters(config) == sum(p.numel() for p in model.parameters())
    ids = torch.randint(64, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        stats = model(ids, output_routing=True).routing[1]
    layer = feed_forward_shapes(config, sequence_length=LENGTH)[1]
    assert layer.rows_per_token == pytest.approx(2 * 0.5 * 4 / (0.5 * 4 + 5))
    rows = (stats.tokens_per_expert_E[:4].sum() / (BATCH * LENGTH)).item()
    expected = layer_flops(layer) + (rows - layer.rows_per_token) * 2 * 2 * 16 * 16
    counted = sum(counter.get_flop_counts()["MixtureForCausalLM.model.layers.1.mlp"].values()) / (BATCH * LENGTH)
    assert counted == pytest.approx(expected, rel=1e-6)


@case
def test_training_flops_are_exact(tiny_config: Callable[..., MixtureConfig], family: str, settings: dict) -> None:
    config = tiny_config(family, **settings)
    model = build(config)
    ids = torch.randint(64, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = counter.get_total_flops() / (BATCH * LENGTH)
    assert counted == pytest.approx(flops_per_token(config, sequence_length=LENGTH), rel=1e-6)


@pytest.mark.parametrize(
    "family", ["token_choice", "expert_choice", "expert_threshold", "remoe", "merged_experts", "mixture_of_tokens"]
)
def test_an_arm_without_a_width_costs_the_dense_arm(family: str) -> None:
    sizes = {"vocab_size": 1024, "max_position_embeddings": 128}
    dense, mixture = (
        build_model_config(ModelConfig(), ArmConfig(family=name), **sizes)  # pyright: ignore[reportArgumentType]
        for name in ("dense", family)
    )
    assert flops_ratio(mixture, baseline=dense, sequence_length=128) == pytest.approx(1.0, abs=3e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@case
def test_training_state_is_exact_but_for_step_counters_and_buffers(
    tiny_config: Callable[..., MixtureConfig], family: str, settings: dict, name: Literal["adamw", "muon"]
) -> None:
    config = tiny_config(family, **settings)
    model = build(config)
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name), learning_rate=1e-3)
    ids = torch.randint(64, (BATCH, LENGTH))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    step_counters = 4 * len(list(model.parameters()))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    left_out = live_bytes(model, optimizer) - state_memory(config, optimizer=name).total
    assert 0 < left_out <= step_counters + buffers


MEMORY_CASES = {
    "dense": ("dense", {}),
    "dense gated": ("dense", {"gated": True, "hidden_act": "silu"}),
    "token choice": ("token_choice", {}),
    "token choice gated, shared expert": ("token_choice", {"gated": True, "num_shared_experts": 1}),
    "all experts run in training": ("token_choice", {"dense_router_gradient": True}),
    "expert choice": ("expert_choice", {}),
    "expert threshold": ("expert_threshold", {}),
    "remoe": ("remoe", {}),
    "soft": ("soft", {}),
    "mixture of tokens": ("mixture_of_tokens", {}),
    "mixture of tokens gated": ("mixture_of_tokens", {"gated": True, "num_experts": 16}),
    "mixture of tokens, half alone": ("mixture_of_tokens", {"zero_fill": 0.5}),
    "mixture of tokens, alone": ("mixture_of_tokens", {"zero_fill": 1.0}),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(("batch", "length", "passes"), [(8, 8, 1), (32, 32, 1), (16, 32, 2)])
@pytest.mark.parametrize(("family", "settings"), MEMORY_CASES.values(), ids=MEMORY_CASES.keys())
def test_peak_memory_of_a_step_is_planned_within_a_tenth(
    family: str, settings: dict, batch: int, length: int, passes: int, checkpointing: bool
) -> None:
    """From a step that its weights fill to one that its activations fill, with one micro-batch and with two."""
    planned, measured = planned_and_measured(
        {**settings, "mlp_layer_types": [family] * 4},
        Division(micro_batch=batch, micro_batches=passes, checkpointing=checkpointing),
        length=length,
    )
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(20_000, 64), (40_000, 32)])
def test_peak_memory_is_planned_where_head_and_loss_take_some_rows_at_a_time(
    vocabulary: int, hidden: int, passes: int, checkpointing: bool
) -> None:
    division = Division(micro_batch=32, micro_batches=passes, checkpointing=checkpointing)
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "mlp_layer_types": ["token_choice"] * 4}
    assert losses.large(32 * 32, vocabulary)
    planned, measured = planned_and_measured(sizes, division, length=32)
    assert planned == pytest.approx(measured, rel=0.1)


def planned_and_measured(settings: dict, division: Division, *, length: int) -> tuple[float, int]:
    """Bytes at the peak of a step on the CPU."""
    config = MixtureConfig(**(MEMORY_SIZES | settings))
    model = MixtureForCausalLM(config).train()
    model.prepare_step(0, steps=1)
    if division.checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (division.micro_batch, length))

    def step() -> None:
        for _ in range(division.micro_batches):
            loss = model(ids, labels=ids, use_cache=False, output_routing=True, skip_logits=True).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = live_bytes(model, optimizer) + measure_peak_memory(step)
    sizes = ModelSizes(config, sequence_length=length)  # pyright: ignore[reportArgumentType]
    return step_memory(sizes, division, on_cpu=True).total, measured


MEMORY_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "group_size": 8,
    "alone_top_k": 2,
}
