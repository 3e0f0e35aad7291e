"""The Triton kernels against their definitions in float64, output and gradients.

Without an accelerator they run in Triton's interpreter, on the CPU; `pytest -m gpu` runs the same tests compiled.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from mixtura.kernels import ExpertWeights, accelerator, reference

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from mixtura.kernels import triton_mixing, triton_sparse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="an accelerator is there: use -m gpu")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]
    ),
]
ON = pytest.mark.parametrize("on", DEVICES)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


def assert_near(actual, expected, dtype=torch.float32):
    """Within the tolerance of the dtype, relative to the largest number that is expected."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert_close(actual.detach().double().cpu(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * scale)


def grown(tensor, dtype=torch.float64):
    """A copy in float64 on the CPU that gathers a gradient of its own."""
    return tensor.detach().cpu().to(dtype).requires_grad_()


# (outer, inner, group, experts, slots, hidden): blocks are multiples of 16, these sizes are not.
GROUPS = {
    "several groups": (2, 3, 5, 3, 1, 20),
    "one group": (1, 1, 4, 4, 1, 16),
    "several mixtures": (2, 1, 7, 3, 2, 33),
    "more mixtures than a block": (1, 2, 3, 35, 2, 8),
    "large group": (1, 1, 70, 2, 1, 70),
}
EACH_GROUP = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)


def group_inputs(sizes, on, dtype=torch.float32):
    if on == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers")
    outer, inner, group, experts, slots, hidden = sizes
    x_OPGD = torch.randn(outer, inner, group, hidden, device=on).to(dtype).requires_grad_()
    logits_OPGS = (2 * torch.randn(outer, inner, group, experts * slots, device=on)).requires_grad_()
    return x_OPGD, logits_OPGS, slots


def defined_mix(x_OPGD, logits_OPGS, slots):
    weight_NGEC = logits_OPGS.softmax(2).flatten(0, 1).unflatten(-1, (-1, slots))
    return reference.mix(x_OPGD.flatten(0, 1), weight_NGEC)


def defined_spread(y_ERD, logits_OPGS, slots):
    weight_NGEC = logits_OPGS.softmax(2).flatten(0, 1).unflatten(-1, (-1, slots))
    return reference.spread(y_ERD, weight_NGEC).unflatten(0, logits_OPGS.shape[:2])


@ON
@DTYPES
@EACH_GROUP
def test_mixing_equals_the_definition(on, dtype, sizes):
    x_OPGD, logits_OPGS, slots = group_inputs(sizes, on, dtype)
    z_ERD, lse_NS = triton_mixing.mix_groups(x_OPGD, logits_OPGS, slots)
    cotangent_ERD = torch.randn(z_ERD.shape).to(dtype)
    z_ERD.backward(cotangent_ERD.to(on))
    expected = [grown(x_OPGD), grown(logits_OPGS)]
    expected_ERD = defined_mix(*expected, slots)
    expected_ERD.backward(cotangent_ERD.double())
    assert z_ERD.dtype == dtype and logits_OPGS.grad.dtype == torch.float32
    assert_near(z_ERD, expected_ERD, dtype)
    assert_near(lse_NS, expected[1].logsumexp(2).flatten(0, 1))
    assert_near(x_OPGD.grad, expected[0].grad, dtype)
    assert_near(logits_OPGS.grad, expected[1].grad, dtype)


@ON
@DTYPES
@EACH_GROUP
def test_spreading_equals_the_definition(on, dtype, sizes):
    _, logits_OPGS, slots = group_inputs(sizes, on, dtype)
    outer, inner, _, experts, _, hidden = sizes
    y_ERD = torch.randn(experts, outer * inner * slots, hidden, device=on).to(dtype).requires_grad_()
    lse_NS = logits_OPGS.detach().logsumexp(2).flatten(0, 1)
    out_OPGD = triton_mixing.spread_groups(y_ERD, logits_OPGS, lse_NS, slots)
    cotangent_OPGD = torch.randn(out_OPGD.shape).to(dtype)
    out_OPGD.backward(cotangent_OPGD.to(on))
    expected = [grown(y_ERD), grown(logits_OPGS)]
    expected_OPGD = defined_spread(*expected, slots)
    expected_OPGD.backward(cotangent_OPGD.double())
    assert_near(out_OPGD, expected_OPGD, dtype)
    assert_near(y_ERD.grad, expected[0].grad, dtype)
    assert_near(logits_OPGS.grad, expected[1].grad, dtype)


