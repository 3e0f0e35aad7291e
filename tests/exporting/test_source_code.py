"""The remote-code folder: one file beside the configuration, equal to our own layers, and loaded without Mixtura."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mixtura.config import UserError
from mixtura.exporting.containers import check_standalone, remote_code
from mixtura.exporting.engines import EngineFailed, load_causal
from mixtura.exporting.stock_folder import export
from mixtura.models import MixtureConfig, MixtureForCausalLM, standalone
from mixtura.models.calibration import calibrate
from mixtura.models.standalone import MixturaForCausalLM

TOKENS = {"mlp_layer_types": ["mixture_of_tokens", "dense", "mixture_of_tokens"], "inference_mode": "alone"}
PLAIN = {"gated": False, "hidden_act": "relu", "norm_topk_prob": False}
MODELS = [
    TOKENS | PLAIN,
    TOKENS | PLAIN | {"alone_top_k": None},
    TOKENS | PLAIN | {"combine": "separate", "router_temperature": 0.5, "alone_top_k": 3, "mixtures_per_expert": 2},
    TOKENS | PLAIN | {"combine": "separate", "alone_top_k": None, "mixtures_per_expert": 2},
    TOKENS | {"hidden_act": "gelu", "num_shared_experts": 1},
    PLAIN | {"layer_mix": True},
    PLAIN | {"mlp_layer_types": ["dense"] * 3, "intermediate_sizes": [48, 32, 16], "tie_word_embeddings": False},
    {"num_shared_experts": 2, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "expert_bias_update_rate": 0.1},
]
CHILD = """
import sys
sys.path = [place for place in sys.path if not place.endswith(("mixtura", "src"))]
sys.modules["mixtura"] = None  # an import of it fails, wherever it is installed
import torch
from safetensors.torch import load_file, save_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = load_file(ids)["ids"]
with torch.no_grad():
    written = model.generate(ids[:1, :5], max_new_tokens=8, do_sample=False)
    save_file({"logits": model(ids).logits, "written": written}, out)
assert not [name for name in sys.modules if name.startswith("mixtura.")]
"""


def token_ids(rows=2):
    return torch.randint(64, (rows, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", MODELS)
def test_the_bundled_layers_compute_what_ours_do(saved, changes):
    source = saved(**changes)
    ours = MixtureForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    theirs = MixturaForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    assert set(theirs.state_dict()) == set(ours.state_dict())
    with torch.no_grad():
        assert_close(theirs(token_ids()).logits, ours(token_ids()).logits, rtol=0, atol=1e-6)
        # A single token takes another path through ours.
        assert_close(theirs(token_ids()[:1, :1]).logits, ours(token_ids()[:1, :1]).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"combine": "separate", "mixtures_per_expert": 2, "alone_top_k": None}])
def test_so_do_they_with_the_averages_of_a_population(saved, changes):
    source = saved(**(TOKENS | PLAIN | changes))
    ours = MixtureForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    calibrate(ours, [torch.randint(64, (8, 12)) for _ in range(3)])
    ours.set_inference_mode("population", top_k=ours.config.alone_top_k)
    ours.save_pretrained(source)
    theirs = MixturaForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    with torch.no_grad():
        assert_close(theirs(token_ids()).logits, ours(token_ids()).logits, rtol=0, atol=1e-6)


def test_the_temperature_of_routers_is_none_of_sampling(saved, tmp_path):
    source = saved(**(TOKENS | PLAIN | {"router_temperature": 0.5}))
    (source / "generation_config.json").unlink()
    export(source, tmp_path / "out", to="remote_code")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert settings.get("temperature") is None
    assert MixturaForCausalLM(MixtureConfig.from_pretrained(source)).generation_config.temperature is None


def test_padding_and_a_cache_change_nothing(saved):
    model = MixturaForCausalLM.from_pretrained(saved(**TOKENS, **PLAIN)).eval()
    ids, mask = token_ids(), torch.ones(2, 20, dtype=torch.long)
    with torch.no_grad():
        whole = model(ids).logits
        padded = model(torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1), torch.cat([mask[:, :3] * 0, mask], 1))
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
        assert_close(padded.logits[:, 3:], whole, rtol=0, atol=1e-4)
        assert_close(rest.logits, whole[:, 12:], rtol=0, atol=1e-4)


def test_plain_transformers_loads_the_folder_in_a_process_without_mixtura(saved, tmp_path):
    source = saved(**TOKENS, **PLAIN)
    exported = export(source, tmp_path / "out", to="remote_code")
    assert exported.receipt is not None and exported.receipt.passed
    save_file({"ids": token_ids()}, tmp_path / "ids.safetensors")
    places = [str(tmp_path / name) for name in ("out", "ids.safetensors", "found.safetensors")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *places],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    ours = MixtureForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        assert_close(found["logits"], ours(token_ids()).logits, rtol=0, atol=5e-5)
        written = ours.generate(token_ids()[:1, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(found["written"], written)


def test_a_model_set_to_groups_is_exported_to_run_alone(saved, tmp_path):
    source = saved(**(TOKENS | PLAIN | {"inference_mode": "group"}))
    export(source, tmp_path / "out", to="remote_code")
    ours = MixtureForCausalLM.from_pretrained(source).eval()
    ours.set_inference_mode("alone", top_k=2)
    with torch.no_grad():
        assert_close(load_causal(tmp_path / "out")(token_ids()).logits, ours(token_ids()).logits, rtol=0, atol=5e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["inference_mode"] == "alone"


def test_the_bundled_files_import_nothing_of_ours():
    for text in remote_code().values():
        assert "import mixtura" not in text and "from mixtura" not in text


def test_code_that_is_not_ours_is_not_run_to_verify_it(saved, tmp_path):
    export(saved(**PLAIN), tmp_path / "out", to="remote_code")
    file = tmp_path / "out" / "modeling_mixtura.py"
    file.write_text(file.read_text() + "\nraise SystemExit\n")
    with pytest.raises(EngineFailed, match=r"modeling_mixtura.py is not the code .* and is not run"):
        load_causal(tmp_path / "out")


def test_the_configuration_says_where_its_classes_are(saved, tmp_path):
    export(saved(**PLAIN), tmp_path / "out", to="remote_code", check=False)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(settings["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert settings["architectures"] == ["MixturaForCausalLM"]
    assert "custom_code" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["expert_threshold", "remoe"])
def test_families_of_varying_choice_are_not_exported(saved, tmp_path, family):
    folder = saved(mlp_layer_types=["dense", "dense", family])
    for container in ("remote_code", "qwen3_moe"):
        with pytest.raises(UserError, match=f"{family} layers"):
            export(folder, tmp_path / "out", to=container)
        assert not (tmp_path / "out").exists()


def test_a_family_that_the_bundled_file_lacks_is_not_exported(monkeypatch):
    monkeypatch.delitem(standalone.MIXTURES, "mixture_of_tokens")
    with pytest.raises(UserError, match="A model with mixture_of_tokens layers cannot be exported"):
        check_standalone(MixtureConfig(num_hidden_layers=3, **TOKENS))
    check_standalone(MixtureConfig(num_hidden_layers=1, mlp_layer_types=["token_choice"]))
