"""The receipt: what counts as the same, what an engine may do wrong, and what is said of one that is not there."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtura.cli import main
from mixtura.config import UserError
from mixtura.exporting import engines
from mixtura.exporting.engines import Engine, Ran, load_causal, model_log_probs, parse_engine, run_engine
from mixtura.exporting.stock_folder import export
from mixtura.exporting.verification import (
    PROBE_TOKENS,
    Comparison,
    Receipt,
    largest_difference,
    probe_tokens,
    verify,
    write_dense_twin,
)
from mixtura.models import MixtureConfig
from mixtura.models.transition import to_token_choice

# A script in an engine's place: every token of a vocabulary of SIZE is as likely.
UNIFORM = """
import json, math, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
request, answer = map(Path, sys.argv[1:])
probes = json.loads(request.read_text())["probes"]
save_file({str(i): np.full((len(p), SIZE), -math.log(SIZE), np.float32) for i, p in enumerate(probes)}, answer)
answer.with_name("version.json").write_text('"0.1"')
"""


@pytest.fixture
def exported(saved, tmp_path):
    export(saved(), tmp_path / "out", to="mixtral", check=False)
    return tmp_path / "source", tmp_path / "out"


def cut(folder):
    """A copy that broke off."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def verify_on_the_command_line(monkeypatch, capsys, *folders):
    monkeypatch.setattr("sys.argv", ["mixtura", "verify", *map(str, folders)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err.strip()


def test_a_source_that_was_cut_is_one_sentence(exported, monkeypatch, capsys):
    cut(exported[0])
    code, told = verify_on_the_command_line(monkeypatch, capsys, *exported)
    assert code == 2 and "\n" not in told
    assert told.startswith(f"mixtura: The model in '{exported[0]}' cannot be loaded (")


def test_an_export_that_was_cut_fails_in_one_sentence(exported, monkeypatch, capsys):
    cut(exported[1])
    code, told = verify_on_the_command_line(monkeypatch, capsys, *exported)
    assert code == 1 and "\n" not in told and told.startswith("mixtura: transformers cannot run it (")


def test_a_tokenizer_that_was_cut_is_one_sentence(exported, monkeypatch, capsys):
    (exported[0] / "tokenizer_config.json").write_text("{", encoding="utf-8")
    code, told = verify_on_the_command_line(monkeypatch, capsys, *exported)
    assert code == 2 and told.startswith(f"mixtura: The tokenizer in '{exported[0]}' cannot be loaded (")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Puts a script in vLLM's place."""

    def put(text):
        (tmp_path / "fake.py").write_text(textwrap.dedent(text))
        monkeypatch.setitem(engines._SCRIPTS, "vllm", tmp_path / "fake.py")

    return put


@pytest.fixture
def engine(monkeypatch):
    """Puts transformers in vLLM's place, whose log-probabilities come out multiplied by a function of the folder."""

    def put(factor):
        def run(_, folder, probes):
            exact = model_log_probs(load_causal(folder), probes)
            return Ran([factor(folder) * log_probs for log_probs in exact], "0.1")

        monkeypatch.setitem(engines.ENGINES, "vllm", run)

    return put


def change_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.block_sparse_moe.experts.0.w2.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_largest_difference_is_over_all_probes_and_a_number_that_is_none_is_infinite():
    one, other = [torch.zeros(2, 2), torch.zeros(1, 2)], [torch.zeros(2, 2), torch.tensor([[0.25, -0.5]])]
    assert largest_difference(one, other) == 0.5
    assert largest_difference(one, [torch.zeros(2, 2), torch.tensor([[float("nan"), 0.0]])]) == float("inf")
    assert largest_difference(one, [torch.zeros(2, 2), torch.zeros(1, 3)]) == float("inf")


def test_log_probabilities_are_those_of_the_next_token_whatever_the_batch(exported):
    model, probes = load_causal(exported[0]), [[5, 6, 7, 8], [9, 10]]
    alone, batched = model_log_probs(model, probes), model_log_probs(model, probes, batched=True)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits[0]
    torch.testing.assert_close(alone[0], logits.double().log_softmax(-1))
    assert [tuple(found.shape) for found in batched] == [(4, 64), (2, 64)]
    assert largest_difference(alone, batched) < 1e-4


def test_probes_are_texts_and_random_tokens_always_the_same(saved, with_tokenizer):
    folder = saved(vocab_size=300)
    config = MixtureConfig.from_pretrained(folder)
    assert len(probe_tokens(folder, config)) == 4
    probes = probe_tokens(with_tokenizer(folder), config)
    assert len(probes) == 12 and probes == probe_tokens(folder, config)
    assert all(1 < len(probe) <= PROBE_TOKENS and max(probe) < 300 for probe in probes)


@pytest.mark.parametrize(("window", "longest"), [(8, 24), (24, 48), (100, 124), (120, 128), (5000, 24), (None, 24)])
def test_one_probe_is_longer_than_a_window_where_positions_allow(saved, window, longest):
    config = MixtureConfig.from_pretrained(saved(attention="mistral", sliding_window=window))
    probes = probe_tokens(Path("nowhere"), config)
    assert config.max_position_embeddings == 128 and max(map(len, probes)) == longest


def test_a_window_that_the_export_lost_is_noticed(saved, tmp_path):
    source = saved(attention="mistral", sliding_window=30)
    export(source, tmp_path / "out", to="mixtral")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings | {"sliding_window": None}))
    assert not verify(source, tmp_path / "out").passed