@ON
def test_groups_of_different_examples_need_no_copy(on):
    x_BLD, logits_BLS = torch.randn(6, 4, 20, device=on), torch.randn(6, 4, 5, device=on)
    x_OPGD, logits_OPGS = (t.transpose(0, 1).unflatten(1, (2, 3)) for t in (x_BLD, logits_BLS))
    assert x_OPGD.data_ptr() == x_BLD.data_ptr()
    z_ERD, lse_NS = triton_mixing.mix_groups(x_OPGD, logits_OPGS, 1)
    assert_near(z_ERD, defined_mix(x_OPGD.double().cpu(), logits_OPGS.double().cpu(), 1))
    y_OPGD = triton_mixing.spread_groups(z_ERD, logits_OPGS, lse_NS, 1)
    assert_near(y_OPGD, defined_spread(z_ERD.double().cpu(), logits_OPGS.double().cpu(), 1))
    assert y_OPGD.flatten(1, 2).transpose(0, 1).is_contiguous()


@ON
def test_gradients_through_strided_groups_equal_those_of_copies(on):
    x_BLD, logits_BLS = torch.randn(4, 3, 10, device=on), torch.randn(4, 3, 6, device=on)
    results = []
    for copy in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x_BLD, logits_BLS)]
        x_OPGD, logits_OPGS = (t.transpose(0, 1).unflatten(1, (2, 2)) for t in leaves)
        if copy:
            x_OPGD, logits_OPGS = x_OPGD.contiguous(), logits_OPGS.contiguous()
        y_OPGD = accelerator.logits_mixed_ffn(x_OPGD, logits_OPGS, None, 2, torch.tanh)
        y_OPGD.square().sum().backward()
        results.append([y_OPGD, *(t.grad for t in leaves)])
    for strided, copied in zip(*results, strict=True):
        assert_close(strided, copied)


@ON
@pytest.mark.parametrize("combine", ["same", "separate"])
def test_mixing_running_and_spreading_equals_the_definition(on, combine):
    x_OPGD, logits_OPGS, slots = group_inputs(GROUPS["several mixtures"], on)
    second_OPGS = torch.randn_like(logits_OPGS).requires_grad_() if combine == "separate" else None
    y_OPGD = accelerator.logits_mixed_ffn(x_OPGD, logits_OPGS, second_OPGS, slots, torch.tanh)
    y_OPGD.square().sum().backward()
    leaves = [t for t in (x_OPGD, logits_OPGS, second_OPGS) if t is not None]
    copies = [grown(t) for t in leaves]
    expected_OPGD = defined_spread(torch.tanh(defined_mix(copies[0], copies[1], slots)), copies[-1], slots)
    expected_OPGD.square().sum().backward()
    assert_near(y_OPGD, expected_OPGD)
    for leaf, copy in zip(leaves, copies, strict=True):
        assert_near(leaf.grad, copy.grad)


CHOICES = {
    "even": ([[0, 1], [1, 2], [2, 0]], 3),
    "all to one": ([[4]] * 300, 6),
    "empty experts": ([[7, 1], [1, 7], [7, 1]], 40),
    "a single choice": ([[0]], 1),
    "more than a block": (None, 70),
}


@ON
@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES)
def test_choices_are_sorted_as_a_stable_sort_does(on, case):
    choices, num_experts = case
    expert_TK = torch.randint(num_experts, (130, 3)) if choices is None else torch.tensor(choices)
    order_R, row_TK, rows_E = triton_sparse.sort_choices(expert_TK.to(on), num_experts)
    expected_R = expert_TK.flatten().argsort(stable=True)
    assert torch.equal(order_R.cpu(), expected_R)
    assert torch.equal(row_TK.cpu().flatten(), expected_R.argsort())
    assert torch.equal(rows_E.cpu(), expert_TK.flatten().bincount(minlength=num_experts))


@ON
def test_choices_with_gaps_between_them_are_sorted_too(on):
    expert_TK = torch.randint(5, (9, 4), device=on)[:, ::2]
    order_R, _, _ = triton_sparse.sort_choices(expert_TK, 5)
    assert torch.equal(order_R, expert_TK.flatten().argsort(stable=True))


