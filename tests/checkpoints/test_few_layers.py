"""Few layers of a pretrained model, among them one of every kind."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.checkpoints.few_layers import load_few_layers
from mixtura.checkpoints.pretrained import load_base
from mixtura.data.prepare import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM

SIZES = {"vocab_size": 270, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
LATE = ["dense"] * 4 + ["token_choice"] * 2
NLLB = {"encoder_layers": 6, "decoder_layers": 6, "encoder_sparse_step": 4, "decoder_sparse_step": 3}
NLLB |= {"d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_experts": 2, "vocab_size": 270}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=5)), [[0, 1]]),
    "ours": (
        lambda: MixtureForCausalLM(MixtureConfig(**SIZES, num_hidden_layers=6, mlp_layer_types=LATE)),
        [[0, 1, 4]],
    ),
    "every third sparse": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES,
                **{"num_hidden_layers": 6, "decoder_sparse_step": 3, "num_key_value_heads": 2, "head_dim": 4},
                **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
            )
        ),
        [[0, 1, 2]],
    ),
    "two sides": (
        lambda: NllbMoeForConditionalGeneration(
            NllbMoeConfig(**NLLB, encoder_attention_heads=2, decoder_attention_heads=2)
        ),
        [[0, 1, 3], [0, 1, 2]],
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    build, kept = MODELS[request.param]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    train_tokenizer(["some text"], vocab_size=270).save_pretrained(tmp_path)
    return str(tmp_path), kept


def stacks(model):
    sides = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.model]
    return [side.layers for side in sides]


def test_the_first_layers_and_one_of_each_further_kind_are_kept_as_they_were(saved):
    folder, kept = saved
    whole, (few, _) = load_base(folder)[0], load_few_layers(folder)
    for before, after, places in zip(stacks(whole), stacks(few), kept, strict=True):
        assert len(after) == len(places)
        for layer, place in zip(after, places, strict=True):
            own, original = layer.state_dict(), before[place].state_dict()
            assert own.keys() == original.keys()
            assert all(torch.equal(own[name], original[name]) for name in own)
    ids = torch.arange(10).view(2, 5)
    more = {"decoder_input_ids": ids} if few.config.is_encoder_decoder else {}
    assert few(input_ids=ids, use_cache=True, **more).logits.isfinite().all()
    assert few.config.num_hidden_layers == len(kept[0])


def test_only_the_layers_that_are_used_are_chosen_among(saved):
    folder, _ = saved
    few, _ = load_few_layers(folder, num_layers=1)
    assert all(len(stack) == 1 for stack in stacks(few))
