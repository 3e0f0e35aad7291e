"""Models in shards and with divided experts, on two and four processes, against one process with the same recipe.

Processes are started once and run many cases; the tests then look at what they wrote.
"""

import json
import pickle
import shutil
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.testing._internal.distributed.fake_pg import FakeStore

from fixtures.several_processes import TOLERANCE, assert_same_metrics, run_script
from mixtura.config import TrainingConfig, UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.planning.step_memory import Division, ModelSizes
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training import read_metrics, train
from mixtura.training.sharded_saving import load_model
from mixtura.training.sharding import Layout, check_batches, check_layout, divide, layout_of

OF_WEIGHTS = 1e-4
"""Adam divides by the gradient's size, and so makes more of the last digits of small ones; a weight moves by 0.02."""

SCRIPT = """
sent, send = [], torch.distributed.all_to_all_single

def counted(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
    if input.is_floating_point():
        ranks_of_group = torch.distributed.get_world_size(kwargs["group"])
        rows = input_split_sizes or [len(input) // ranks_of_group] * ranks_of_group
        sent.append([count * input[:1].numel() for count in rows])
    return send(output, input, output_split_sizes, input_split_sizes, **kwargs)

torch.distributed.all_to_all_single = counted
for job in settings["jobs"]:
    out = folder / job["out"]
    if ranks.is_first() and job["from"]:  # goes on from the last checkpoint but one
        shutil.copytree(folder / job["from"], out, ignore=shutil.ignore_patterns("checkpoint", "checkpoint-6"))
    ranks.wait_for_all()
    config = TrainingConfig(**job["training"])
    sent.clear()
    train(
        MixtureForCausalLM.from_pretrained(folder / "initial" / job["model"]),
        task=LanguageModelling(data, config),
        config=config,
        learning_rate=3e-3,
        seed=0,
        out=out,
        label=job["out"],
        resume=bool(job["from"]),
    )
    if ranks.is_first():
        (out / "sent.json").write_text(json.dumps(sent))
"""
BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "num_experts_per_tok": 2}
BIASED = BALANCED | {"balance_over": "global", "expert_bias_update_rate": 0.01}
SHARED = {"num_shared_experts": 1, "gated": True}
MODELS = {
    "dense": ("dense", {"tie_word_embeddings": False}, 1),
    "token choice": ("token_choice", BIASED | SHARED, 4),
    "parts": ("token_choice", BALANCED, 1),
    "idle": ("token_choice", BALANCED | {"expert_bias_update_rate": 0.01}, 1),
    "sequence balance": ("token_choice", BALANCED | {"balance_over": "sequence"}, 1),
    "capacity": ("token_choice", BALANCED | {"capacity_factor": 1.0}, 4),
    "free experts": ("token_choice", BALANCED | {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1}, 1),
    "dense gradient": ("token_choice", BALANCED | {"dense_router_gradient": True, "moe_latent_size": 16}, 1),
    "expert choice": ("expert_choice", {"group_size": 4}, 4),
    "expert threshold": ("expert_threshold", {"threshold_rate": 0.1}, 4),
    "remoe": ("remoe", {"router_aux_loss_coef": 1.0}, 1),
    "soft": ("soft", {}, 1),
    "merged experts": ("merged_experts", {"segment_length": 4, "num_experts": 3}, 1),
    "mixture of tokens": ("mixture_of_tokens", {"group_size": 2, "mixtures_per_expert": 2}, 4),
    "population": ("mixture_of_tokens", {"group_size": 2, "population_rate": 0.1, "population": True}, 2),
    "last steps alone": ("mixture_of_tokens", {"group_size": 2, "alone_fraction": 0.5, "combine": "separate"}, 1),
}
"""Family, settings and accumulation steps."""
EXPERTS_STAY = ("dense", "merged experts", "last steps alone")
"""Whose experts are not divided: there are none, all are needed everywhere, or each process draws other groups."""
IN_SHARDS, EXPERTS, BOTH = {"shards": 0}, {"expert_ranks": 2}, {"shards": 0, "expert_ranks": 2}


def _model(name):
    torch.manual_seed(0)
    family, settings, _ = MODELS[name]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4}
    shape = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2, "group_size": 4}
    config = MixtureConfig(**{**sizes, **shape, "mlp_layer_types": ["dense", family], **settings})
    model = MixtureForCausalLM(config)
    if name == "idle":  # all tokens choose the first two experts, which one process holds
        model.model.layers[1].mlp.expert_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    return model