@pytest.mark.skipif(not INTERPRETED, reason="an assertion that fails on an accelerator ends its process")
@pytest.mark.parametrize("value", [-1, 5, 1 << 40])
def test_a_choice_of_no_expert_is_refused(value):
    with pytest.raises(RuntimeError, match="not between 0 and 4"):
        triton_sparse.sort_choices(torch.tensor([[0, value]]), 5)
    with pytest.raises(TypeError, match=r"expert_TK has dtype torch\.float32"):
        triton_sparse.sort_choices(torch.zeros(2, 2), 5)


ROUTES = {
    "even": [[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]],
    "all to one": [[1]] * 7,
    "empty experts": [[3, 0], [0, 3], [3, 0]],
    "top 4 of 4": [[0, 1, 2, 3], [3, 2, 1, 0]],
}


def sparse_inputs(choices, on, dtype, *, gated, hidden=24, width=8):
    """Tokens, weights of choices and experts; grouped products want rows of 16 bytes, blocks are larger than this."""
    tokens, experts = len(choices), 4
    x_TD = torch.randn(tokens, hidden, device=on)
    weight_TK = torch.rand(tokens, len(choices[0]), device=on) + 0.1
    up_EHD = torch.randn(experts, 2 * width if gated else width, hidden, device=on) / 4
    down_EDF = torch.randn(experts, hidden, width, device=on) / 3
    leaves = [t.to(dtype).requires_grad_() for t in (x_TD, up_EHD, down_EDF)]
    return torch.tensor(choices, device=on), weight_TK.requires_grad_(), *leaves


def run_sparse(expert_TK, weight_TK, x_TD, up_EHD, down_EDF, activation, gated, *, rows_known=True):
    order_R, row_TK, rows_E = triton_sparse.sort_choices(expert_TK, len(up_EHD))
    token_R, weight_R = order_R // expert_TK.size(1), weight_TK.flatten()[order_R]
    rows_TK = row_TK if rows_known else None
    return accelerator.grouped_ffn(
        x_TD, token_R, weight_R, rows_E, rows_TK, ExpertWeights(up_EHD, down_EDF, activation, gated)
    )


def assert_sparse(inputs, activation, gated, dtype, **how):
    y_TD = run_sparse(*inputs, activation, gated, **how)
    cotangent_TD = torch.randn(y_TD.shape).to(dtype)
    y_TD.backward(cotangent_TD.to(y_TD.device))
    expert_TK, *leaves = inputs
    weight_TK, x_TD, *experts = (grown(t) for t in leaves)
    order_R = expert_TK.cpu().flatten().argsort(stable=True)
    counts_E = expert_TK.cpu().flatten().bincount(minlength=len(experts[0]))
    token_R = order_R // expert_TK.size(1)
    weights = ExpertWeights(*experts, activation, gated)
    expected_TD = reference.sparse_ffn(x_TD, token_R, weight_TK.flatten()[order_R], counts_E, weights)
    expected_TD.backward(cotangent_TD.double())
    assert_near(y_TD, expected_TD, dtype)
    for leaf, copy in zip(leaves, (weight_TK, x_TD, *experts), strict=True):
        assert_near(leaf.grad, copy.grad, dtype)


@ON
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("choices", ROUTES.values(), ids=ROUTES)
def test_sparse_experts_equal_the_definition(on, choices, gated):
    dtype = torch.float32 if on == "cpu" else torch.bfloat16  # grouped products of float32 are not sure to be there
    assert_sparse(sparse_inputs(choices, on, dtype, gated=gated), "silu", gated, dtype)


@ON
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_sparse_experts_have_every_activation(on, activation, gated):
    dtype = torch.float32 if on == "cpu" else torch.bfloat16
    assert_sparse(sparse_inputs(ROUTES["even"], on, dtype, gated=gated, width=40), activation, gated, dtype)


@ON
def test_sparse_experts_take_bfloat16(on):
    inputs = sparse_inputs(ROUTES["even"], on, torch.bfloat16, gated=True)
    assert_sparse(inputs, "silu", True, torch.bfloat16)


@ON
def test_columns_beyond_a_block_are_summed_up(on):
    dtype = torch.float32 if on == "cpu" else torch.bfloat16
    assert_sparse(sparse_inputs(ROUTES["even"], on, dtype, gated=True, width=264, hidden=1032), "silu", True, dtype)


@ON
def test_rows_of_tokens_are_found_where_they_are_not_known(on):
    dtype = torch.float32 if on == "cpu" else torch.bfloat16
    assert_sparse(sparse_inputs(ROUTES["even"], on, dtype, gated=False), "relu", False, dtype, rows_known=False)


