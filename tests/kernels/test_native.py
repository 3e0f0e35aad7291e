"""Experts in C against their definition: blocks, activations at their ends, what is left to torch, how it is built."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mixtura.kernels import ExpertWeights, mixed_ffn, native, reference, sparse_ffn

compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler, or torch's library has no sgemm to call")


def sparse_inputs(counts, *, tokens, hidden_size=20, width=12, gated=True):
    token_R = torch.cat([torch.randperm(tokens)[:count].sort().values for count in counts])
    weights = (torch.randn(len(counts), 2 * width if gated else width, hidden_size) / 4,)
    weights += (torch.randn(len(counts), hidden_size, width) / 4,)
    return torch.randn(tokens, hidden_size), token_R, torch.rand(len(token_R)), torch.tensor(counts), *weights


def mixed_inputs(groups, group_size, experts, mixtures, *, hidden_size=20, width=12, gated=True):
    weight_NGEC = torch.rand(2, groups, group_size, experts, mixtures)
    up_EHD = torch.randn(experts, 2 * width if gated else width, hidden_size) / 4
    down_EDF = torch.randn(experts, hidden_size, width) / 4
    return torch.randn(groups, group_size, hidden_size), *weight_NGEC, up_EHD, down_EDF


def output_and_gradients(function, inputs, activation, gated, dtype):
    copies = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*copies[:-2], ExpertWeights(*copies[-2:], activation, gated))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    return [y.detach().double()] + [t.grad.double() for t in copies if t.is_floating_point()]


def run_sparse(inputs, activation, gated):
    *rows, up_EHD, down_EDF = inputs
    return sparse_ffn(*rows, ExpertWeights(up_EHD, down_EDF, activation, gated))


def assert_equals_definition(name, function, inputs, activation, gated):
    expected = output_and_gradients(getattr(reference, name), inputs, activation, gated, torch.float64)
    for actual, value in zip(
        output_and_gradients(function, inputs, activation, gated, torch.float32), expected, strict=True
    ):
        assert_close(actual, value, rtol=0, atol=2e-6 * max(1.0, value.abs().max().item()))


@compiled
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("width", [5, 13, 140], ids=["below a vector", "narrow", "wide"])
def test_rows_of_several_blocks_equal_the_definition(activation, gated, threads, width):
    # Blocks end within an expert, at its end and beyond it, and experts without rows lie between.
    counts = [2 * native.BLOCK_ROWS + 1, 0, native.BLOCK_ROWS, 3, 0]
    inputs = sparse_inputs(counts, tokens=600, gated=gated, width=width)
    assert_equals_definition("sparse_ffn", sparse_ffn, inputs, activation, gated)
    inputs = mixed_inputs(2 * native.BLOCK_ROWS // 3, 2, 3, 2, gated=gated, width=width)
    assert_equals_definition("mixed_ffn", mixed_ffn, inputs, activation, gated)


def test_blocks_of_large_experts_have_more_rows():
    small, large = native.LARGE_WEIGHTS, native.LARGE_WEIGHTS + 1
    assert native.block_rows(small, 1000) == native.BLOCK_ROWS
    assert native.block_rows(large, 1000) == native.MOST_ROWS
    assert native.block_rows(large, native.SCRATCH_BYTES // 1000) == 1000
    assert native.block_rows(large, native.SCRATCH_BYTES) == native.BLOCK_ROWS


@compiled
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_large_experts_equal_the_definition(threads, monkeypatch):
    monkeypatch.setattr(native, "LARGE_WEIGHTS", 0)
    monkeypatch.setattr(native, "MOST_ROWS", 300)
    monkeypatch.setattr(native, "SCRATCH_BYTES", 1 << 40)
    inputs = sparse_inputs([601, 0, 300, 299], tokens=700, gated=True, width=140)
    assert_equals_definition("sparse_ffn", sparse_ffn, inputs, "silu", True)


@compiled
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 23, 32, 95, 96, 97, 127, 128, 129])
def test_experts_of_few_rows_equal_the_definition(rows, threads):
    # Widths leave every remainder of a strip of six rows, and vectors that end beyond the last column.
    for hidden_size, width in ((8, 133), (23, 136), (33, 134), (64, 144), (140, 9)):
        sizes = {"hidden_size": hidden_size, "width": width}
        inputs = sparse_inputs([rows, 0, 1, rows], tokens=140, **sizes)
        assert_equals_definition("sparse_ffn", sparse_ffn, inputs, "silu", True)
        assert_equals_definition("mixed_ffn", mixed_ffn, mixed_inputs(rows, 2, 3, 1, **sizes), "relu", True)


@compiled
@pytest.mark.parametrize("threads", [2, 3, 9], indirect=True)
@pytest.mark.parametrize("width", [13, 140])
def test_threads_share_out_experts(threads, width):
    # Even and uneven rows, experts without any at every place, more threads than experts.
    for counts in ([0, 300, 0, 290, 10, 0], [5, 6, 5, 0, 5], [40] * 9, [70, 1]):
        inputs = sparse_inputs(counts, tokens=300, width=width)
        assert_equals_definition("sparse_ffn", sparse_ffn, inputs, "silu", True)
    for experts in (1, 4, 9):
        inputs = mixed_inputs(7, 2, experts, 1, width=width)
        assert_equals_definition("mixed_ffn", mixed_ffn, inputs, "silu", True)


@compiled
def test_rows_of_one_expert_do_not_see_each_other():
    inputs = sparse_inputs([13, 5], tokens=20, width=140)
    y_TD = run_sparse(inputs, "silu", True)
    changed_TD = inputs[0].clone()
    changed_TD[3] = float("inf")
    others_T = torch.arange(20) != 3
    assert torch.equal(run_sparse([changed_TD, *inputs[1:]], "silu", True)[others_T], y_TD[others_T])


@compiled
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
@pytest.mark.parametrize("rows", [90, 600])
def test_rows_of_one_token_within_an_expert_add_up_in_one_order(rows, threads):
    # A single expert, so that threads share the work on its rows; most of these belong to one token.
    x_TD, _, weight_R, counts_E, *experts = sparse_inputs([rows], tokens=rows, hidden_size=40, width=24)
    token_R = torch.where(torch.rand(rows) < 0.9, 0, torch.arange(rows))
    inputs = (x_TD, token_R, weight_R, counts_E, *experts)

    def run():
        return output_and_gradients(sparse_ffn, [t.clone() for t in inputs], "silu", True, torch.float32)

    expected = run()
    for _ in range(40):
        for actual, value in zip(run(), expected, strict=True):
            assert torch.equal(actual, value)
    assert_equals_definition("sparse_ffn", sparse_ffn, inputs, "silu", True)


@compiled
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("which", ["x", "weight", "up", "down", "gradient"])
@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("relu", True), ("silu", True)])
def test_what_is_not_finite_stays_where_torch_has_it(activation, gated, which, value, monkeypatch):
    # 20 and 21 columns end with a vector that overlaps the one before it; rows do not fill their vectors either.
    x_TD, token_R, weight_R, counts_E, up_EHD, down_EDF = sparse_inputs([9, 0, 5], tokens=12, width=21, gated=gated)
    grad_TD = torch.randn(12, 20)
    {"x": x_TD, "weight": weight_R.view(-1, 1), "up": up_EHD[0], "down": down_EDF[0], "gradient": grad_TD}[which][
        int(token_R[2]) if which in ("x", "gradient") else 0, 0
    ] = value
    results = []
    for in_c in (True, False):
        if not in_c:
            monkeypatch.setattr(native, "can_run", lambda *_: False)
        leaves = [t.clone().requires_grad_() for t in (x_TD, weight_R, up_EHD, down_EDF)]
        y_TD = sparse_ffn(leaves[0], token_R, leaves[1], counts_E, ExpertWeights(*leaves[2:], activation, gated))
        results.append([y_TD, *torch.autograd.grad(y_TD, leaves, grad_TD)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("path", [pytest.param("C", marks=compiled), "torch"])
@pytest.mark.parametrize(
    ("token", "counts", "weights", "error", "message"),
    [
        ([0, 5], [1, 1], 2, (IndexError, RuntimeError), "5|out of range"),
        ([0, -1], [1, 1], 2, (IndexError, RuntimeError), "-1|out of range"),
        ([0.0, 1.0], [1, 1], 2, TypeError, "token_R has dtype torch.float32"),
        ([0, 1], [1, 1], 3, ValueError, "weight_R has shape"),
        ([0, 1], [1, 2], 2, ValueError, "tokens_per_expert_E is"),
        ([0, 1], [3, -1], 2, ValueError, "tokens_per_expert_E is"),
        ([0, 1], [1, 1, 0], 2, ValueError, "tokens_per_expert_E is"),
    ],
)
def test_rows_that_would_point_outside_are_refused(path, token, counts, weights, error, message, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(native, "can_run", lambda *_: False)
    experts = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), "relu", False)
    with pytest.raises(error, match=message):
        sparse_ffn(torch.ones(5, 4), torch.tensor(token), torch.ones(weights), torch.tensor(counts), experts)


def test_tokens_may_be_named_in_int32():
    x_TD, token_R, *rest = sparse_inputs([3, 4], tokens=5)
    expected_TD = run_sparse([x_TD, token_R, *rest], "silu", True)
    assert torch.equal(run_sparse([x_TD, token_R.to(torch.int32), *rest], "silu", True), expected_TD)


@compiled
def test_the_c_code_is_what_runs(monkeypatch):
    seen = []
    run = native.forward
    monkeypatch.setattr(native, "forward", lambda *arguments: seen.append(len(arguments)) or run(*arguments))
    output_and_gradients(mixed_ffn, mixed_inputs(3, 4, 2, 1), "silu", True, torch.float32)
    run_sparse(sparse_inputs([3, 2], tokens=4), "silu", True)
    assert len(seen) == 2


@compiled
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_are_right_from_end_to_end(activation, gated):
    values_T = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, -120.0, -88.5, -0.0, 88.5, 120.0, 1e30])])
    x_TD = torch.stack([values_T, torch.ones_like(values_T)], -1)
    up_EHD = torch.eye(2)[None] if gated else torch.eye(2)[None, :1]
    tokens = torch.arange(len(values_T))
    inputs = (
        x_TD,
        tokens,
        torch.ones(len(tokens)),
        torch.tensor([len(tokens)]),
        up_EHD,
        torch.tensor([[[1.0], [0.0]]]),
    )
    assert native.can_run(activation, x_TD, up_EHD)
    copies = [tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
    y_TD = run_sparse(copies, activation, gated)
    y_TD[:, 0].sum().backward()
    wide_T = values_T.double().requires_grad_()
    expected_T = getattr(nn.functional, activation)(wide_T)
    expected_T.sum().backward()
    assert_close(y_TD[:, 0].double(), expected_T.detach(), rtol=4e-7, atol=1e-36)
    # The slope of SiLU is a difference of two sums that nearly cancel where it crosses zero.
    assert_close(copies[0].grad[:, 0].double(), wide_T.grad, rtol=1e-6, atol=2e-7)


@compiled
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_no_number_stays_none(activation):
    x_TD, *rest = sparse_inputs([3, 4], tokens=5)
    x_TD[1, 0] = float("nan")
    y_TD = run_sparse([x_TD, *rest], activation, True)
    touched_T = torch.zeros(5, dtype=torch.bool)
    touched_T[1] = (rest[0] == 1).any()
    assert (y_TD.isnan().all(1) == touched_T).all() and touched_T.any()


@compiled
@pytest.mark.parametrize(
    ("activation", "tensor"),
    [
        pytest.param("gelu", torch.zeros(2, 2), id="another activation"),
        pytest.param("silu", torch.zeros(2, 2, dtype=torch.float64), id="float64"),
        pytest.param("silu", torch.zeros(2, 2, dtype=torch.bfloat16), id="bfloat16"),
        pytest.param("silu", torch.zeros(2, 3).T, id="not contiguous"),
        pytest.param("silu", torch.zeros(2, 2, device="meta"), id="without memory"),
    ],
)
def test_the_rest_is_left_to_torch(activation, tensor):
    assert native.can_run("silu", torch.zeros(2, 2), nn.Parameter(torch.zeros(2, 2)))
    assert not native.can_run(activation, torch.zeros(2, 2), tensor)


def test_flops_are_counted_as_without_the_c_code():
    inputs = sparse_inputs([5, 0, 300], tokens=400)
    with FlopCounterMode(display=False) as counter:
        run_sparse(inputs, "silu", True)
    assert counter.get_total_flops() == 2 * 305 * 3 * 20 * 12


def test_a_counter_around_one_pass_alone_changes_no_gradient():
    # Between the passes experts of few rows lie otherwise in C than in torch's path.
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in sparse_inputs([5, 20], tokens=30, width=140)]
    leaves = [t for t in inputs if t.requires_grad]
    expected = torch.autograd.grad(run_sparse(inputs, "silu", True).square().sum(), leaves)
    y_TD = run_sparse(inputs, "silu", True)
    with FlopCounterMode(display=False):
        counted_backward = torch.autograd.grad(y_TD.square().sum(), leaves)
        y_TD = run_sparse(inputs, "silu", True)
    for grads in (counted_backward, torch.autograd.grad(y_TD.square().sum(), leaves)):
        for grad, value in zip(grads, expected, strict=True):
            assert_close(grad, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("MIXTURA_NATIVE", "0", id="switched off"),
        pytest.param("CC", "false", id="a compiler that fails"),
        pytest.param("CC", "/no/such/compiler", id="no compiler"),
        pytest.param("MIXTURA_CACHE", "/dev/null/nowhere", id="nowhere to write"),
    ],
)
def test_without_the_c_code_torch_gives_the_same(name, value, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setenv(name, value)
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert not list(tmp_path.rglob("*.so"))
        assert_equals_definition("sparse_ffn", sparse_ffn, sparse_inputs([5, 0, 300], tokens=400), "silu", True)
        assert_equals_definition("mixed_ffn", mixed_ffn, mixed_inputs(3, 4, 2, 2), "silu", True)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@compiled
def test_it_is_compiled_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        (made,) = (tmp_path / "native").iterdir()
        before = made.stat().st_mtime_ns
        native.library.cache_clear()
        assert native.library() is not None and made.stat().st_mtime_ns == before
        assert list((tmp_path / "native").iterdir()) == [made]
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
