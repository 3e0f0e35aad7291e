"""Spoilt input to every reader of users' files: a value or one sentence comes back, never a traceback.

benchmarks/fuzz.py has the readers and the inputs, and runs millions of them.
"""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.checkpoints.tensors import StoredWeights
from mixtura.config import UserError, load_recipe, recipe_from_dict
from mixtura.models.loading import folder_settings
from mixtura.report.html import report_folder
from mixtura.results.document import read_run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
EXAMPLES = {"page": 2, "results": 8, "source": 10, "recipe": 100, "start": 100, "config": 100}
"""Inputs of a surface that is slow to read; of the others there are 150."""


def _load_script():
    spec = importlib.util.spec_from_file_location("fuzz_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load_script()


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surfaces")
    return folder, script.surfaces(folder)


NAMES = (
    *("recipe", "index", "safetensors", "config", "source", "start", "adapter", "results", "page", "run"),
    *("jsonl", "json", "csv", "tsv", "parquet", "text", "labelled", "chats", "label lines"),
    *("gzip", "bzip2", "xz", "document", "memory"),
)


def test_every_surface_is_tried(surfaces):
    assert tuple(surfaces[1]) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_good_input_is_read(surfaces, name):
    folder, found = surfaces
    for seed in found[name].seeds:
        assert script.attempt(found[name], folder / name, seed) == "value"


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_input_is_read_or_refused_in_one_sentence(surfaces, name):
    folder, found = surfaces

    @settings(max_examples=EXAMPLES.get(name, 150))
    @given(draw=st.randoms(use_true_random=False))
    def try_one(draw: random.Random) -> None:
        script.attempt(found[name], folder / name, script.make_input(found[name], draw))

    try_one()


# What it found, each once.


@pytest.mark.parametrize(
    "text",
    ["steps = " + "9" * 5000, "a = " + "[" * 3000, "a." * 3000 + "b = 1", "task = []", "task = {a = 1}"],
    ids=["digits", "lists", "tables", "list for a task", "table for a task"],
)
def test_a_recipe_that_its_parser_gives_up_on(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(UserError):
        load_recipe(Path("recipes/quick.toml"), ["training.steps=" + "9" * 5000])


@pytest.mark.parametrize("families", [7, True, [[]], [{}], {"a": 1}], ids=repr)
def test_a_start_whose_layers_have_no_families(tmp_path, families):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtura", "mlp_layer_types": families}))
    table = {"name": "a", "seeds": [0], "baseline": "a", "arms": {"a": {"init_from": str(tmp_path)}}}
    with pytest.raises(UserError, match="are no list of families"):
        recipe_from_dict(table)


def test_a_place_whose_name_no_file_system_takes(tmp_path):
    for name in ("x" * 300, "a\0b"):
        table = {"name": "a", "seeds": [0], "baseline": "a", "arms": {"a": {"init_from": name}}}
        assert recipe_from_dict(table).arms["a"].init_from == name  # it may be a hub's; loading it says that it is not
        with pytest.raises(UserError, match="is no model folder"):
            folder_settings(Path(name))


@pytest.mark.parametrize("shard", ["x" * 300, "a\0b", "a\nb", 7, None, []], ids=lambda shard: repr(shard)[:9])
def test_an_index_that_names_no_file(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError) as refusal:
        StoredWeights(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["9" * 5000, "[" * 100_000, '{"a":' * 100_000], ids=["digits", "lists", "tables"])
def test_json_that_its_parser_gives_up_on(tmp_path, content):
    for name in ("result.json", "config.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_run(tmp_path / "result.json")
    with pytest.raises(UserError, match="is damaged"):
        folder_settings(tmp_path)


def test_results_that_contradict_themselves_leave_no_report(make_results, tmp_path):
    results = make_results(seeds=(0,))
    del results["environment"]["device"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"is damaged \(its parts do not fit together: 'device'\)"):
        report_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_the_long_run_counts_and_goes_on(tmp_path):
    command = [sys.executable, str(SCRIPT), "--seconds", "5", "--journal", str(tmp_path / "fuzz.json")]
    totals = []
    for _ in range(2):
        assert subprocess.run(command, check=False).returncode == 0
        totals.append(json.loads((tmp_path / "fuzz.json").read_text())["total"])
    assert totals[1] > totals[0] > 1000


@pytest.mark.parametrize(
    "changed",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": "a"}}, {"pad_token_id": 99}, {"intermediate_size": -1}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_source_whose_settings_make_no_model(surfaces, changed):
    folder, found = surfaces
    config = json.loads(found["source"].seeds[0]) | changed
    assert script.attempt(found["source"], folder / "source", json.dumps(config).encode()) == "sentence"
