"""Documents packed into rows: models with merged experts give each the numbers that it has alone."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.inference import real_tokens
from mixtura.models.packed_rows import documents_of

LENGTHS = [(5, 4, 2), (7, 1, 3)]
TOTAL = 11


def build(attention="sdpa", **settings):
    config = MixtureConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, mlp_layer_types=["merged_experts", "dense", "merged_experts"], num_experts=3,
        segment_length=2, num_shared_experts=1, initializer_range=0.3, **settings,
    )  # fmt: skip
    model = MixtureForCausalLM(config).double().eval()
    model.set_attn_implementation(attention)
    return model


def packed(padding=0):
    """Ids, positions and which document each token is of, padding on the right."""
    ids_BL = torch.randint(3, 64, (2, TOTAL + padding))
    positions_BL, document_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -1)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            positions_BL[row, start : start + length] = torch.arange(length)
            document_BL[row, start : start + length] = number
            start += length
    return ids_BL, positions_BL, document_BL


def mask_of(document_BL, attention):
    real_BL = document_BL >= 0
    may_BLL = (document_BL[:, :, None] == document_BL[:, None]) & real_BL[:, :, None]
    may_BLL &= torch.ones(may_BLL.shape[1:], dtype=torch.bool).tril()
    may_BLL[:, :, 0] |= ~real_BL
    mask = may_BLL[:, None]
    return mask if attention == "sdpa" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)


def assert_as_alone(model, output, ids_BL, document_BL):
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            own_L = document_BL[row] == number
            alone_LV = model(ids_BL[row, own_L][None], use_cache=False).logits[0]
            assert_close(output.logits[row, own_L], alone_LV, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("merge_by", ["segment", "prefix"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_document_packed_by_a_mask_gets_the_numbers_that_it_gets_alone(merge_by, use_cache, attention, padding):
    model, (ids_BL, positions_BL, document_BL) = build(attention, merge_by=merge_by), packed(padding)
    mask = mask_of(document_BL, attention)
    output = model(ids_BL, attention_mask=mask, position_ids=positions_BL, use_cache=use_cache)
    assert_as_alone(model, output, ids_BL, document_BL)


@pytest.mark.parametrize("merge_by", ["segment", "prefix"])
def test_a_document_packed_by_positions_gets_the_numbers_that_it_gets_alone(merge_by):
    model, (ids_BL, positions_BL, document_BL) = build(merge_by=merge_by), packed()
    output = model(ids_BL, position_ids=positions_BL, use_cache=False)
    assert_as_alone(model, output, ids_BL, document_BL)


@pytest.mark.parametrize("merge_by", ["segment", "prefix"])
def test_the_last_document_of_a_row_goes_on_from_the_cache(merge_by):
    model, (ids_BL, positions_BL, document_BL) = build(merge_by=merge_by), packed()
    mask = mask_of(document_BL, "sdpa")
    cut = TOTAL - 1
    cache = DynamicCache(config=model.config)
    model(
        ids_BL[:, :cut], attention_mask=mask[:, :, :cut, :cut], position_ids=positions_BL[:, :cut],
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    rest = model(
        ids_BL[:, cut:], attention_mask=mask[:, :, cut:], position_ids=positions_BL[:, cut:], past_key_values=cache
    )
    whole = model(ids_BL, attention_mask=mask, position_ids=positions_BL, use_cache=False)
    assert_close(rest.logits, whole.logits[:, cut:], rtol=1e-11, atol=1e-11)


def test_packed_documents_train_as_alone():
    model, (ids_BL, positions_BL, document_BL) = build(merge_by="prefix").train(), packed(padding=2)
    gradients = []
    for together in (True, False):
        model.zero_grad()
        if together:
            mask = mask_of(document_BL, "sdpa")
            logits_BLV = model(ids_BL, attention_mask=mask, position_ids=positions_BL, use_cache=False).logits
            logits_BLV[document_BL >= 0].square().sum().backward()
        else:
            for row, lengths in enumerate(LENGTHS):
                for number in range(len(lengths)):
                    own_BL = ids_BL[row, document_BL[row] == number][None]
                    model(own_BL, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_rows_of_one_document_are_left_as_they_are():
    model, (ids_BL, _, _) = build(), packed()
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :3] = mask_BL[1, 4:6] = 0
    positions_BL = (mask_BL.cumsum(-1) - 1).masked_fill(mask_BL == 0, 1)
    hidden_BLD = model.model.embed_tokens(ids_BL)
    causal = mask_of(torch.zeros_like(ids_BL), "sdpa")
    for positions, mask in ((positions_BL, mask_BL), (torch.arange(TOTAL)[None], None), (None, causal), (None, None)):
        assert documents_of(model.config, hidden_BLD, positions, mask, real_tokens(mask)) is None
    given = model(ids_BL, position_ids=torch.arange(TOTAL)[None]).logits
    assert torch.equal(given, model(ids_BL).logits)
