"""Checkpoints in shards that are written while training goes on: faults in the middle of it, and the same bits."""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from fixtures.several_processes import run_script
from mixtura.config import TrainingConfig, UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.training.saving import writing
from mixtura.training.sharded_saving import ShardSaver

SCRIPT = """
import resource
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from mixtura.config import UserError
from mixtura.training import saving
from mixtura.training.trainer import MixtureTrainer

trainer, overtaken = [], []
begin, write_data, rank = MixtureTrainer.begin, HuggingFaceStorageWriter.write_data, int(os.environ["RANK"])
save_tensors = saving.save_tensors

def begun(self):
    trainer[:] = [self]
    begin(self)

def slow(self, plan, planner):
    began = trainer[0].state.global_step
    until = time.monotonic() + 60
    if fault == "stop" and rank == 1 and began == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    while fault != "quick" and began in (2, 4) and trainer[0].state.global_step == began and time.monotonic() < until:
        time.sleep(0.001)  # which a save that holds up training would do for ever
    overtaken.append(trainer[0].state.global_step - began)
    if fault == "fill the disk" and rank == 1 and began == 4:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return write_data(self, plan, planner)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if fault == "die" and rank == 1 and began == 4 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_data(self, plan, planner)

def save_small(value, path):
    if fault == "lose a small file" and rank == 1 and trainer[0].state.global_step == 4:
        raise OSError(28, "No space left on device")
    save_tensors(value, path)

MixtureTrainer.begin, HuggingFaceStorageWriter.write_data, saving.save_tensors = begun, slow, save_small
config = TrainingConfig(**settings["training"])
for name, fault in settings["runs"]:
    overtaken.clear()
    try:
        train(
            MixtureForCausalLM.from_pretrained(folder / "initial"),
            task=LanguageModelling(data, config),
            config=config,
            learning_rate=3e-3,
            seed=0,
            out=folder / name,
            label=name,
            resume=True,
        )
    except UserError as error:
        (folder / f"{name}-told-{rank}").write_text(str(error))
    kept = sorted(path.name for path in (folder / name).glob("*checkpoint*"))
    (folder / f"{name} {fault}-kept-{rank}.json").write_text(json.dumps(kept))
    (folder / f"{name} {fault}-overtaken-{rank}.json").write_text(json.dumps(overtaken))
"""
SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 300}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "mlp_layer_types": ["dense", "token_choice"]}
TRAINING = TrainingConfig(steps=6, batch_size=4, eval_every=3, eval_sequences=8, save_every=2, shards=0, expert_ranks=2)
WEIGHTS = "checkpoint/model.safetensors"


@pytest.fixture(scope="module")
def train_two(tiny_data):
    """Runs of two processes in shards, where no save ends before a later step."""

    def start(folder, runs):
        torch.manual_seed(0)
        MixtureForCausalLM(MixtureConfig(**SIZES)).save_pretrained(folder / "initial")
        run_script(
            folder,
            tiny_data,
            body=SCRIPT,
            settings={"training": asdict(TRAINING), "runs": runs},
            processes=2,
            options=["--max-restarts", "1"],
            variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )

    return start


def _read(folder, name):
    """What each of the two processes has stored."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def background(tmp_path_factory, train_two):
    """Runs that go through, whose disk is full for a while, that are asked to stop, and that lose a small file."""
    folder = tmp_path_factory.mktemp("background")
    faults = [("filled", "fill the disk"), ("filled", ""), ("stopped", "stop"), ("stopped", "")]
    faults += [("lost", "lose a small file"), ("lost", "")]
    train_two(folder, [("quick", "quick"), ("straight", ""), *faults])
    return folder


def test_training_goes_on_while_a_checkpoint_is_written(background):
    assert _read(background, "straight -overtaken") == [[1, 1, 0]] * 2, "by one step, but at the end"
    _assert_same_bits(background, "quick", "straight")


def test_a_disk_that_fills_up_in_the_background_is_told_by_all_processes(background):
    for rank in range(2):
        told = (background / f"filled-told-{rank}").read_text()
        assert re.search(r"cannot be written \(.*File too large.*make room or check", told)
    assert _read(background, "filled fill the disk-kept") == [["checkpoint-2"]] * 2
    _assert_same_bits(background, "straight", "filled")


def test_a_run_that_is_asked_to_stop_finishes_the_checkpoint_that_it_was_writing(background):
    assert _read(background, "stopped stop-kept") == [["checkpoint-2", "checkpoint-3"]] * 2
    _assert_same_bits(background, "straight", "stopped")


def test_a_process_that_cannot_write_its_small_file_lets_no_other_wait(background):
    first, second = ((background / f"lost-told-{rank}").read_text() for rank in range(2))
    assert first == "Another process has stopped, and says why."
    assert "cannot be written (No space left on device)" in second
    assert _read(background, "lost lose a small file-kept") == [["checkpoint-2"]] * 2
    _assert_same_bits(background, "straight", "lost")


def _assert_same_bits(folder, one, other):
    for name, value in load_file(folder / one / WEIGHTS).items():
        assert torch.equal(value, load_file(folder / other / WEIGHTS)[name]), name


@pytest.mark.slow
def test_a_worker_that_is_killed_while_a_checkpoint_is_written_loses_nothing_before_it(tmp_path, train_two):
    train_two(tmp_path, [("straight", ""), ("killed", "die")])
    assert (tmp_path / "died").exists()
    _assert_same_bits(tmp_path, "straight", "killed")


def test_a_folder_that_cannot_be_written_is_told_as_other_writes_are(tmp_path, tiny_model):
    model = tiny_model()
    (tmp_path / "shards").write_text("in the way")
    unfinished = ExitStack()
    unfinished.enter_context(writing(tmp_path))
    with pytest.raises(UserError, match=r"cannot be written \(.*make room or check its permissions"):
        ShardSaver().start(model, torch.optim.AdamW(model.parameters()), tmp_path, unfinished)