def _training(name, **settings):
    steps = {"steps": 6, "batch_size": 4, "eval_every": 3, "eval_sequences": 8, "save_every": 2, "max_grad_norm": 0.3}
    return TrainingConfig(**{**steps, "gradient_accumulation_steps": MODELS[name][2], **settings})


def _train(model, config, data, out, **kwargs):
    task = LanguageModelling(data, config)
    return train(model, task=task, config=config, learning_rate=3e-3, seed=0, out=out, label=out.name, **kwargs)


class Runs:
    """A folder of runs by one, two and four processes."""

    def __init__(self, folder, data):
        """The folder is empty; the data is that of every run."""
        self.folder, self.data = folder, data

    def by(self, processes, jobs):
        """Runs jobs (out, model, settings, the run to go on from) in so many processes."""
        listed = []
        for out, name, settings, before in jobs:
            _model(name).save_pretrained(self.folder / "initial" / name)
            training = asdict(_training(name, **settings))
            listed.append({"out": f"{processes}/{out}", "model": name, "training": training, "from": before})
        run_script(self.folder, self.data, body=SCRIPT, settings={"jobs": listed}, processes=processes)
        return self

    def one(self, name, **settings):
        """The folder of the same run by one process."""
        out = self.folder / "1" / "-".join([name, *map(str, settings.values())])
        if not out.exists():
            _train(_model(name), _training(name, **IN_SHARDS, **settings), self.data, out)
        return out

    def assert_equal(self, out, name, **settings):
        """Weights, moments, statistics and measures of a run are those of one process."""
        many, one = self.folder / out, self.one(name, **settings)
        _assert_close(_weights(many), _weights(one), out)
        _assert_close(_saved(many / "checkpoint-6"), _saved(one / "checkpoint-6"), out)
        assert_same_metrics(read_metrics(one / "metrics.jsonl"), read_metrics(many / "metrics.jsonl"), out)


def _weights(run):
    return load_file(run / "checkpoint" / "model.safetensors")


def _saved(checkpoint):
    """Everything in a checkpoint's shards, whole."""
    reader = HuggingFaceStorageReader(str(checkpoint / "shards"))
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def _assert_close(actual, expected, where):
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        said = lambda told, at=f"{where}, {key}": f"{at}: {told}"  # noqa: E731
        tolerance = TOLERANCE if key.startswith("optimizer.") else OF_WEIGHTS
        torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance, msg=said)


MUON = {"optimizer": "muon"}
AGAIN = {"activation_checkpointing": True}
FOUR = [
    ("both", "token choice", BOTH, None),
    ("both again", "token choice", BOTH, "4/both"),
    ("wider", "token choice", BOTH, "1/token choice"),
    ("mixtures", "mixture of tokens", BOTH | AGAIN, None),
    ("copies", "idle", {"shards": 2, "expert_ranks": 4} | AGAIN, None),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """What four processes have trained, some of it from where one stopped."""
    started = Runs(tmp_path_factory.mktemp("runs"), tiny_data)
    started.one("token choice")
    return started.by(4, FOUR)


def test_shards_and_divided_experts_compute_what_one_process_does(runs):
    runs.assert_equal("4/both", "token choice")
    runs.assert_equal("4/mixtures", "mixture of tokens")


def test_a_run_in_shards_resumes_bit_for_bit(runs):
    straight, resumed = _weights(runs.folder / "4" / "both"), _weights(runs.folder / "4" / "both again")
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_of_one_process_goes_on_with_four(runs):
    runs.assert_equal("4/wider", "token choice")


def test_a_checkpoint_of_four_processes_goes_on_with_one(runs):
    source, out = runs.folder / "4" / "mixtures", runs.folder / "narrower"
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("checkpoint", "checkpoint-6"))
    config = _training("mixture of tokens", **BOTH, **AGAIN)
    _train(_model("mixture of tokens"), config, runs.data, out, resume=True)
    runs.assert_equal("narrower", "mixture of tokens")


def test_computing_layers_again_routes_no_token_elsewhere_and_counts_none_twice(runs):
    runs.assert_equal("4/copies", "idle")


def test_a_process_that_no_token_is_sent_to_does_not_hang(runs):
    records = read_metrics(runs.folder / "4" / "copies" / "metrics.jsonl")
    assert [record["load"][0][2:] for record in records if "load" in record] == [[0.0, 0.0]] * 2