@ON
def test_a_token_without_a_row_gets_zeros(on):
    dtype = torch.float32 if on == "cpu" else torch.bfloat16
    _, _, x_TD, up_EHD, down_EDF = sparse_inputs(ROUTES["even"], on, dtype, gated=False)
    token_R, weight_R = torch.tensor([3, 0, 3], device=on), torch.ones(3, device=on)
    counts_E = torch.tensor([1, 0, 2, 0], device=on)
    experts = ExpertWeights(up_EHD, down_EDF, "relu", False)
    y_TD = accelerator.grouped_ffn(x_TD, token_R, weight_R, counts_E, None, experts)
    expected_TD = reference.sparse_ffn(
        *(t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in (x_TD, token_R, weight_R, counts_E)),
        ExpertWeights(*(t.detach().cpu().double() for t in (up_EHD, down_EDF)), "relu", False),
    )
    assert_near(y_TD, expected_TD, dtype)
    assert (y_TD[[1, 2, 4]] == 0).all()


@ON
def test_a_gradient_left_as_it_was_found_is_cleared_for_experts_without_rows(on):
    grad_EHD = torch.full((3, 5, 7), float("nan"), device=on)
    triton_sparse._clear_unused(grad_EHD, torch.tensor([2, 0, 1], device=on))
    assert (grad_EHD[1] == 0).all() and grad_EHD[[0, 2]].isnan().all()


@ON
def test_counts_that_are_one_number_expanded_are_read_as_such(on):
    rows_E = torch.tensor([2, 0, 0], device=on)[:1].expand(3)
    grad_EHD = torch.ones(3, 5, 7, device=on)
    assert (triton_sparse._clear_unused(grad_EHD, rows_E) == 1).all()


@ON
def test_outputs_and_logits_of_any_strides_are_spread(on):
    logits_OPGS = torch.randn(1, 2, 5, 3, device=on).transpose(0, 1).requires_grad_()
    y_ERD = torch.randn(2, 3, 8, device=on).transpose(0, 1).requires_grad_()
    lse_NS = logits_OPGS.detach().double().logsumexp(2).flatten(0, 1).float().t().contiguous().t()
    out_OPGD = triton_mixing.spread_groups(y_ERD, logits_OPGS, lse_NS, 1)
    grads = torch.autograd.grad(out_OPGD.square().sum(), [y_ERD, logits_OPGS])
    copies = [grown(y_ERD), grown(logits_OPGS)]
    expected_OPGD = defined_spread(*copies, 1)
    expected = torch.autograd.grad(expected_OPGD.square().sum(), copies)
    for actual, wanted in zip([out_OPGD, *grads], [expected_OPGD, *expected], strict=True):
        assert_near(actual, wanted)


@ON
def test_operators_meet_the_rules_of_torch_library(on):
    """Schemas, fake outputs, autograd and dynamic shapes, so that torch.compile may rely on them."""
    x_OPGD, logits_OPGS, slots = group_inputs(GROUPS["several mixtures"], on)
    torch.library.opcheck(torch.ops.mixtura.mix_groups, (x_OPGD, logits_OPGS, slots))
    z_ERD, lse_NS = torch.ops.mixtura.mix_groups(x_OPGD, logits_OPGS, slots)
    torch.library.opcheck(
        torch.ops.mixtura.spread_groups, (z_ERD.detach().requires_grad_(), logits_OPGS, lse_NS, slots)
    )
    torch.library.opcheck(torch.ops.mixtura.sort_choices, (torch.randint(4, (5, 2), device=on), 4))


@ON
@pytest.mark.parametrize("kind", ["groups", "rows"])
def test_one_graph_holds_forward_and_backward(on, kind):
    """torch.compile with fullgraph: no break, and the same output and gradients."""
    if kind == "groups":
        x_OPGD, logits_OPGS, slots = group_inputs(GROUPS["several groups"], on)
        leaves = [x_OPGD, logits_OPGS]

        def run():
            return accelerator.logits_mixed_ffn(*leaves, None, slots, torch.tanh)
    else:
        dtype = torch.float32 if on == "cpu" else torch.bfloat16
        expert_TK, *leaves = sparse_inputs(ROUTES["even"], on, dtype, gated=True)

        def run():
            return run_sparse(expert_TK, *leaves, "silu", True)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = function()
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for plain, compiled in zip(*results, strict=True):
        assert_close(plain, compiled)