def test_a_right_export_passes_and_leaves_a_receipt_and_a_table(exported):
    receipt = verify(*exported)
    assert receipt.passed and not receipt.complaint()
    written = json.loads((exported[1] / "receipt.json").read_text())
    assert written["passed"] is True and written["tokens"] == 4 * PROBE_TOKENS
    assert written["comparisons"][0]["status"] == "same"
    assert written["comparisons"][0]["max_difference"] < 1e-4
    assert receipt.table() in (exported[1] / "README.md").read_text()
    again = verify(*exported)
    assert again.table() in (exported[1] / "README.md").read_text()
    assert (exported[1] / "README.md").read_text().count("| transformers ") == 1


def test_a_wrong_one_fails_and_says_by_how_much(exported):
    change_a_weight(exported[1])
    receipt = verify(*exported)
    assert not receipt.passed and receipt.comparisons[0].status == "differs"
    assert "In transformers log-probabilities differ by up to" in receipt.complaint()
    assert json.loads((exported[1] / "receipt.json").read_text())["passed"] is False


def test_an_engine_is_judged_by_its_noise_on_a_dense_model(exported, engine):
    engine(lambda folder: 1.0)
    comparison = verify(*exported, [Engine("vllm")]).comparisons[0]
    assert (comparison.status, comparison.version, comparison.same_choice) == ("same", "0.1", 1.0)
    assert comparison.noise_floor == 0.0
    # One that is as wrong with a dense model has no better numbers to give, and passes.
    engine(lambda folder: 1.001)
    comparison = verify(*exported, [Engine("vllm")]).comparisons[0]
    assert comparison.status == "same" and comparison.limit == 3 * comparison.noise_floor > 1e-3


def test_an_engine_that_is_wrong_with_this_model_alone_fails(exported, engine):
    engine(lambda folder: 1.01 if folder.name == "out" else 1.0)
    comparison = verify(*exported, [Engine("vllm")]).comparisons[0]
    assert comparison.status == "differs" and comparison.max_difference > comparison.limit == 1e-4


def test_noise_excuses_only_so_much(exported, engine):
    engine(lambda folder: 1.0 if folder.name == "out" else float("nan"))
    comparison = verify(*exported, [Engine("vllm")]).comparisons[0]
    assert comparison.noise_floor == float("inf") and comparison.limit == 0.05
    engine(lambda folder: 1.1)
    assert verify(*exported, [Engine("vllm")]).comparisons[0].status == "differs"


def test_what_a_script_computes_in_another_process_comes_back(exported, script):
    script(UNIFORM.replace("SIZE", "64"))
    ran = run_engine(Engine("vllm", sys.executable), exported[1], [[1, 2, 3], [4, 5]])
    assert ran.version == "0.1" and [tuple(found.shape) for found in ran.log_probs] == [(3, 64), (2, 64)]
    assert (
        largest_difference(ran.log_probs, [torch.full((3, 64), 1 / 64).log(), torch.full((2, 64), 1 / 64).log()]) < 1e-6
    )


