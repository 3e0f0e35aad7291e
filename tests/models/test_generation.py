"""Generation token by token: the cache changes nothing, and what cannot be generated is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.config import UserError
from mixtura.data.prepare import train_tokenizer
from mixtura.models import MixtureForCausalLM
from mixtura.models.generation import generate_text
from mixtura.models.loading import load_model

DEPLOYABLE = [
    pytest.param("dense", {}, id="dense"),
    pytest.param("token_choice", {}, id="token choice"),
    pytest.param(
        "token_choice",
        {"copy_experts": 2, "constant_experts": 1, "latent_size": 8, "num_experts_per_tok": 3},
        id="free and latent experts",
    ),
    pytest.param("expert_threshold", {}, id="expert threshold"),
    pytest.param("remoe", {"num_shared_experts": 1}, id="remoe"),
    pytest.param("merged_experts", {"segment_length": 3, "num_shared_experts": 1}, id="merged experts"),
    pytest.param("merged_experts", {"segment_length": 2, "merge_by": "prefix"}, id="merged by all before"),
    pytest.param("mixture_of_tokens", {"num_shared_experts": 1}, id="mixture of tokens and a shared expert"),
    pytest.param("mixture_of_tokens", {"alone_top_k": None}, id="mixture of tokens alone"),
    pytest.param("mixture_of_tokens", {"alone_top_k": 2}, id="mixture of tokens alone, top 2"),
]


@pytest.fixture
def build(tiny_config):
    def make(family, **changes):
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
        # A tied, untrained model repeats its last token, which would hide a fault of the cache.
        special |= {"tie_word_embeddings": False}
        return MixtureForCausalLM(tiny_config(family, **(special | changes))).eval()

    return make


@pytest.fixture
def saved(build, tiny_corpus, tmp_path):
    """A factory of folders with a model and its tokenizer."""

    def make(family, **changes):
        tokenizer = train_tokenizer(tiny_corpus, vocab_size=300)
        build(family, vocab_size=len(tokenizer), **changes).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


def continue_greedily(model, ids_BL, **options):
    return model.generate(ids_BL, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize(("family", "changes"), DEPLOYABLE)
def test_greedy_text_is_the_same_with_and_without_a_cache(build, family, changes):
    model, ids_BL = build(family, **changes), torch.randint(3, 64, (3, 5))
    without = continue_greedily(model, ids_BL, use_cache=False)
    assert without.shape == (3, 13) and len(without[:, 5:].unique()) > 3
    for options in ({"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(continue_greedily(model, ids_BL, **options), without)


@pytest.mark.parametrize("merge_by", ["segment", "prefix"])
def test_merged_experts_remember_which_beam_is_which(build, merge_by):
    model, ids_BL = build("merged_experts", segment_length=2, merge_by=merge_by), torch.randint(3, 64, (2, 5))
    first, second = (continue_greedily(model, ids_BL, num_beams=3, use_cache=cached) for cached in (True, False))
    assert torch.equal(first, second)


def test_merged_experts_take_no_token_back(build):
    model, ids_BL = build("merged_experts"), torch.randint(3, 64, (1, 5))
    cache = model(ids_BL, use_cache=True).past_key_values
    with pytest.raises(UserError, match="Merged experts cannot take tokens back"):
        cache.crop(-1)


@pytest.mark.parametrize(("family", "changes"), DEPLOYABLE)
def test_prompts_of_different_lengths_go_together_when_padded_left(build, family, changes):
    model, ids_BL = build(family, **changes), torch.randint(3, 64, (2, 6))
    padded_BL = ids_BL.clone()
    padded_BL[0, :2] = 0
    alone = [continue_greedily(model, ids_BL[:1, 2:])[0, 4:], continue_greedily(model, ids_BL[1:])[0, 6:]]
    mask_BL = padded_BL.ne(0).long()
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        together = continue_greedily(model, padded_BL, attention_mask=mask_BL, **options)
        assert torch.equal(together[:, 6:], torch.stack(alone)), options


def test_generating_never_forms_groups_unless_told(build, monkeypatch):
    model, ids_BL = build("mixture_of_tokens"), torch.randint(3, 64, (4, 5))

    def refuse(*_):
        raise AssertionError("a group was formed")

    monkeypatch.setattr(type(model.mixture_layers()[0]), "_run_groups", refuse)
    continue_greedily(model, ids_BL)
    model.set_inference_mode("group")
    with pytest.raises(AssertionError, match="a group was formed"):
        continue_greedily(model, ids_BL)


def test_text_goes_on_from_the_prompt_and_depends_on_the_seed_only_when_sampling(saved):
    folder = saved("token_choice")
    greedy = [generate_text(folder, "the film", max_new_tokens=12, temperature=0.0, seed=seed) for seed in (0, 1)]
    sampled = [generate_text(folder, "the film", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert all(text.startswith("the film") and len(text) > len("the film") for text in greedy + sampled)
    assert greedy[0] == greedy[1] and sampled[0] == sampled[1] != sampled[2]


def test_the_temperature_of_routers_is_none_of_sampling(saved):
    folder = saved("mixture_of_tokens", router_temperature=0.25)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert settings.get("temperature") is None
    for _ in range(2):
        model = MixtureForCausalLM.from_pretrained(folder)
        assert model.generation_config.temperature is None
        assert model.config.router_temperature == model.mixture_of_tokens_layers()[0].temperature == 0.25
        (folder / "generation_config.json").unlink(missing_ok=True)


def test_the_older_name_of_the_temperature_of_routers_is_read(saved):
    folder = saved("mixture_of_tokens", router_temperature=0.25)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["temperature"] = settings.pop("router_temperature")
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = MixtureForCausalLM.from_pretrained(folder).config
    assert config.router_temperature == 0.25 and "temperature" not in config.to_dict()


def test_a_temperature_of_sampling_that_a_user_has_set_is_kept(saved):
    folder = saved("mixture_of_tokens", router_temperature=0.25)
    model = MixtureForCausalLM.from_pretrained(folder)
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.save_pretrained(folder)
    assert MixtureForCausalLM.from_pretrained(folder).generation_config.temperature == 0.7


def test_a_model_folder_loads_ready_for_inference(saved):
    folder = saved("mixture_of_tokens")
    model, tokenizer = load_model(folder)
    assert not model.training and model.config.inference_mode == "alone"
    assert tokenizer.decode(tokenizer("a quiet night")["input_ids"], skip_special_tokens=True) == "a quiet night"


@pytest.mark.parametrize("family", ["expert_choice", "soft"])
def test_families_that_look_ahead_are_refused(saved, family):
    with pytest.raises(UserError, match=f"A model with {family} layers cannot generate"):
        generate_text(saved(family), "the film", max_new_tokens=2, temperature=0.0, seed=0)


def test_an_empty_prompt_is_refused(saved):
    with pytest.raises(UserError, match="The prompt is empty"):
        generate_text(saved("dense"), "", max_new_tokens=2, temperature=0.0, seed=0)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="is no model folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json' is damaged .* copy or train the model again"):
        load_model(tmp_path)


def test_damaged_weights_are_reported_in_one_sentence(saved):
    folder = saved("dense")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)
    with pytest.raises(Exception):  # noqa: B017 (whatever transformers raises, it is no UserError)
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("temperature", [1e-40, 1e-4, 1e4, math.inf])
def test_a_temperature_beyond_the_range_of_its_arithmetic_is_refused(saved, temperature):
    with pytest.raises(UserError, match=r"temperature is .*: give 0 .*, or 0\.001 to 1000"):
        generate_text(saved("dense"), "the film", max_new_tokens=2, temperature=temperature, seed=0)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_ends_of_the_temperature_range_work(saved, temperature):
    text = generate_text(saved("dense"), "the film", max_new_tokens=2, temperature=temperature, seed=0)
    assert text.startswith("the film")
