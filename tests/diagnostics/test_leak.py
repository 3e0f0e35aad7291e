from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.diagnostics import probe_causal_lm, probe_layer
from mixtura.layers import DenseFFN, ExpertChoiceMoE, LayerMix, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.models import MixtureConfig, MixtureForCausalLM

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4}


def dense() -> nn.Module:
    return DenseFFN(8, intermediate_size=16)


def mixture_of_tokens(*, mode: str, **settings: Any) -> nn.Module:
    return MixtureOfTokens(**SIZES, group_size=4, **settings).train(mode == "group")


@pytest.mark.parametrize(
    ("layer", "future", "batch"),
    [
        pytest.param(dense, False, False, id="dense"),
        pytest.param(lambda: TokenChoiceMoE(**SIZES, top_k=2), False, False, id="token choice, dropless"),
        pytest.param(
            lambda: TokenChoiceMoE(**SIZES, top_k=1, capacity_factor=1.0), False, True, id="token choice, dropping"
        ),
        pytest.param(lambda: ExpertChoiceMoE(**SIZES, group_size=4), False, True, id="expert choice, one position"),
        pytest.param(lambda: ExpertChoiceMoE(**SIZES, group_over="all"), True, True, id="expert choice, all tokens"),
        pytest.param(lambda: SoftMoE(**SIZES), True, False, id="soft"),
        pytest.param(lambda: mixture_of_tokens(mode="group"), False, True, id="mixture of tokens in groups"),
        pytest.param(
            lambda: mixture_of_tokens(mode="group", group_over="sequence"), True, False, id="groups along the sequence"
        ),
        pytest.param(lambda: mixture_of_tokens(mode="alone"), False, False, id="mixture of tokens alone"),
        pytest.param(
            lambda: mixture_of_tokens(mode="alone", alone_top_k=2), False, False, id="mixture of tokens alone, top-2"
        ),
    ],
)
def test_families_leak_what_the_table_says(layer: Callable[[], nn.Module], future: bool, batch: bool) -> None:
    report = probe_layer(layer(), hidden_size=8, batch=8, length=8)
    assert (report.future, report.batch) == (future, batch)
    assert report.probes == 60
    # Found leaks are no rounding, and what is tight shows next to nothing.
    for found, largest in ((future, report.largest_future_change), (batch, report.largest_batch_change)):
        assert largest > 1e-3 if found else largest < 1e-12


@pytest.mark.parametrize("over_tokens", [False, True])
def test_layer_mix_leaks_nothing(over_tokens: bool) -> None:
    mix = LayerMix(3, hidden_size=8 if over_tokens else None).double()
    for weights in mix.parameters():
        nn.init.normal_(weights)
    report = probe_layer(lambda x: mix([x, x.sin(), x * x]), hidden_size=8, batch=4, length=6)
    assert (report.future, report.batch) == (False, False)


@pytest.mark.parametrize(
    ("leak", "future", "batch"),
    [
        pytest.param(lambda x: x + 1e-5 * x.flip(1), True, False, id="a faint look ahead"),
        pytest.param(lambda x: x + 1e-5 * x.flip(0), False, True, id="a faint look at a neighbour"),
        pytest.param(lambda x: x + x.cumsum(1), False, False, id="the past is no leak"),
    ],
)
def test_faint_leaks_are_found_and_the_past_is_allowed(
    leak: Callable[[Tensor], Tensor], future: bool, batch: bool
) -> None:
    report = probe_layer(leak, hidden_size=8, batch=4, length=8)
    assert (report.future, report.batch) == (future, batch)


def test_one_mild_probe_misses_what_many_strong_ones_find() -> None:
    found = [
        probe_layer(ExpertChoiceMoE(**SIZES, group_over="all"), hidden_size=8, batch=8, length=8, num_probes=1).future
        for _ in range(20)
    ]
    assert not all(found)


@pytest.mark.parametrize(
    ("family", "training", "future", "batch"),
    [
        ("dense", True, False, False),
        ("token_choice", True, False, False),
        ("expert_choice", True, False, True),
        ("expert_choice", False, False, True),
        ("expert_threshold", True, True, True),  # before the first update experts choose over the batch
        ("expert_threshold", False, False, False),
        ("remoe", True, False, False),
        ("merged_experts", True, False, False),
        ("merged_experts", False, False, False),
        ("soft", True, True, False),
        ("mixture_of_tokens", True, False, True),
        ("mixture_of_tokens", False, False, False),
    ],
)
def test_models_leak_what_their_layers_leak(
    tiny_config: Callable[..., MixtureConfig], family: str, training: bool, future: bool, batch: bool
) -> None:
    model = MixtureForCausalLM(tiny_config(family, layer_mix=True)).train(training)
    report = probe_causal_lm(model, vocab_size=64, batch=4, length=8)
    assert (report.future, report.batch) == (future, batch)


def test_the_probed_model_stays_as_it_was(tiny_config: Callable[..., MixtureConfig]) -> None:
    model = MixtureForCausalLM(tiny_config("token_choice")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe_causal_lm(model, vocab_size=64, batch=2, length=4, num_probes=2)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_the_same_seed_gives_the_same_report() -> None:
    layer = SoftMoE(**SIZES)
    first, second, other = (probe_layer(layer, hidden_size=8, batch=4, length=4, seed=s) for s in (1, 1, 2))
    assert first == second
    assert first != other


def test_probes_that_could_see_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        probe_layer(lambda x: x, hidden_size=8, batch=1, length=8)
    with pytest.raises(UserError, match=r"largest output is 0\.0"):
        probe_layer(torch.zeros_like, hidden_size=8, batch=2, length=8)
    with pytest.raises(UserError, match="largest output is nan"):
        probe_layer(lambda x: x * float("nan"), hidden_size=8, batch=2, length=8)