def test_an_engine_that_is_not_installed_was_not_tried_and_fails_nothing(exported):
    receipt = verify(*exported, [Engine("vllm", sys.executable)])
    assert receipt.comparisons[0].status == "not tried" and "vllm is not installed" in receipt.comparisons[0].reason
    assert receipt.passed and "not tried" in receipt.table()


def test_one_that_cannot_load_the_model_fails_with_its_own_words(exported, script):
    script("import sys\nprint('loading')\nraise ValueError('no such | architecture in /home/me/model.gguf')")
    receipt = verify(*exported, [Engine("vllm")])
    assert receipt.comparisons[0].status == "failed" and not receipt.passed
    assert receipt.complaint() == "vllm cannot run it (ValueError: no such | architecture in model.gguf)."
    assert "no such / architecture" in receipt.table()


def test_an_engine_with_another_vocabulary_fails(exported, script):
    script(UNIFORM.replace("SIZE", "60"))
    comparison = verify(*exported, [Engine("vllm")]).comparisons[0]
    assert comparison.status == "failed" and "(24, 60) where the source has (24, 64)" in comparison.reason


def test_missing_weights_are_no_model(exported):
    weights = load_file(exported[1] / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.gate.weight"]
    save_file(weights, exported[1] / "model.safetensors", metadata={"format": "pt"})
    comparison = verify(*exported).comparisons[0]
    assert comparison.status == "failed" and "model.layers.1" in comparison.reason


def test_the_dense_twin_has_the_first_expert_of_every_layer(saved, tmp_path):
    twin = write_dense_twin(saved(), tmp_path / "twin")
    assert twin is not None
    dense, mixture = load_causal(twin), load_causal(tmp_path / "source")
    assert dense.config.model_type == "llama"
    experts = mixture.model.layers[2].mlp.experts
    assert torch.equal(dense.model.layers[2].mlp.up_proj.weight, experts.gate_up_proj[0, 32:])
    assert torch.equal(dense.model.layers[2].mlp.down_proj.weight, experts.down_proj[0])
    assert torch.equal(dense.model.layers[2].self_attn.q_proj.weight, mixture.model.layers[2].self_attn.q_proj.weight)
    assert write_dense_twin(twin, tmp_path / "unused") == twin
    assert write_dense_twin(saved("relu", gated=False, hidden_act="relu"), tmp_path / "none") is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_mixture_of_tokens_reaches_a_stock_architecture_through_its_transition(saved, tmp_path):
    tokens = load_causal(saved(mlp_layer_types=["dense", "mixture_of_tokens", "mixture_of_tokens"]))
    converted = to_token_choice(tokens, [torch.randint(64, (4, 8))], top_k=2)
    converted.save_pretrained(tmp_path / "converted")
    assert export(tmp_path / "converted", tmp_path / "out").container == "qwen2_moe"


def test_a_receipt_without_an_engine_that_ran_says_so_in_its_table():
    receipt = Receipt("a", "b", 4, 96, (Comparison("vllm", "", "not tried", reason="vllm is not installed"),))
    assert receipt.passed
    assert receipt.table().splitlines()[-1] == "| vllm  |  |  |  |  | not tried: vllm is not installed |"


@pytest.mark.parametrize(("text", "words"), [("ollama", "no engine 'ollama'"), ("vllm=/no/python", "no Python")])
def test_engines_that_cannot_be_meant_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_engine(text)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mixtura", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_verbs_export_and_verify(saved, tmp_path, monkeypatch, capsys):
    source, out = saved(), tmp_path / "out"
    assert run(monkeypatch, "export", source, out, "--to", "granite_moe", "--base-model", "org/base") == 0
    assert f"Exported to {out} as granite_moe." in capsys.readouterr().out
    assert run(monkeypatch, "verify", source, out, "--with", "transformers", "--with", "vllm") == 0
    table = capsys.readouterr().out
    assert "| transformers " in table and "not tried: vllm is not installed" in table
    assert run(monkeypatch, "export", source, out) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert run(monkeypatch, "verify", source, out) == 1
    assert "In transformers log-probabilities differ by up to" in capsys.readouterr().err
    assert run(monkeypatch, "verify", tmp_path, out) == 2
