"""Two processes on the CPU, started as a user would start them, against one process with the same recipe."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fixtures.several_processes import TOLERANCE, assert_same_metrics, run_script
from mixtura.config import TrainingConfig, UserError
from mixtura.training import read_metrics
from mixtura.training.ranks import Share, share_of_step

SCRIPT = """
def die_once(out):
    while not (out / "checkpoint-2").exists():
        time.sleep(0.001)
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)

for name, training in settings["runs"].items():
    if "--die" in sys.argv and os.environ["RANK"] == "1" and not (folder / "died").exists():
        threading.Thread(target=die_once, args=(folder / "two" / name,), daemon=True).start()
    config = TrainingConfig(**training)
    train(
        MixtureForCausalLM.from_pretrained(folder / "initial" / name),
        task=LanguageModelling(data, config),
        config=config,
        learning_rate=3e-3,
        seed=0,
        out=folder / "two" / name,
        label=name,
        resume="--resume" in sys.argv,
    )
"""
BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "num_experts_per_tok": 2}
RUNS = {
    "dense": ("dense", {}, 1),
    "token choice": ("token_choice", BALANCED, 1),
    "token choice, micro-batches": ("token_choice", BALANCED, 2),
    "global balance": ("token_choice", BALANCED | {"balance_over": "global", "expert_bias_update_rate": 0.01}, 1),
    "global balance, micro-batches": (
        "token_choice",
        BALANCED | {"balance_over": "global", "expert_bias_update_rate": 0.01},
        2,
    ),
    "capacity, micro-batches": ("token_choice", BALANCED | {"capacity_factor": 1.0}, 2),
    "expert choice": ("expert_choice", {"group_size": 2}, 1),
    "expert choice, micro-batches": ("expert_choice", {"group_size": 4}, 2),
    "expert threshold, micro-batches": ("expert_threshold", {"threshold_rate": 0.1}, 2),
    "remoe": ("remoe", {"router_aux_loss_coef": 1.0}, 1),
    "soft": ("soft", {}, 1),
    "mixture of tokens": ("mixture_of_tokens", {"group_size": 2}, 1),
    "mixture of tokens, micro-batches": ("mixture_of_tokens", {"group_size": 4}, 2),
    "population": ("mixture_of_tokens", {"group_size": 2, "population_rate": 0.1, "population": True}, 1),
    "population, micro-batches": (
        "mixture_of_tokens",
        {"group_size": 4, "population_rate": 0.1, "population": True},
        2,
    ),
    "last steps alone": ("mixture_of_tokens", {"group_size": 2, "alone_fraction": 0.5, "combine": "separate"}, 1),
}


@pytest.fixture
def run_two(tmp_path, tiny_data, tiny_training):
    """Trains models in two processes that share every step's batch; returns their folders' parent."""

    def start(models, accumulation, *flags):
        runs = {name: vars(tiny_training(gradient_accumulation_steps=accumulation[name])) for name in models}
        for name, model in models.items():
            model.save_pretrained(tmp_path / "initial" / name)
        run_script(
            tmp_path,
            tiny_data,
            body=SCRIPT,
            settings={"runs": runs},
            processes=2,
            flags=flags,
            options=["--max-restarts", "1"] if "--die" in flags else [],
            # Else processes that are started again look for peers where those that are gone were.
            variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        return tmp_path / "two"

    return start


@pytest.mark.slow
def test_two_processes_are_one_in_every_family(run, run_two, tiny_model, tmp_path):
    models = {name: tiny_model(family, **settings) for name, (family, settings, _) in RUNS.items()}
    two = run_two(models, {name: accumulation for name, (_, _, accumulation) in RUNS.items()})
    for name, (family, settings, accumulation) in RUNS.items():
        model = tiny_model(family, **settings)
        run(model, out=f"one/{name}", gradient_accumulation_steps=accumulation)
        weights, expected = load_file(two / name / "checkpoint" / "model.safetensors"), model.state_dict()
        for key, actual in weights.items():
            torch.testing.assert_close(
                actual, expected[key], rtol=0, atol=TOLERANCE, msg=lambda told, at=f"{name}, {key}": f"{at}: {told}"
            )
        first, second = (read_metrics(tmp_path / out / name / "metrics.jsonl") for out in ("one", "two"))
        assert_same_metrics(first, second, name)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(run_two, tiny_model, tmp_path):
    family, settings, accumulation = RUNS["global balance"]
    straight = load_file(_weights(run_two({"arm": tiny_model(family, **settings)}, {"arm": accumulation})))
    (tmp_path / "two" / "arm" / "checkpoint").rename(tmp_path / "straight")
    for path in (tmp_path / "two" / "arm" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "two" / "arm" / "checkpoint-6").rmdir()
    resumed = run_two({"arm": tiny_model(family, **settings)}, {"arm": accumulation}, "--resume")
    for name, actual in load_file(_weights(resumed)).items():
        assert torch.equal(actual, straight[name]), name


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_and_nothing_changes(run_two, tiny_model, tmp_path):
    """SIGKILL to the second process after its first checkpoint; torchrun restarts both, which go on from there."""
    family, settings, accumulation = RUNS["global balance"]
    straight = load_file(_weights(run_two({"arm": tiny_model(family, **settings)}, {"arm": accumulation})))
    shutil.rmtree(tmp_path / "two")
    restarted = run_two({"arm": tiny_model(family, **settings)}, {"arm": accumulation}, "--resume", "--die")
    assert (tmp_path / "died").exists()
    for name, actual in load_file(_weights(restarted)).items():
        assert torch.equal(actual, straight[name]), name


def _weights(two):
    return two / "arm" / "checkpoint" / "model.safetensors"


def test_processes_take_whole_micro_batches_or_a_part_of_each(tiny_model):
    dense = tiny_model("dense")
    assert share_of_step(dense, TrainingConfig(batch_size=8, gradient_accumulation_steps=4), 2) == Share(8, 2, False)
    assert share_of_step(dense, TrainingConfig(batch_size=8, gradient_accumulation_steps=3), 2) == Share(4, 3, True)
    assert share_of_step(dense, TrainingConfig(batch_size=7, gradient_accumulation_steps=3), 1) == Share(7, 3, False)


def test_a_group_is_never_divided_among_processes(tiny_model):
    mixture = tiny_model("mixture_of_tokens", group_size=4)
    assert share_of_step(mixture, TrainingConfig(batch_size=8), 2) == Share(4, 1, True)
    with pytest.raises(UserError, match=r"get 2 examples of 'training.batch_size' 8, which do not fill groups of 4.*"):
        share_of_step(mixture, TrainingConfig(batch_size=8), 4)
    accumulated = TrainingConfig(batch_size=8, gradient_accumulation_steps=4)
    assert share_of_step(mixture, accumulated, 4) == Share(8, 1, False)


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("token_choice", {"capacity_factor": 1.25}, "A 'capacity_factor' of 1.25 drops tokens by their order"),
        ("expert_threshold", {}, "Thresholds are found"),
        ("dense", {}, "'training.batch_size' is 7, which 2 processes cannot share evenly"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_to_change(tiny_model, family, settings, told):
    config = TrainingConfig(batch_size=7 if family == "dense" else 8)
    with pytest.raises(UserError, match=f"{told}.*'training.gradient_accumulation_steps', which is 1, a multiple of 2"):
        share_of_step(tiny_model(family, **settings), config, 2)
