"""Every layer against its paper's formulas, written once more below for one token, one expert and one group at a time.

The references share no code with the package. Outputs must agree to 1e-5 of their largest entry in float32 and to 1e-10
in float64; so must the gradients of the input and of every parameter, relative to the largest of them all, since a
router's gradient may cancel to nothing.
"""

import copy
import math
import warnings
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.layers import (
    DenseFFN,
    ExpertChoiceMoE,
    ExpertThresholdMoE,
    MergedExperts,
    MixtureOfTokens,
    ReMoE,
    SoftMoE,
    TokenChoiceMoE,
)
from mixtura.layers.remoe import l1_penalty, update_l1_coef

EVERY_EXPERT = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def act(u, name):
    if name == "relu":
        return torch.where(u > 0, u, 0)
    return u * (1 + torch.erf(u / math.sqrt(2))) / 2 if name == "gelu" else u / (1 + torch.exp(-u))


def feed_forward(x_D, gate_FD, up_FD, down_DF, name):
    """One network on one token; `gate_FD` is None when it is not gated."""
    u_F = up_FD @ x_D
    return down_DF @ (act(u_F, name) if gate_FD is None else act(gate_FD @ x_D, name) * u_F)


def expert(p, e, x_D, layer):
    """Expert e of a mixture on one token; in the space all share where there is one (LatentMoE)."""
    if "experts.to_latent.weight" not in p:
        return bare_expert(p, e, x_D, layer)
    return p["experts.from_latent.weight"] @ bare_expert(p, e, p["experts.to_latent.weight"] @ x_D, layer)


def free_expert(p, e, x_D, layer):
    """MoE++ equations 3 to 5: zero, copy, or x and v in the shares of a softmax."""
    zero, copied, _ = layer.free_experts.counts
    if e < zero + copied:
        return x_D if e >= zero else torch.zeros_like(x_D)
    c = e - zero - copied
    of_x, of_v = torch.softmax(p["free_experts.shares.weight"][2 * c : 2 * c + 2] @ x_D, 0)
    return of_x * x_D + of_v * p["free_experts.constant"][c]


def bare_expert(p, e, x_D, layer):
    down_DF = p["experts.down_proj"][e]
    if not layer.experts.gated:
        return feed_forward(x_D, None, p["experts.up_proj"][e], down_DF, layer.experts.activation)
    gate_FD, up_FD = p["experts.gate_up_proj"][e].chunk(2)
    return feed_forward(x_D, gate_FD, up_FD, down_DF, layer.experts.activation)


def dense(layer, p, x_BLD, mask):
    gate_FD = p["gate_proj.weight"] if layer.gated else None
    up_FD, down_DF = p["up_proj.weight"], p["down_proj.weight"]
    return {
        (b, t): feed_forward(x_BLD[b, t], gate_FD, up_FD, down_DF, layer.activation)
        for b, t in real_tokens(x_BLD, mask)
    }


def token_choice(layer, p, x_BLD, mask):
    """Switch Transformer section 2, Mixtral section 2.1, DeepSeek-V3 section 2.1.2."""
    tokens = real_tokens(x_BLD, mask)
    room = len(tokens)
    if layer.capacity_factor is not None:
        room = max(1, math.ceil(Fraction(layer.capacity_factor) * len(tokens) * layer.top_k / layer.num_experts))
    arrived = [0] * layer.num_experts
    out = {}
    for b, t in tokens:
        x_D = x_BLD[b, t]
        logits = [p["gate.weight"][e] @ x_D for e in range(layer.num_experts)]
        total = sum(torch.exp(logit) for logit in logits)
        softmax = layer.score_function == "softmax"
        scores = [torch.exp(logit) / total if softmax else 1 / (1 + torch.exp(-logit)) for logit in logits]
        bias = [0.0] * len(scores) if layer.expert_bias is None else layer.expert_bias.tolist()
        allowed = best_groups(layer, [score.item() + b for score, b in zip(scores, bias, strict=True)])
        chosen = sorted(allowed, key=lambda e: -(scores[e].item() + bias[e]))[: layer.top_k]
        divisor = sum(scores[e] for e in chosen) if layer.normalize_top_k else 1
        out[b, t] = torch.zeros_like(x_D)
        for e in chosen:
            arrived[e] += 1
            if arrived[e] <= room:
                weight, paid = layer.routed_scaling_factor * scores[e] / divisor, layer.experts.num_experts
                y_D = expert(p, e, x_D, layer) if e < paid else free_expert(p, e - paid, x_D, layer)
                out[b, t] += weight * y_D
    return out


