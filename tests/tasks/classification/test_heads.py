"""Heads against float64 references, and what padding and other texts may not change."""

import math

import pytest
import torch
from torch.testing import assert_close

from mixtura.config import ArmConfig, HeadConfig, UserError
from mixtura.tasks.classification.heads import ClassifierHead, inactive_parameters, pool, pool_states

STATES, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 5, 8, 2


def make_head(*, double=True, num_states=STATES, layer=-1, **config):
    torch.manual_seed(0)
    head = ClassifierHead(
        HeadConfig(**config), num_states=num_states, hidden_size=WIDTH, num_classes=CLASSES, layer=layer
    )
    return head.double() if double else head


def random_states(dtype=torch.float64):
    states = [torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype) * (m + 1) for m in range(STATES)]
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]])
    return states, mask_BL


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def mean_of_real(x_BLD, mask_BL):
    return torch.stack([row[real.bool()].mean(0) for row, real in zip(x_BLD, mask_BL, strict=True)])


def test_last_layer_head_by_reference():
    head, (states, mask_BL) = make_head(), random_states()
    expected = mean_of_real(normalized(states[-1]), mask_BL) @ head.classifier.weight.T + head.classifier.bias
    assert_close(head.forward_tokens(states, mask_BL)[0], expected)


@pytest.mark.parametrize("per_token", [False, True], ids=["fixed", "by token"])
def test_layer_mix_head_by_reference(per_token):
    head, (states, mask_BL) = make_head(kind="layer_mix", per_token=per_token), random_states()
    mix = head.layer_mix
    with torch.no_grad():
        for parameter in mix.parameters():
            parameter.copy_(torch.randn_like(parameter))
    normed = torch.stack([normalized(state) for state in states], dim=2)
    logits = mix.logits if mix.gate is None else mix.logits + torch.einsum("blmd,md->blm", normed, mix.gate)
    weights = torch.softmax(logits, -1)
    mixed = mix.scale * (weights.unsqueeze(-1) * normed).sum(2)
    expected = mean_of_real(mixed, mask_BL) @ head.classifier.weight.T + head.classifier.bias
    assert_close(head.forward_tokens(states, mask_BL)[0], expected)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooled_vectors_give_what_tokens_give(pooling):
    """Pooling and blending commute, which is why a frozen model needs to be run only once."""
    head, (states, mask_BL) = make_head(kind="layer_mix", pooling=pooling), random_states()
    with torch.no_grad():
        head.layer_mix.logits.copy_(torch.tensor([0.3, -1.0, 2.0]))
    mixed = head.layer_mix([normalized(state) for state in states])
    expected = head.classifier(pool(mixed, mask_BL, pooling))
    assert_close(head(pool_states(states, mask_BL, head.config))[0], expected)


def test_attention_pooling_by_reference_starts_as_the_mean():
    head, (states, mask_BL) = make_head(kind="layer_mix", pooling="attention"), random_states()
    mixed = head.layer_mix([normalized(state) for state in states])
    assert_close(head.forward_tokens(states, mask_BL)[0], head.classifier(mean_of_real(mixed, mask_BL)))
    with torch.no_grad():
        head.query_D.normal_()
    pooled = []
    for row, real in zip(mixed, mask_BL, strict=True):
        tokens = row[real.bool()]
        pooled.append(torch.softmax(tokens @ head.query_D / math.sqrt(WIDTH), 0) @ tokens)
    assert_close(head.forward_tokens(states, mask_BL)[0], head.classifier(torch.stack(pooled)))


def test_a_head_without_a_blend_reads_the_layer_it_is_given():
    head, (states, mask_BL) = make_head(kind="best_layer", layer=1), random_states()
    assert_close(head.forward_tokens(states, mask_BL)[0], head.classifier(mean_of_real(normalized(states[1]), mask_BL)))


@pytest.mark.parametrize(("pooling", "expected"), [("first", [0, 0, 0, 2]), ("last", [4, 2, 0, 3])])
def test_one_token_is_pooled_whichever_side_is_padded(pooling, expected):
    positions_BLD = torch.arange(LENGTH).view(1, LENGTH, 1).expand(BATCH, -1, 1).double()
    assert pool(positions_BLD, random_states()[1], pooling).flatten().tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "attention"])
