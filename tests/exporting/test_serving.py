"""Folders made ready to answer token by token, by the functions and by the verbs."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mixtura import cli
from mixtura.config import UserError
from mixtura.data.prepare import train_tokenizer
from mixtura.exporting.serving import Calibrated, calibrate, transition
from mixtura.models import MixtureForCausalLM


@pytest.fixture
def save(tiny_config, tiny_corpus, tmp_path):
    def make(family="mixture_of_tokens", **changes):
        torch.manual_seed(0)
        tokenizer = train_tokenizer(tiny_corpus, vocab_size=300)
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "initializer_range": 0.3}
        model = MixtureForCausalLM(tiny_config(family, **(sizes | changes))).eval()
        model.save_pretrained(tmp_path / "before")
        tokenizer.save_pretrained(tmp_path / "before")
        return model, tmp_path / "before", tmp_path / "after"

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mixtura", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, "".join(capsys.readouterr())

    return run


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


IDS_BL = torch.arange(3, 27).view(4, 6)


@pytest.mark.parametrize("group_over", ["batch", "sequence"])
def test_a_calibrated_folder_answers_with_the_averages_of_its_text(save, tiny_text, group_over):
    model, before, after = save(group_over=group_over)
    seen = calibrate(before, after, tiny_text, max_sequences=32)
    assert seen == Calibrated(after, layers=1, sequences=32, groups=32 * 16 // 4)
    loaded = load(after)
    assert (loaded.config.inference_mode, loaded.config.alone_top_k) == ("population", 2)
    population = loaded.mixture_of_tokens_layers()[0].population
    assert population.updates == 2 and (population.mean != 0).any()
    with torch.no_grad():
        assert not torch.allclose(loaded(IDS_BL).logits, model(IDS_BL).logits)
    assert load(before).config.population is False


def test_a_converted_folder_loads_as_any_other(save, tiny_text):
    _, before, after = save(mixtures_per_expert=2, population=True)
    converted = transition(before, after, to="token_choice", text=tiny_text)
    loaded = load(after)
    assert loaded.config.mlp_layer_types == ["dense", "token_choice"] and loaded.config.num_experts == 8
    assert loaded.config.num_experts_per_tok == 2  # as many as it got alone
    assert_close(loaded(IDS_BL).logits, converted.model(IDS_BL).logits)


def test_a_folder_that_goes_over_to_alone_trains_as_it_answered(save):
    model, before, after = save()
    transition(before, after, to="alone")
    loaded = load(after).train()
    with torch.no_grad():
        assert_close(loaded(IDS_BL).logits, model(IDS_BL).logits)
    assert (loaded.config.zero_fill, loaded.config.inference_mode) == (1.0, "alone")


def test_the_verbs_say_what_they_wrote_and_what_they_wrote_generates(run, save, tiny_text, tmp_path):
    _, before, after = save()
    code, text = run("calibrate", before, after, "--text", tiny_text)
    assert code == 0 and "1 layers keep averages" in text and f"Model: {after}" in text
    code, text = run("evaluate", after, "--text", tiny_text, "--batch-size", 8)
    assert code == 0 and "population" in text
    code, text = run("transition", after, tmp_path / "choice", "--to", "token_choice", "--text", tiny_text)
    assert code == 0 and "Layers: token_choice, 2 of 4 experts a token." in text
    code, text = run("transition", after, tmp_path / "alone", "--to", "alone", "--top-k", 1)
    assert code == 0 and "Layers: alone, 1 of 4 experts a token." in text
    for folder in ("choice", "alone"):
        assert run("generate", tmp_path / folder, "the", "--max-new-tokens", 3)[0] == 0


def test_a_users_mistake_is_one_sentence_and_nothing_is_written(run, save, tiny_text, tmp_path):
    _, before, after = save()
    short = tmp_path / "short.txt"
    short.write_text("the film " * 20)
    cases = [
        (("transition", before, after, "--to", "token_choice"), "give one with --text"),
        (("transition", before, after, "--to", "alone", "--text", tiny_text), "leave --text out"),
        (("transition", before, after, "--to", "alone", "--top-k", 9), "cannot get 9 mixtures of the 4"),
        (("calibrate", before, after, "--text", short), "fewer than the 16 that fill whole groups"),
        (("calibrate", before, before, "--text", tiny_text), "is not empty: name a new folder"),
    ]
    for arguments, message in cases:
        code, text = run(*arguments)
        assert code == 2 and message in text, text
        assert not after.exists() and not list(tmp_path.glob(".new-*"))


def test_a_model_without_mixtures_of_tokens_is_named(save, tiny_text):
    _, before, after = save("token_choice")
    with pytest.raises(UserError, match="has no mixture-of-tokens layer: there is nothing to convert"):
        calibrate(before, after, tiny_text)
