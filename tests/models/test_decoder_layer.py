"""Attention of other models: a dense decoder with it is that model, whole, cached and to disk and back."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixtura.models import MixtureConfig, MixtureForCausalLM

IDS_BL = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
SOURCES = {
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "mistral, window": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen2, window": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, **WINDOW)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
    "qwen3, window": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8, **WINDOW)),
}


def pair(name):
    """The transformers model with random biases, and ours with its weights."""
    cls, config = SOURCES[name]
    torch.manual_seed(0)
    source = cls(config).eval()
    for parameter in source.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    fields = {key: getattr(config, key) for key in (*SHAPE, "sliding_window", "rope_parameters")}
    fields |= {key: getattr(config, key) for key in ("head_dim", "layer_types") if hasattr(config, key)}
    ours = MixtureForCausalLM(MixtureConfig(**fields, attention=config.model_type, gated=True)).eval()
    ours.load_state_dict(source.state_dict(), strict=True)
    return source, ours


@pytest.mark.parametrize("name", SOURCES)
def test_a_dense_decoder_with_a_models_attention_is_that_model(name):
    source, ours = pair(name)
    assert torch.equal(ours(IDS_BL).logits, source(IDS_BL).logits)
    mask_BL = torch.ones_like(IDS_BL).index_fill(1, torch.arange(3), 0)
    assert torch.equal(ours(IDS_BL, mask_BL).logits[:, 3:], source(IDS_BL, mask_BL).logits[:, 3:])


@pytest.mark.parametrize("name", SOURCES)
def test_generation_with_any_cache_is_that_of_the_model(name):
    source, ours = pair(name)
    expected = source.generate(IDS_BL, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(IDS_BL, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(ours.generate(IDS_BL, max_new_tokens=6, do_sample=False, use_cache=False), expected)


@pytest.mark.parametrize("name", ["mistral, window", "qwen3, window"])
def test_a_model_with_a_window_comes_back_from_disk(name, tmp_path):
    _, ours = pair(name)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention_kinds() == ours.config.attention_kinds()
    assert torch.equal(loaded(IDS_BL).logits, ours(IDS_BL).logits)


def test_attention_weights_are_recorded_whosever_they_are():
    for name in ("mistral", "qwen3"):
        _, ours = pair(name)
        ours.set_attn_implementation("eager")
        recorded = ours(IDS_BL, output_attentions=True).attentions
        assert len(recorded) == 3
        assert_close(recorded[0].sum(-1), torch.ones(2, 4, 9))


def test_the_window_limits_what_a_token_sees():
    _, ours = pair("mistral, window")
    changed_BL = IDS_BL.clone()
    changed_BL[:, 0] = (changed_BL[:, 0] + 1) % 64
    moved = (ours.model(IDS_BL).last_hidden_state != ours.model(changed_BL).last_hidden_state).any(-1).any(0)
    # Each layer reaches 3 tokens back: three of them see all 9 tokens, two the last 7.
    assert moved.tolist() == [True] * 9
    ours.model.layers = ours.model.layers[:2]
    ours.config.num_hidden_layers = 2
    moved = (ours.model(IDS_BL).last_hidden_state != ours.model(changed_BL).last_hidden_state).any(-1).any(0)
    assert moved.tolist() == [True] * 7 + [False] * 2


def test_plain_configurations_are_as_before(tmp_path):
    config = MixtureConfig()
    assert config.attention == "llama" and not hasattr(config, "layer_types")
    config.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "layer_types")


@pytest.mark.parametrize("biased", [False, True], ids=["without biases", "with biases"])
def test_llamas_attention_may_have_a_window_too(biased, tmp_path):
    """Where a finished configuration is changed, as transformers' own tests do, and where it is read from disk."""
    config = MixtureConfig(**SHAPE, gated=True, attention_bias=biased)
    config.sliding_window = 4
    model = MixtureForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention == ("llama" if biased else "mistral")
    assert torch.equal(loaded(IDS_BL).logits, model(IDS_BL).logits)
    for implementation in ("sdpa", "eager"):
        one_layer = SHAPE | {"num_hidden_layers": 1, "attention_bias": biased}
        shallow = MixtureForCausalLM(MixtureConfig(**one_layer, sliding_window=4)).eval()
        shallow.set_attn_implementation(implementation)
        near, far = (shallow(ids).logits for ids in (IDS_BL, IDS_BL.index_fill(1, torch.tensor([0]), 5)))
        assert torch.equal(near[:, 4:], far[:, 4:]) and not torch.equal(near[:, 3], far[:, 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "gpt2"}, "attention is 'gpt2': it must be one of llama, mistral, qwen2, qwen3"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is"),
    ],
)
def test_attention_that_does_not_exist_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MixtureConfig(**fields)
