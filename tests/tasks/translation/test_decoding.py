"""Decoding: the same for a sentence whatever its batch, within its limits, and told of experts."""

import pytest
import torch

from mixtura.config import UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.tasks.translation import decoding
from mixtura.tasks.translation.decoding import ExampleRouting, decode
from mixtura.tasks.tuning import inference_modes, running

PROMPTS = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 4, 7, 5, 3)]
DIRECTIONS = [0, 1, 2, 0, 1, 2]
FAMILIES = {
    "dense": {},
    "token_choice": {},
    "mixture_of_tokens": {},
    "by language": {"route_by": "target", "num_experts": 3, "num_experts_per_tok": 1, "num_shared_experts": 1},
}


def build(family):
    torch.manual_seed(0)
    kind = "token_choice" if family == "by language" else family
    config = MixtureConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        moe_intermediate_size=16,
        mlp_layer_types=["dense", kind],
        initializer_range=0.4,
        tie_word_embeddings=False,
        **({"num_experts": 4, "group_size": 4, "num_experts_per_tok": 2} | FAMILIES[family]),
    )
    routing = ExampleRouting((0, 1, 2)) if family == "by language" else ExampleRouting()
    return MixtureForCausalLM(config).eval(), {"routing": routing, "max_length": 24, "pad": 0, "eos": 2}


@pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_translation_does_not_depend_on_its_batch(family, num_beams, monkeypatch):
    model, how = build(family)
    together = decode(model, PROMPTS, directions=DIRECTIONS, num_beams=num_beams, **how)
    alone = [
        decode(model, [prompt], directions=[direction], num_beams=num_beams, **how)[0]
        for prompt, direction in zip(PROMPTS, DIRECTIONS, strict=True)
    ]
    assert together == alone and len(set(map(tuple, together))) > 3
    monkeypatch.setattr(decoding, "BATCH_TOKENS", 12)
    backwards = decode(model, PROMPTS[::-1], directions=DIRECTIONS[::-1], num_beams=num_beams, **how)
    assert backwards[::-1] == together


def test_greedy_tokens_are_those_of_the_plain_definition():
    model, how = build("dense")
    for prompt, output in zip(PROMPTS, decode(model, PROMPTS, directions=DIRECTIONS, **how), strict=True):
        ids = list(prompt)
        while len(ids) < min(24, 3 * len(prompt) + 16):
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == 2:
                break
            ids.append(best)
        assert ids[len(prompt) :] == output


@pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beams"])
def test_a_model_whose_weights_are_no_numbers_is_named(num_beams):
    model, how = build("dense")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="gives no finite probabilities"):
        decode(model, PROMPTS[:2], directions=DIRECTIONS[:2], num_beams=num_beams, **how)


def test_the_language_names_the_expert_that_translates():
    model, how = build("by language")
    first, second = (decode(model, PROMPTS, directions=[d] * 6, **how) for d in (0, 1))
    assert first != second


def test_running_puts_everything_back():
    model, _ = build("mixture_of_tokens")
    layer = model.model.layers[1].mlp
    model.train()
    layer.set_inference_mode("alone", top_k=3)
    assert inference_modes(model) == ("group", "alone") and inference_modes(build("dense")[0]) == ("causal",)
    with running(model, "group"):
        assert (layer.inference_mode, model.training, torch.is_grad_enabled()) == ("group", False, False)
    assert (layer.inference_mode, layer.alone_top_k, model.training) == ("alone", 3, True) and torch.is_grad_enabled()
