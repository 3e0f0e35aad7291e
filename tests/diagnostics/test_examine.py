"""From a folder and texts to diagnosis.json and diagnosis.html, for every kind of model, and each mistake."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from mixtura.config import UserError
from mixtura.diagnostics.examine import diagnose_model, diagnose_texts, read_texts, write_diagnosis
from mixtura.diagnostics.excerpts import TOKEN_TYPES, batches, cut_excerpts, text_pieces, token_surfaces
from mixtura.diagnostics.findings import Diagnosis
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.results.json_form import from_plain

TEXTS = {"latin": ["the old house near the river, a quiet garden"] * 12, "other": ["1984 2001 77 <b> ... !? 33"] * 12}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
MODELS = [
    pytest.param(MixtureConfig(**SIZES, num_experts=4, mlp_layer_types=["dense", "token_choice"]), 1, id="ours"),
    pytest.param(
        MixtureConfig(
            **SIZES, num_experts=4, group_size=2, mlp_layer_types=["mixture_of_tokens"] * 2, inference_mode="group"
        ),
        2,
        id="mixture of tokens, saved in groups",
    ),
    pytest.param(MixtralConfig(**SIZES, num_local_experts=4), 2, id="Mixtral"),
    pytest.param(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
        2,
        id="Qwen3-MoE",
    ),
    pytest.param(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2), 2, id="OLMoE"),
]


@pytest.mark.parametrize(("config", "routed"), MODELS)
def test_a_folder_becomes_a_page_and_its_numbers(
    save_model: Callable[[Any], Path], tmp_path: Path, config: Any, routed: int
) -> None:
    found = diagnose_texts(save_model(config), TEXTS, out=tmp_path / "out", max_tokens=300, command="mixtura diagnose")
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text(encoding="utf-8"))
    assert from_plain(Diagnosis, stored) == found
    assert sorted(os.listdir(tmp_path / "out")) == ["diagnosis.html", "diagnosis.json"]
    assert (found.schema_version, found.command, len(found.layers)) == (2, "mixtura diagnose", routed)
    for layer in found.layers:
        assert len(layer.share) == len(layer.typical_tokens) == len(layer.load.share) == 4
        assert all(sum(row[g] for row in layer.share) == pytest.approx(1) for g in range(2))
        assert 0 <= layer.corrected <= layer.mutual_information <= layer.max_bits + 1e-9
    for sample in found.samples:
        assert [len(layer) for layer in sample.experts] == [len(sample.pieces)] * routed
    assert found.leaks.probed and found.leaks.future is found.leaks.batch is False
    assert found.verdict.headline in (tmp_path / "out" / "diagnosis.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )


def test_amounts_and_kinds_of_tokens_are_counted(make_diagnosis: Callable[..., Diagnosis]) -> None:
    found = make_diagnosis(texts={"words": ["a house"] * 30, "numbers": ["7 7"] * 20})
    words, numbers = found.groups
    assert (words.name, words.excerpts, numbers.excerpts) == ("words", 30, 20)
    assert numbers.token_types[TOKEN_TYPES.index("digits")] == 40
    assert sum(words.token_types) == words.tokens
    assert sum(map(sum, found.layers[0].rows)) == 2 * (words.tokens + numbers.tokens)
    assert found.layers[0].rows_per_token == 2


def test_dense_models_say_that_nothing_is_routed(save_model: Callable[[Any], Path], tmp_path: Path) -> None:
    found = diagnose_texts(save_model(LlamaConfig(**SIZES)), TEXTS, out=tmp_path, max_tokens=100)
    assert found.verdict.headline.startswith("This model routes nothing")
    assert (found.layers, found.leaks.future) == ([], False)
    page = (tmp_path / "diagnosis.html").read_text(encoding="utf-8")
    assert len(page) < 100_000  # without plotly, which would have nothing to draw
    assert "No token" in page


def test_models_whose_tokens_compete_say_so(make_diagnosis: Callable[..., Diagnosis]) -> None:
    found = make_diagnosis("expert_choice")
    assert "compete" in found.verdict.headline
    assert found.leaks.batch
    assert any("not reproducible" in caution for caution in found.cautions)


def test_a_layer_that_divides_the_texts_is_named(make_diagnosis: Callable[..., Diagnosis]) -> None:
    found = make_diagnosis()
    place = found.verdict.layer
    assert found.layers[place].corrected == max(layer.corrected for layer in found.layers)
    assert found.verdict.headline.startswith(f"Layer {found.layers[place].layer}'s experts carry 0.")
    assert "bits about the text; chance gives" in found.verdict.headline


def test_texts_that_are_alike_are_not_told_apart(make_diagnosis: Callable[..., Diagnosis]) -> None:
    text = ["the old house stands near the long river", "the garden is quiet in winter"] * 10
    found = make_diagnosis(texts={"one": text, "two": text})
    assert "better than chance" in found.verdict.headline


def test_few_excerpts_and_single_texts_are_cautioned(make_diagnosis: Callable[..., Diagnosis]) -> None:
    assert any(
        "fewer than 10 excerpts of b" in c for c in make_diagnosis(texts={"a": ["x y"] * 10, "b": ["z"]}).cautions
    )
    single = make_diagnosis(texts={"a": ["the garden, 7"] * 20})
    assert "about the kind of token" in single.verdict.headline
    assert single.verdict.sentences[0].startswith("One text was given")


def test_the_model_is_left_as_it_was(tiny_config: Callable[..., MixtureConfig], small_tokenizer: Any) -> None:
    config = tiny_config("mixture_of_tokens", vocab_size=len(small_tokenizer), inference_mode="group")
    model = MixtureForCausalLM(config).train()
    diagnose_model(model, small_tokenizer, TEXTS, name="x", max_tokens=60)
    assert model.training
    assert model.config.inference_mode == "group"
    assert not any(module._forward_hooks for module in model.modules())


def test_characters_that_are_split_over_tokens_are_shown_once(small_tokenizer: Any) -> None:
    ids = small_tokenizer("\N{SNOWMAN} x")["input_ids"]
    pieces = text_pieces(small_tokenizer, ids, token_surfaces(small_tokenizer, ids))
    assert pieces == ["", "", "\N{SNOWMAN}", " ", "x"] or pieces == ["", "", "\N{SNOWMAN}", " x"]


def test_excerpts_are_cut_and_limited(small_tokenizer: Any) -> None:
    cut = cut_excerpts(small_tokenizer, {"a": ["7 7 7 7 7 7"], "b": ["7"] * 9}, length=4, max_tokens=7)
    assert [len(ids) for ids in cut.ids] == [4, 3] + [1] * 7
    assert cut.group == [0, 0] + [1] * 7


def test_named_experts_get_their_index(small_tokenizer: Any) -> None:
    class Named:
        device = torch.device("cpu")
        config = type("Config", (), {"route_by": "target", "expert_names": ["de", "fr", "it"]})

    cut = cut_excerpts(small_tokenizer, {"it": ["a b"], "de": ["c"]}, length=8, max_tokens=8)
    ((inputs, group_B, mask_BL),) = batches(Named(), small_tokenizer, cut, 4)  # pyright: ignore[reportArgumentType]
    assert inputs["expert_ids"].tolist() == [2, 0]
    assert group_B.tolist() == [0, 1]
    assert mask_BL.sum(1).tolist() == [len(ids) for ids in cut.ids]
    stray = cut_excerpts(small_tokenizer, {"xx": ["a"]}, length=8, max_tokens=8)
    with pytest.raises(UserError, match="none is called 'xx'"):
        list(batches(Named(), small_tokenizer, stray, 4))  # pyright: ignore[reportArgumentType]


def test_texts_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("Ein Haus.\n\nEin Garten.", encoding="utf-8")
    assert read_texts([f"de={tmp_path / 'de.txt'}"]) == {"de": ["Ein Haus.", "Ein Garten."]}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["german.txt"], "names no text"),
        (["=german.txt"], "names no text"),
        (["de="], "names no text"),
        (["de=missing.txt"], "missing.txt"),
    ],
)
def test_texts_that_cannot_be_read_are_said(sources: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_texts(sources)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="'de' comes twice"):
        read_texts([f"de={tmp_path / 'a.txt'}"] * 2)


def test_what_cannot_be_diagnosed_is_one_sentence(
    save_model: Callable[[Any], Path], small_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no model folder"):
        diagnose_texts(tmp_path / "nowhere", TEXTS, out=tmp_path / "out")
    folder = save_model(LlamaConfig(**SIZES))
    for texts, message in (({}, "There is no text"), ({"a": []}, "'a' is empty"), ({"a": [""]}, "'a' is empty")):
        with pytest.raises(UserError, match=message):
            diagnose_texts(folder, texts, out=tmp_path / "out")
    with pytest.raises(UserError, match="0 tokens of each text"):
        diagnose_texts(folder, TEXTS, out=tmp_path / "out", max_tokens=0)
    assert not (tmp_path / "out").exists()


def test_files_are_whole_or_not_there(make_diagnosis: Callable[..., Diagnosis], tmp_path: Path) -> None:
    found = make_diagnosis(texts={"a": ["a b"] * 3})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_diagnosis(found, tmp_path / "file" / "below")
    layers = [dataclasses.replace(found.layers[0], corrected=float("nan")), *found.layers[1:]]
    found = dataclasses.replace(found, layers=layers)
    with pytest.raises(ValueError, match="JSON"):
        write_diagnosis(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "mode"),
    [
        ("dense", {}, "causal"),
        ("token_choice", {}, "causal"),
        ("expert_choice", {}, "group"),
        ("soft", {}, "group"),
        ("mixture_of_tokens", {"inference_mode": "alone"}, "alone"),
        ("mixture_of_tokens", {"inference_mode": "group"}, "alone"),
        ("mixture_of_tokens", {"inference_mode": "population", "population": True}, "population"),
    ],
)
def test_the_mode_that_is_recorded_is_the_one_the_model_ran_in(
    make_diagnosis: Callable[..., Diagnosis], family: str, changes: dict[str, Any], mode: str
) -> None:
    assert make_diagnosis(family, **changes).model.mode == mode