@pytest.mark.parametrize(("out", "name"), [("4/both", "token choice"), ("4/copies", "idle")])
def test_gradients_of_experts_are_not_multiplied_by_the_processes(runs, out, name):
    """Adam's step hides a factor, its first moment does not."""
    many, one = (_saved(folder / "checkpoint-4") for folder in (runs.folder / out, runs.one(name)))
    moments = [key for key in one if key.startswith("optimizer.") and ".experts." in key and key.endswith("exp_avg")]
    assert moments
    for key in moments:
        assert torch.linalg.vector_norm(many[key]) == pytest.approx(torch.linalg.vector_norm(one[key]).item(), rel=1e-3)


@pytest.mark.parametrize(("out", "name"), [("4/both", "token choice"), ("4/copies", "idle")])
def test_the_clip_norm_is_that_of_all_parameters(runs, out, name):
    many, one = (
        [record["grad_norm"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        for folder in (runs.folder / out, runs.one(name))
    )
    assert min(one) > 0.3, "every step is clipped"
    assert many == pytest.approx(one, abs=TOLERANCE)


@pytest.mark.parametrize(("out", "name"), [("4/both", "token choice"), ("4/copies", "idle")])
def test_router_losses_count_once_whatever_the_processes(runs, out, name):
    many, one = (
        [
            (record["aux_loss"], record["z_loss"])
            for record in read_metrics(folder / "metrics.jsonl")
            if "loss" in record
        ]
        for folder in (runs.folder / out, runs.one(name))
    )
    assert many[0][0] > 0.9 and many[0][1] > 0.1
    np.testing.assert_allclose(many, one, atol=TOLERANCE)


def test_a_checkpoint_has_the_experts_of_all_processes(runs):
    key = "model.model.layers.1.mlp.experts.up_proj"
    checkpoint = runs.folder / "4" / "copies" / "checkpoint-6"
    rows = []
    for path in sorted((checkpoint / "shards").iterdir()):
        with safe_open(path, framework="pt") as opened:
            rows.append(len(opened.get_tensor(key)))
    assert rows == [1, 1, 1, 1]
    _assert_close({key: _saved(checkpoint)[key]}, {key: _saved(runs.one("idle") / "checkpoint-6")[key]}, "experts")
    assert len(_weights(runs.folder / "4" / "copies")[key.removeprefix("model.")]) == 4


def test_mixtures_are_sent_in_parts_of_one_size_and_chosen_tokens_are_not(runs):
    """Numbers that the first process sends to each of the two that divide the experts, in every exchange of training.

    Evaluations, which come in the middle and at the end, run other batches.
    """
    sent = {
        name: np.array(json.loads((runs.folder / "4" / name / "sent.json").read_text()))
        for name in ("mixtures", "both")
    }
    hidden, mixtures, positions, groups, steps = 32, 4 * 2, 16, 2, 6
    there_back_again_and_gradients = 2 * 3
    size = hidden * mixtures * positions * groups // 2
    assert (sent["mixtures"] == size).all(1).sum() >= steps * there_back_again_and_gradients
    assert (sent["mixtures"][:18] == size).all()
    to_first, to_second = sent["both"][:12].T
    assert len(set(to_first)) > 1 and (to_first != to_second).any()


def test_nothing_in_a_checkpoint_in_shards_is_a_pickle_of_torch_distributed(runs):
    names = {path.name for path in (runs.folder / "4" / "both" / "checkpoint-6" / "shards").iterdir()}
    assert len(names) == 4 and all(name.endswith(".safetensors") for name in names)


class _Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_a_hostile_checkpoint_in_shards_is_refused_and_its_pickle_is_not_run(runs, tmp_path):
    shutil.copytree(runs.folder / "4" / "copies" / "checkpoint-6", tmp_path / "checkpoint-6")
    shards = tmp_path / "checkpoint-6" / "shards"
    (shards / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    load_model(_model("idle"), tmp_path / "checkpoint-6", alone=True)
    first = sorted(shards.glob("*.safetensors"))[0]
    first.write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(UserError, match=r"checkpoint-6' is damaged or of another model: its shards cannot be read"):
        load_model(_model("idle"), tmp_path / "checkpoint-6", alone=True)


def test_weights_of_another_model_are_refused(runs):
    with pytest.raises(UserError, match="damaged or of another model: its shards cannot be read"):
        load_model(_model("dense"), runs.folder / "4" / "copies" / "checkpoint-6", alone=True)


@pytest.mark.slow
def test_every_family_is_one_model_on_two_processes_in_shards_or_with_divided_experts(tmp_path, tiny_data):
    every = Runs(tmp_path, tiny_data)
    divided = [name for name in MODELS if name not in EXPERTS_STAY]
    jobs = [(f"shards {name}", name, IN_SHARDS, None) for name in MODELS]
    jobs += [("muon", "token choice", IN_SHARDS | MUON, None), ("muon experts", "token choice", EXPERTS | MUON, None)]
    every.by(2, jobs + [(f"experts {name}", name, EXPERTS, None) for name in divided])
    for out, name, settings, _ in jobs:
        every.assert_equal(f"2/{out}", name, **(MUON if "optimizer" in settings else {}))
    for name in divided:
        every.assert_equal(f"2/experts {name}", name)


def test_one_process_in_shards_trains_as_ever(tmp_path, tiny_data):
    whole, shards = _model("token choice"), _model("token choice")
    _train(whole, _training("token choice"), tiny_data, tmp_path / "whole")
    _train(shards, _training("token choice", **BOTH), tiny_data, tmp_path / "shards")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, shards.state_dict()[name]), name


def test_a_layout_follows_from_the_recipe_and_the_processes():
    assert layout_of(TrainingConfig(), 8) is None
    assert layout_of(TrainingConfig(shards=0, expert_ranks=2), 1) is None
    assert layout_of(TrainingConfig(shards=0), 8) == Layout(8, 8, 1)
    layout = layout_of(TrainingConfig(shards=4, expert_ranks=2), 8)
    assert layout == Layout(8, 4, 2) and layout.expert_shards == 2
    assert layout_of(TrainingConfig(expert_ranks=4), 8) == Layout(8, 1, 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"shards": 5},
            r"'training.shards' is 5, but 12 processes do not divide into groups of 5: set it to a divisor",
        ),
        ({"expert_ranks": 8}, r"'training.expert_ranks' is 8, but 12 processes do not divide"),
        ({"shards": 3, "expert_ranks": 2}, r"is 3 and 'training.expert_ranks' 2: one must be a multiple of the other"),
    ],
)
def test_processes_that_do_not_divide_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        layout_of(TrainingConfig(**settings), 12)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("merged experts", EXPERTS, "merged experts need the weights of all experts everywhere: set it to 1"),
        (
            "parts",
            EXPERTS | {"experts_backend": "eager"},
            "experts that processes share run on Mixtura's kernels alone",
        ),
        ("last steps alone", EXPERTS, "'zero_fill' and 'alone_fraction' draw other groups on every process"),
        ("parts", {"expert_ranks": 8}, "is 8, which does not divide the 4 experts of a layer"),
        (
            "parts",
            IN_SHARDS | {"optimizer": "adafactor"},
            "'adafactor', which cannot step in shards: use adamw or muon",
        ),
        ("parts", {"shards": 24, "expert_ranks": 2}, "12 processes would share the 16 and 32 rows"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_to_change(name, settings, told):
    config = _training(name, **settings)
    with pytest.raises(UserError, match=told):
        check_layout(_model(name), config, 24)


def test_mixtures_of_batches_of_other_lengths_are_refused_on_all_processes(monkeypatch):
    longest = torch.distributed.ReduceOp.MAX
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sizes, chosen: sizes.add_(int(chosen == longest)))
    batches, layout, device = [{"input_ids": torch.zeros(2, 8)}], Layout(2, 1, 2), torch.device("cpu")
    with pytest.raises(UserError, match=r"have batches of different lengths.*set 'training.expert_ranks' to 1"):
        check_batches(_model("mixture of tokens"), layout, batches, device)
    check_batches(_model("parts"), layout, batches, device)


@pytest.mark.parametrize("layout", [Layout(8, 8, 1), Layout(8, 4, 2), Layout(8, 2, 4), Layout(8, 1, 2)])
@pytest.mark.parametrize("name", ["dense", "parts", "mixture of tokens"])
def test_a_process_holds_as_many_parameters_as_the_plan_says(name, layout):
    model = _model(name)
    division = Division(replicas=8 // layout.shards, shards=layout.shards, expert_ranks=layout.expert_ranks)
    distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        parameters = divide(model, layout, torch.device("cpu")).parameters()
        held = sum(each.to_local().numel() if hasattr(each, "to_local") else each.numel() for each in parameters)
    finally:
        distributed.destroy_process_group()
    planned = ModelSizes(model.config, sequence_length=16).held(division)
    # The first process has the larger part of what does not divide evenly.
    assert planned <= held <= 1.02 * planned


def test_other_models_are_not_sharded():
    with pytest.raises(
        UserError, match="A Linear is not trained in shards, only language models that are tuned whole are"
    ):
        check_layout(torch.nn.Linear(2, 2), TrainingConfig(shards=0), 2)