def expert_threshold(layer, p, x_BLD, mask):
    """Expert Threshold equation 6; where it chooses over the batch, every expert's best tokens enter."""
    tokens = real_tokens(x_BLD, mask)
    logits = {token: p["gate.weight"] @ x_BLD[token] for token in tokens}
    out = {token: 0 * x_BLD[token] for token in tokens}
    for e in range(layer.num_experts):
        entering = [token for token in tokens if logits[token][e] > layer.threshold[e].double()]
        if layer.training and layer.choosing_over_batch:
            takes = math.ceil(Fraction(len(tokens) * layer.top_k, layer.num_experts))
            entering = sorted(tokens, key=lambda token: -logits[token][e].item())[:takes]
        for token in entering:
            weight = 1 / (1 + torch.exp(-logits[token][e]))
            out[token] = out[token] + weight * expert(p, e, x_BLD[token], layer)
    return out


def remoe(layer, p, x_BLD, mask):
    """ReMoE equation 4."""
    out = {}
    for token in real_tokens(x_BLD, mask):
        x_D = x_BLD[token]
        out[token] = 0 * x_D
        for e in range(layer.num_experts):
            gate = p["gate.weight"][e] @ x_D
            if gate > 0:
                out[token] = out[token] + gate * expert(p, e, x_D, layer)
    return out


def merged_experts(layer, p, x_BLD, mask):
    """Lory section 3.1, SMEAR section 3.2: the mean of what came before decides how the weights are averaged."""
    out = {}
    for b in range(len(x_BLD)):
        own = [token for token in real_tokens(x_BLD, mask) if token[0] == b]
        for place, token in enumerate(own):
            start = place // layer.segment_length * layer.segment_length
            before = own[:start] if layer.merge_by == "prefix" else own[max(0, start - layer.segment_length) : start]
            mean_D = sum(x_BLD[t] for t in before) / len(before) if before else 0 * x_BLD[token]
            weight_E = torch.softmax(p["gate.weight"] @ mean_D, 0)
            merged = {
                name: sum(w * matrix for w, matrix in zip(weight_E, stack, strict=True)).unsqueeze(0)
                for name, stack in p.items()
                if name.startswith("experts.")
            }
            out[token] = expert(merged, 0, x_BLD[token], layer)
    return out