@pytest.mark.parametrize("per_token", [False, True], ids=["fixed", "by token"])
def test_padding_changes_nothing(pooling, per_token):
    head, (states, mask_BL) = make_head(kind="layer_mix", per_token=per_token, pooling=pooling), random_states()
    other = [torch.where(mask_BL.bool().unsqueeze(-1), state, torch.full_like(state, 7.0)) for state in states]
    assert_close(head.forward_tokens(states, mask_BL)[0], head.forward_tokens(other, mask_BL)[0])


def test_states_can_stay_as_they_are():
    head, (states, mask_BL) = make_head(normalization="none"), random_states()
    assert_close(head.forward_tokens(states, mask_BL)[0], head.classifier(mean_of_real(states[-1], mask_BL)))


def test_one_seed_gives_every_head_the_same_classifier():
    mixture = ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4)
    heads = [make_head(), make_head(kind="layer_mix"), make_head(feed_forward=mixture)]
    for head in heads[1:]:
        assert_close(head.classifier.weight, heads[0].classifier.weight, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["dense", "token_choice", "soft", "mixture_of_tokens"])
def test_a_feed_forward_layer_stands_between_pooling_and_classifier(family):
    arm = ArmConfig(family=family, num_experts=4, top_k=2, group_size=4, alone_top_k=None)
    head = make_head(feed_forward=arm).eval()
    pooled_BMD = torch.randn(BATCH, STATES, WIDTH, dtype=torch.float64)
    last_BD = pooled_BMD[:, -1]
    update_B1D = head.feed_forward(normalized(last_BD).unsqueeze(1))
    assert_close(head(pooled_BMD)[0], head.classifier(last_BD + update_B1D.squeeze(1)))
    assert update_B1D.abs().max() > 0


@pytest.mark.parametrize("family", ["token_choice", "soft", "mixture_of_tokens"])
def test_a_deployed_mixture_head_does_not_look_at_other_texts(family):
    arm = ArmConfig(family=family, num_experts=4, top_k=2, group_size=4)
    head, pooled_BMD = make_head(feed_forward=arm).eval(), torch.randn(BATCH, STATES, WIDTH, dtype=torch.float64)
    together = head(pooled_BMD)[0]
    alone = torch.cat([head(pooled_BMD[[row]])[0] for row in range(BATCH)])
    assert_close(together, alone)


def test_a_mixture_of_tokens_head_mixes_texts_while_it_trains():
    arm = ArmConfig(family="mixture_of_tokens", num_experts=4, group_size=4)
    head, pooled_BMD = make_head(feed_forward=arm).train(), torch.randn(BATCH, STATES, WIDTH, dtype=torch.float64)
    other = pooled_BMD.clone()
    other[0] = -other[0]
    assert (head(pooled_BMD)[0][1:] - head(other)[0][1:]).abs().max() > 1e-9


@pytest.mark.parametrize(
    "arm",
    [
        ArmConfig(family="expert_choice"),
        ArmConfig(family="expert_threshold"),
        ArmConfig(family="remoe"),
        ArmConfig(family="mixture_of_tokens", group_over="sequence"),
    ],
    ids=["expert choice", "expert threshold", "remoe", "groups over a sequence"],
)
def test_mixtures_that_make_no_sense_on_one_vector_are_refused(arm):
    with pytest.raises(UserError, match=r"head\.feed_forward"):
        make_head(feed_forward=arm)


def test_inactive_parameters_are_the_experts_that_did_not_run():
    arm = ArmConfig(family="token_choice", num_experts=8, top_k=2, moe_intermediate_size=4)
    assert inactive_parameters(HeadConfig(feed_forward=arm), WIDTH) == 6 * 2 * WIDTH * 4
    assert inactive_parameters(HeadConfig(), WIDTH) == 0


def test_layer_mix_finds_the_one_layer_that_knows():
    """Only layer 1 of 4 carries the label: its weight must come out on top, and the head must use it."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(0, 2, (256,), generator=generator)
    features_NMD = torch.randn(256, 4, WIDTH, generator=generator)
    features_NMD[:, 1, :2] += 2.0 * (2 * label_N - 1).unsqueeze(-1)
    head = make_head(double=False, kind="layer_mix", num_states=4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(head(features_NMD)[0], label_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = head.layer_weights()
    assert weights.argmax() == 1 and weights[1] > 0.8
    assert (head(features_NMD)[0].argmax(1) == label_N).float().mean() > 0.97
    assert math.isclose(weights.sum().item(), 1.0, rel_tol=1e-6)