def best_groups(layer, scores):
    """DeepSeek-V3 section 2.1.2, "node-limited routing": the experts of the groups a token may go to."""
    size = layer.num_experts // layer.expert_groups
    groups = [list(range(start, start + size)) for start in range(0, layer.num_experts, size)]
    counted = max(1, layer.top_k // layer.groups_per_token)
    groups.sort(key=lambda group: -sum(sorted((scores[e] for e in group), reverse=True)[:counted]))
    return [e for group in groups[: layer.groups_per_token] for e in group]


def expert_choice(layer, p, x_BLD, mask):
    """Expert Choice section 3.2, among the tokens of a batch or among those of a group at one position."""
    batch, length, _ = x_BLD.shape
    groups = [[(b, t) for b in range(batch) for t in range(length)]]
    if layer.group_over == "batch":
        groups = cut_into_groups([[(b, t) for b in range(batch)] for t in range(length)], layer.group_size or batch)
    size = batch * length if layer.group_over == "all" else layer.group_size or batch
    takes = min(size, math.ceil(Fraction(size * layer.top_k, layer.num_experts)))
    tokens = real_tokens(x_BLD, mask)
    out = {token: torch.zeros_like(x_BLD[token]) for token in tokens}
    for group in groups:
        probs = {token: torch.softmax(p["gate.weight"] @ x_BLD[token], 0) for token in group if token in tokens}
        for e in range(layer.num_experts):
            for token in sorted(probs, key=lambda token: -probs[token][e].item())[:takes]:
                out[token] = out[token] + probs[token][e] * expert(p, e, x_BLD[token], layer)
    return out


def soft(layer, p, x_BLD, mask):
    """Soft MoE section 2.1 with the normalised router of section 2.3."""
    out = {}
    slots = [p["scale"] * slot_D / slot_D.norm() for slot_D in p["slots"]]
    tokens = real_tokens(x_BLD, mask)
    for b in range(len(x_BLD)):
        own = [token for token in tokens if token[0] == b]
        if not own:
            continue
        logits = torch.stack([torch.stack([x_BLD[t] / x_BLD[t].norm() @ slot_D for slot_D in slots]) for t in own])
        dispatch, combine = logits.softmax(0), logits.softmax(1)
        outputs = []
        for s in range(len(slots)):
            mixture_D = sum(dispatch[i, s] * x_BLD[token] for i, token in enumerate(own))
            outputs.append(expert(p, s // layer.num_slots, mixture_D, layer))
        for i, token in enumerate(own):
            out[token] = sum(combine[i, s] * outputs[s] for s in range(len(slots)))
    return out


def mixture_of_tokens(layer, p, x_BLD, mask):
    """Mixture of Tokens section 3; what is missing from a group, or masked, is a zero token."""
    batch, length, _ = x_BLD.shape
    lines = [[(b, t) for b in range(batch)] for t in range(length)]
    if layer.group_over == "sequence":
        lines = [[(b, t) for t in range(length)] for b in range(batch)]
    tokens = real_tokens(x_BLD, mask)
    out = {}
    for group in cut_into_groups(lines, layer.group_size):
        members = [x_BLD[token] if token in tokens else torch.zeros_like(x_BLD[token]) for token in group]
        outputs = mixed_group(layer, p, members, range(layer.num_experts * layer.mixtures_per_expert))
        out |= {token: output_D for token, output_D in zip(group, outputs, strict=False) if token in tokens}
    return out


def mixture_of_tokens_alone(layer, p, x_BLD, mask):
    """Each token in a group of its own, all other members zero, with all mixtures or the largest few."""
    out = {}
    for b, t in real_tokens(x_BLD, mask):
        members = [x_BLD[b, t]]
        dispatch, combine = group_weights(layer, p, members)
        mixtures = range(len(dispatch[0]))
        if layer.alone_top_k is not None:
            share = (dispatch[0] * combine[0]).tolist()
            mixtures = sorted(mixtures, key=lambda s: -share[s])[: layer.alone_top_k]
        out[b, t] = mixed_group(layer, p, members, mixtures)[0]
    return out


def group_weights(layer, p, members):
    """Dispatch and combine weights of a group filled with zero tokens up to its size."""
    rows_GD = torch.stack(members + [torch.zeros_like(members[0])] * (layer.group_size - len(members)))
    dispatch = (rows_GD @ p["gate.weight"].T / layer.temperature).softmax(0)
    if layer.combine_gate is None:
        return dispatch, dispatch
    return dispatch, (rows_GD @ p["combine_gate.weight"].T / layer.temperature).softmax(0)


def mixed_group(layer, p, members, mixtures):
    dispatch, combine = group_weights(layer, p, members)
    outputs = [torch.zeros_like(x_D) for x_D in members]
    for s in mixtures:
        mixture_D = sum(dispatch[i, s] * x_D for i, x_D in enumerate(members))
        y_D = expert(p, s // layer.mixtures_per_expert, mixture_D, layer)
        outputs = [output_D + combine[i, s] * y_D for i, output_D in enumerate(outputs)]
    return outputs


def with_shared_expert(layer, p, x_BLD, out):
    """DeepSeekMoE section 3.2: what every token gets besides, whatever its family."""
    if layer.shared_expert is None:
        return out
    gate_FD = p["shared_expert.gate_proj.weight"] if layer.experts.gated else None
    weights = (gate_FD, p["shared_expert.up_proj.weight"], p["shared_expert.down_proj.weight"])
    return {t: y_D + feed_forward(x_BLD[t], *weights, layer.experts.activation) for t, y_D in out.items()}


def real_tokens(x_BLD, mask):
    batch, length, _ = x_BLD.shape
    return [(b, t) for b in range(batch) for t in range(length) if mask is None or mask[b, t]]


def cut_into_groups(lines, size):
    return [line[start : start + size] for line in lines for start in range(0, len(line), size)]


def assert_agrees(layer, reference, x_BLD, mask):
    """Compares the outputs of the real tokens, and all gradients of a random linear function of them."""
    probe_BLD = torch.randn_like(x_BLD, dtype=torch.float64)
    if mask is not None:
        probe_BLD *= mask.unsqueeze(-1)

    def from_reference(x_BLD):
        rows = with_shared_expert(layer, exact, x_BLD, reference(layer, exact, x_BLD, mask))
        batch, length, hidden_size = x_BLD.shape
        empty_D = torch.zeros(hidden_size, dtype=torch.float64)
        return torch.stack([torch.stack([rows.get((b, t), empty_D) for t in range(length)]) for b in range(batch)])

    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    expected = output_and_gradients(from_reference, exact, x_BLD, probe_BLD)
    for dtype, tolerance in TOLERANCES.items():
        cast = copy.deepcopy(layer).to(dtype)
        actual = output_and_gradients(
            partial(cast, mask_BL=mask), dict(cast.named_parameters()), x_BLD, probe_BLD.to(dtype)
        )
        largest_gradient = max(value.abs().max() for name, value in expected.items() if name != "output")
        for name, value in expected.items():
            scale = value.abs().max() if name == "output" else largest_gradient
            error = (actual[name] - value).abs().max()
            assert error <= tolerance * scale, f"{name} in {dtype} is off by {error / scale:.1e} of the largest entry"


def output_and_gradients(function, parameters, x_BLD, probe_BLD):
    """Everything in float64; zeros for a parameter that took no part."""
    x_BLD = x_BLD.detach().to(probe_BLD.dtype).requires_grad_()
    y_BLD = function(x_BLD)
    (y_BLD * probe_BLD).sum().backward()
    leaves = parameters | {"input": x_BLD}
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"output": (y_BLD * (probe_BLD != 0)).detach().double()} | {n: grad.double() for n, grad in grads.items()}


def draw_input(data, *, hidden_size):
    """Random hidden states (B, L, D) and, sometimes, a mask in which at least one token is real."""
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    shape = (data.draw(st.integers(1, 5), label="batch"), data.draw(st.integers(1, 4), label="length"))
    mask = None
    if data.draw(st.booleans(), label="masked"):
        mask = torch.rand(shape) < 0.6
        mask[-1, -1] = True
    return torch.randn(*shape, hidden_size), mask


def draw_sizes(data, activation, gated):
    return {
        "hidden_size": data.draw(st.integers(2, 5), label="hidden_size"),
        "intermediate_size": data.draw(st.integers(1, 4), label="intermediate_size"),
        "num_experts": data.draw(st.integers(1, 4), label="num_experts"),
        "activation": activation,
        "gated": gated,
    }


def draw_shared(data):
    return data.draw(st.integers(0, 2), label="num_shared_experts")


def scatter_weights(layer):
    """Weights of order one: at the usual start every router is close to undecided."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_dense_layer_computes_its_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    del sizes["num_experts"]
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = DenseFFN(**sizes)
    scatter_weights(layer)
    assert_agrees(layer, dense, x_BLD, mask)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_token_choice_computes_its_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = TokenChoiceMoE(
        **sizes,
        top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k"),
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid"]), label="score_function"),
        normalize_top_k=data.draw(st.booleans(), label="normalize_top_k"),
        routed_scaling_factor=data.draw(st.sampled_from([1.0, 2.5]), label="routed_scaling_factor"),
        capacity_factor=data.draw(st.sampled_from([None, 0.25, 0.5, 1.0, 1.25]), label="capacity_factor"),
        expert_bias=data.draw(st.booleans(), label="expert_bias"),
        num_shared_experts=draw_shared(data),
    )
    scatter_weights(layer)
    if layer.expert_bias is not None:
        layer.expert_bias.normal_()
    assert_agrees(layer, token_choice, x_BLD, mask)


@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_free_experts_and_a_latent_space_compute_their_papers_formulas(data, gated):
    sizes = draw_sizes(data, "relu", gated)
    free = {
        name: data.draw(st.integers(0, 2), label=name) for name in ("zero_experts", "copy_experts", "constant_experts")
    }
    layer = TokenChoiceMoE(
        **sizes,
        **free,
        top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k"),
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid"]), label="score_function"),
        normalize_top_k=data.draw(st.booleans(), label="normalize_top_k"),
        latent_size=data.draw(st.none() | st.integers(1, 4), label="latent_size"),
        num_shared_experts=draw_shared(data),
    )
    scatter_weights(layer)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    assert_agrees(layer, token_choice, x_BLD, mask)


@SETTINGS
@given(data=st.data())
def test_balance_within_sequences_is_deepseeks_with_free_experts_counting_less(data):
    """DeepSeek-V3 equations 17 to 20 for every sequence, MoE++ equation 7 for what an expert counts."""
    sizes = draw_sizes(data, "relu", False)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    top_k = data.draw(st.integers(1, sizes["num_experts"]), label="top_k")
    layer = TokenChoiceMoE(
        **sizes,
        top_k=top_k,
        copy_experts=data.draw(st.integers(0, 2), label="copy_experts"),
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid"]), label="score_function"),
        balance_by_sequence=True,
        free_expert_balance=0.5,
    ).double()
    scatter_weights(layer)
    actual = layer(x_BLD.double(), mask, return_stats=True)[1].sequence_loss
    losses = []
    weight_ED = layer.gate.weight.detach().requires_grad_()
    for b in range(len(x_BLD)):
        own = [token for token in real_tokens(x_BLD, mask) if token[0] == b]
        counts, means = torch.zeros(layer.num_experts), torch.zeros(layer.num_experts, dtype=torch.float64)
        for token in own:
            logits_E = weight_ED @ x_BLD[token].double()
            scores_E = logits_E.exp() if layer.score_function == "softmax" else 1 / (1 + torch.exp(-logits_E))
            counts[scores_E.topk(top_k).indices] += layer.num_experts / (top_k * len(own))
            means = means + scores_E / scores_E.sum() / len(own)
        eta_E = torch.tensor([1.0 if e < layer.experts.num_experts else 0.5 for e in range(layer.num_experts)])
        losses += [(eta_E * counts * means).sum()] if own else []
    expected = sum(losses) / max(1, len(losses))
    torch.testing.assert_close(actual, torch.as_tensor(expected).float())
    if losses:
        (grad,) = torch.autograd.grad(actual, layer.gate.weight)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, weight_ED)[0], rtol=1e-6, atol=1e-9)


@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_experts_in_groups_are_chosen_as_in_their_paper(data, gated):
    sizes = draw_sizes(data, "relu", gated)
    groups, size = data.draw(st.integers(1, 4), label="groups"), data.draw(st.integers(1, 3), label="size")
    kept = data.draw(st.integers(1, groups), label="kept")
    layer = TokenChoiceMoE(
        **(sizes | {"num_experts": groups * size}),
        top_k=data.draw(st.integers(1, kept * size), label="top_k"),
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid"]), label="score_function"),
        expert_bias=True,
        expert_groups=groups,
        groups_per_token=kept,
    )
    scatter_weights(layer)
    layer.expert_bias.normal_()
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    assert_agrees(layer, token_choice, x_BLD, mask)


@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_the_dense_router_gradient_is_the_outputs_gradient_with_the_choice_taken_for_the_identity(data, gated):
    """DenseMixer: d(choice of s)_i / d s_j is 1 for i = j, chosen or not; everything else as it is."""
    sizes = draw_sizes(data, "relu", gated)
    layer = TokenChoiceMoE(
        **sizes,
        top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k"),
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid"]), label="score_function"),
        normalize_top_k=data.draw(st.booleans(), label="normalize_top_k"),
        dense_router_gradient=True,
    ).double()
    scatter_weights(layer)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    x_BLD, probe_BLD = x_BLD.double(), torch.randn_like(x_BLD, dtype=torch.float64)
    plain = copy.deepcopy(layer).eval()
    results = []
    for each in (layer, plain):
        own_BLD = x_BLD.clone().requires_grad_()
        y_BLD = each(own_BLD, mask)
        (y_BLD * probe_BLD).sum().backward()
        results.append((y_BLD.detach(), [parameter.grad for parameter in each.experts.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)  # outputs, and gradients of the experts
    p = dict(layer.named_parameters())
    expected_ED = torch.zeros_like(layer.gate.weight)
    for token in real_tokens(x_BLD, None):
        logits = (p["gate.weight"].detach() @ x_BLD[token]).requires_grad_()
        scores = logits.softmax(0) if layer.score_function == "softmax" else logits.sigmoid()
        chosen = scores.topk(layer.top_k).indices.tolist()
        gains = torch.stack([expert(p, e, x_BLD[token], layer) @ probe_BLD[token] for e in range(layer.num_experts)])
        gains, total = gains.detach(), sum(scores[e].item() for e in chosen)
        if layer.normalize_top_k:  # w_i = m_i / sum of m, so an expert gains what it does better than the mixture
            gains = (gains - sum(scores[e].item() / total * gains[e] for e in chosen)) / total
        (by_logit_E,) = torch.autograd.grad((gains * scores).sum(), logits)
        expected_ED += torch.outer(by_logit_E, x_BLD[token])
    torch.testing.assert_close(layer.gate.weight.grad, expected_ED, rtol=1e-9, atol=1e-10)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_expert_choice_computes_its_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = ExpertChoiceMoE(
        **sizes,
        top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k"),
        group_size=data.draw(st.sampled_from([None, 1, 2, 3]), label="group_size"),
        group_over=data.draw(st.sampled_from(["batch", "all"]), label="group_over"),
    )
    scatter_weights(layer)
    assert_agrees(layer, expert_choice, x_BLD, mask)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_expert_threshold_computes_its_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    top_k = data.draw(st.integers(1, sizes["num_experts"]), label="top_k")
    layer = ExpertThresholdMoE(**sizes, top_k=top_k, num_shared_experts=draw_shared(data))
    scatter_weights(layer)
    layer.threshold.normal_()
    layer.updates.fill_(1.0)
    layer.choosing_over_batch = data.draw(st.booleans(), label="choosing_over_batch")
    layer.train(data.draw(st.booleans(), label="training"))
    assert_agrees(layer, expert_threshold, x_BLD, mask)


@SETTINGS
@given(data=st.data())
def test_thresholds_are_averages_of_the_k_th_best_scores_of_steps(data):
    """Expert Threshold algorithm 1, lines 6 to 8, with micro-batches pooled into steps."""
    sizes = draw_sizes(data, "relu", False)
    layer = ExpertThresholdMoE(**sizes, top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k")).double()
    scatter_weights(layer)
    expected = torch.zeros(layer.num_experts, dtype=torch.float64)
    rate = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="rate")
    for step in range(1, 4):
        best, total = torch.zeros_like(expected), 0
        for _ in range(2):
            x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
            layer(x_BLD.double(), mask)
            tokens = real_tokens(x_BLD, mask)
            k = math.ceil(Fraction(len(tokens) * layer.top_k, layer.num_experts))
            for e in range(layer.num_experts):
                scores = sorted((layer.gate.weight[e] @ x_BLD[token].double()).item() for token in tokens)
                best[e] += scores[-k] * len(tokens)
            total += len(tokens)
        layer.update(layer.observed, rate=rate)
        layer.observed = None
        expected += max(rate, 1 / step) * (best / total - expected)
        torch.testing.assert_close(layer.threshold, expected, rtol=1e-12, atol=1e-12)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_remoe_computes_its_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = ReMoE(**sizes, num_shared_experts=draw_shared(data))
    scatter_weights(layer)
    assert_agrees(layer, remoe, x_BLD, mask)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_merged_experts_compute_their_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = MergedExperts(
        **sizes,
        segment_length=data.draw(st.integers(1, 4), label="segment_length"),
        merge_by=data.draw(st.sampled_from(["segment", "prefix"]), label="merge_by"),
        num_shared_experts=draw_shared(data),
    )
    scatter_weights(layer)
    assert_agrees(layer, merged_experts, x_BLD, mask)


@SETTINGS
@given(data=st.data())
def test_remoes_penalty_is_its_papers(data):
    """ReMoE equations 10 and 11 for one layer, with the gradient of the router."""
    sizes = draw_sizes(data, "relu", False)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = ReMoE(**sizes, top_k=data.draw(st.integers(1, sizes["num_experts"]), label="top_k"))
    scatter_weights(layer)
    _, stats = layer(x_BLD, mask, return_stats=True)
    penalty = l1_penalty(stats, layer.top_k)
    penalty.backward()
    weight_ED = layer.gate.weight.detach().clone().requires_grad_()
    tokens = real_tokens(x_BLD, mask)
    expected = weight_ED.sum() * 0
    for e in range(layer.num_experts):
        gates = [torch.relu(weight_ED[e] @ x_BLD[token]) for token in tokens]
        load = layer.num_experts / (layer.top_k * len(tokens)) * sum(gate.item() > 0 for gate in gates)
        expected = expected + load * sum(gates) / len(tokens)
    expected.backward()
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.gate.weight.grad, weight_ED.grad, rtol=1e-5, atol=1e-6)


def test_remoes_penalty_weighs_more_while_too_many_experts_run():
    layers = [ReMoE(2, intermediate_size=1, num_experts=8, top_k=2).double() for _ in range(2)]
    weight = 1e-8  # ReMoE equation 8, of the sparsity of all layers together
    for active in ([4.0, 1.0], [8.0, 3.0], [1.0, 3.0], [0.0, 1.0]):
        sparsity, due = 1 - sum(active) / 2 / 8, 1 - 2 / 8
        weight *= 1.2 ** ((sparsity < due) - (sparsity > due))
        update_l1_coef(layers, torch.tensor(active), factor=1.2)
        assert [layer.l1_coef.item() for layer in layers] == pytest.approx([weight] * 2, rel=1e-6)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_soft_moe_computes_its_papers_formula(data, activation, gated):
    sizes = draw_sizes(data, activation, gated)
    x_BLD, mask = draw_input(data, hidden_size=sizes["hidden_size"])
    layer = SoftMoE(**sizes, num_slots=data.draw(st.integers(1, 3), label="num_slots"))
    scatter_weights(layer)
    assert_agrees(layer, soft, x_BLD, mask)


def draw_mixture_of_tokens(data, activation, gated, **settings):
    sizes = draw_sizes(data, activation, gated)
    layer = MixtureOfTokens(
        **sizes,
        **settings,
        mixtures_per_expert=data.draw(st.integers(1, 3), label="mixtures_per_expert"),
        temperature=data.draw(st.sampled_from([1.0, 0.6, 2.0]), label="temperature"),
        combine=data.draw(st.sampled_from(["same", "separate"]), label="combine"),
    )
    scatter_weights(layer)
    return layer


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_mixture_of_tokens_computes_its_papers_formula_in_groups(data, activation, gated):
    layer = draw_mixture_of_tokens(
        data,
        activation,
        gated,
        group_size=data.draw(st.integers(2, 4), label="group_size"),
        group_over=data.draw(st.sampled_from(["batch", "sequence"]), label="group_over"),
    )
    x_BLD, mask = draw_input(data, hidden_size=layer.experts.hidden_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups that are not full are meant here; the warning has its own test
        assert_agrees(layer, mixture_of_tokens, x_BLD, mask)


@EVERY_ACTIVATION
@EVERY_EXPERT
@SETTINGS
@given(data=st.data())
def test_mixture_of_tokens_alone_computes_a_group_of_one_token_and_zeros(data, activation, gated):
    layer = draw_mixture_of_tokens(data, activation, gated, group_size=data.draw(st.integers(2, 9), label="group_size"))
    mixtures = layer.num_experts * layer.mixtures_per_expert
    top_k = data.draw(st.none() | st.integers(1, mixtures), label="top_k")
    layer.eval().set_inference_mode("alone", top_k=top_k)
    x_BLD, mask = draw_input(data, hidden_size=layer.experts.hidden_size)
    assert_agrees(layer, mixture_of_tokens_alone, x_BLD, mask)


@EVERY_EXPERT
@pytest.mark.parametrize(
    ("family", "reference", "own"),
    [
        (ExpertChoiceMoE, expert_choice, {}),
        (SoftMoE, soft, {}),
        (MixtureOfTokens, mixture_of_tokens, {"group_size": 2, "inference_mode": "group"}),
        (MixtureOfTokens, mixture_of_tokens_alone, {"group_size": 2}),
    ],
    ids=["expert_choice", "soft", "mixture_of_tokens", "alone"],
)
def test_shared_experts_are_added_to_what_a_family_computes(family, reference, own, gated):
    layer = family(4, intermediate_size=3, num_experts=3, num_shared_experts=2, gated=gated, **own).eval()
    scatter_weights(layer)
    assert layer.shared_expert.down_proj.in_features == 2 * 3
    assert_agrees(layer, reference, torch.randn(4, 3, 4), torch.rand(4, 3) < 0.8)
