"""What goes wrong in the middle of runs, or needs a run before it: one sentence, exit code 2, nothing half-written.

Mistakes that need no run are listed in test_mistakes.py.
"""

import errno
import json
import shutil
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mixtura import cli
from mixtura.cli import train as runs
from mixtura.config import recipe_to_toml
from mixtura.files import write_json
from mixtura.models import MixtureForCausalLM
from mixtura.training import SilentProgress

STEPS = 4


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """A recipe file of two arms on a small text."""
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_to_toml(tiny_recipe(steps=STEPS)), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; gives the exit code and what stood on standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mixtura", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def assert_one_sentence(result, *parts):
    code, error = result
    assert code == 2, error
    assert error.startswith("mixtura: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    assert error.rstrip().endswith((".", "?")), error
    for part in parts:
        assert str(part) in error, f"{part!r} is not in: {error}"


def assert_nothing_half_written(out: Path) -> None:
    files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    assert not [path for path in files if path.name.endswith((".part", ".partial", ".tmp"))]
    assert not [path for path in files if path.name in ("results.json", "report.html", "result.json")]


def test_several_mistakes_are_said_at_once(run, recipe, tmp_path):
    code, said = run("compare", recipe, "--out", tmp_path / "out", "--set", "training.steps=0", "--set", "seeds=[]")
    assert code == 2 and len(said.splitlines()) == 3 and "- 'training.steps' is 0" in said
    assert not (tmp_path / "out").exists()


def test_the_sentence_comes_before_anything_is_written(run, recipe, tmp_path):
    run("compare", recipe, "--out", tmp_path / "out", "--set", "training.stps=3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", ["data.path=nowhere.txt", "data.sequence_length=100000"])
def test_the_corrected_command_works_in_the_same_folder(run, recipe, tmp_path, mistake):
    out = tmp_path / "out"
    assert run("train", recipe, "--arm", "dense", "--out", out, "--set", mistake)[0] == 2
    assert run("train", recipe, "--arm", "dense", "--out", out) == (0, "")
    assert tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))["training"]["eval_sequences"] == 8


def test_a_recipe_of_the_users_own_is_not_overwritten(run, recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    mine = recipe.rename(tmp_path / "mine" / "recipe.toml")
    before = mine.read_text(encoding="utf-8")
    for flags in ((), ("--no-resume",)):
        assert_one_sentence(run("compare", mine, "--out", tmp_path / "mine", *flags), "mine", "--out")
    assert mine.read_text(encoding="utf-8") == before


def test_a_text_shorter_than_one_sequence_says_what_to_change(run, recipe, tmp_path):
    (tmp_path / "short.txt").write_text("abc\n\ndef\n\nghi\n\njkl\n\nmno\n\npqr", encoding="utf-8")
    flags = ["--set", f"data.path={tmp_path / 'short.txt'}", "--set", "data.validation_fraction=0.5"]
    result = run("compare", recipe, "--out", tmp_path / "out", *flags)
    assert_one_sentence(result, "fewer than the 16", "give more text", "lower 'data.sequence_length'")
    assert_nothing_half_written(tmp_path / "out")


def test_a_file_is_no_folder_to_write(run, recipe, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "taken"), "taken", "--out")
    below = tmp_path / "taken" / "deeper" / "still"
    assert_one_sentence(run("compare", recipe, "--out", below), f"'{tmp_path / 'taken'}' is a file", "--out")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_a_folder_with_other_files_is_left_alone(run, recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    for flags in ((), ("--no-resume",)):
        assert_one_sentence(run("compare", recipe, "--out", tmp_path / "mine", *flags), "mine", "--out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_sentence(run, recipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    monkeypatch.setattr("mixtura.comparison.runner.write_results", full)
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "out"), "disk is full", "Free some space")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "result.json" in names  # of the runs, which were finished and whole
    assert not {"results.json", "report.html"} & names
    assert not [name for name in names if name.endswith((".part", ".partial", ".tmp"))]


def test_a_disk_that_fills_up_at_a_checkpoint_keeps_what_is_whole(run, recipe, tmp_path, monkeypatch):
    original, saved = MixtureForCausalLM.save_pretrained, []

    def fills_up(self, folder, **options):
        saved.append(folder)
        if len(saved) == 2:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, folder, **options)

    command = ("train", recipe, "--arm", "dense", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(MixtureForCausalLM, "save_pretrained", fills_up)
        assert_one_sentence(run(*command), "No space left", "make room")
    seed = tmp_path / "out" / "arms" / "dense" / "seed0"
    assert sorted(path.name for path in seed.iterdir()) == ["checkpoint-2", "metrics.jsonl", "run.json"]
    assert run(*command) == (0, "")
    assert (seed / "result.json").exists()


def test_a_disk_that_is_full_from_the_start_leaves_no_file(run, recipe, tmp_path, monkeypatch):
    command = ("train", recipe, "--arm", "dense", "--out", tmp_path / "out")

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert_one_sentence(run(*command), tmp_path / "out", "No space left", "--out")
    assert not (tmp_path / "out").exists()
    assert run(*command) == (0, "")


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    write_json(target, {"old": True})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(target, {"new": True})
    assert json.loads(target.read_text(encoding="utf-8")) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_changed_recipe_does_not_go_on_in_the_old_folder(run, recipe, tmp_path):
    out = tmp_path / "out"
    assert run("train", recipe, "--arm", "dense", "--out", out)[0] == 0
    result = run("train", recipe, "--arm", "dense", "--out", out, "--set", "training.weight_decay=0.5")
    assert_one_sentence(result, "training.weight_decay", "0.1", "0.5", "--no-resume")
    assert (
        run("train", recipe, "--arm", "dense", "--out", out, "--set", "training.weight_decay=0.5", "--no-resume")[0]
        == 0
    )


def tree(folder):
    """Every file of a folder and what it holds."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["compare", "train --arm dense"])
@pytest.mark.parametrize(
    "mistake", ["data.path=nowhere.txt", "data.sequence_length=100000", "training.experts_backend=eager"]
)
def test_starting_over_with_a_mistake_leaves_the_finished_runs(run, recipe, tmp_path, command, mistake):
    verb, *flags = command.split()
    command = (verb, recipe, *flags, "--out", tmp_path / "out")
    assert run(*command)[0] == 0
    before = tree(tmp_path / "out")
    assert_one_sentence(run(*command, "--no-resume", "--set", mistake), mistake.split("=")[-1].split(".")[0])
    assert tree(tmp_path / "out") == before


def test_starting_over_with_a_damaged_record_of_a_search_leaves_the_finished_runs(run, recipe, tmp_path):
    command = ("compare", recipe, "--out", tmp_path / "out")
    assert run(*command)[0] == 0
    before = tree(tmp_path / "out")
    recipe.with_suffix(".search.json").write_text("{", encoding="utf-8")
    assert_one_sentence(run(*command, "--no-resume"), "tiny.search.json")
    assert tree(tmp_path / "out") == before


def test_a_dry_run_refuses_the_folders_that_the_run_refuses(run, recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert run("train", recipe, "--arm", "dense", "--out", tmp_path / "begun")[0] == 0
    changed = ("--set", "training.weight_decay=0.5")
    for out, more in (
        ("tiny.toml", ()),
        ("tiny.toml/below", ()),
        ("mine", ()),
        ("mine", ("--no-resume",)),
        ("begun", changed),
        ("begun", ("--set", "data.max_bytes=20000")),
    ):
        for verb in (("compare",), ("train", "--arm", "dense")):
            command = (verb[0], recipe, *verb[1:], "--out", tmp_path / out, *more)
            refused = run(*command, "--dry-run")
            assert_one_sentence(refused, tmp_path, "--out")
            assert refused == run(*command)
    assert run("compare", recipe, "--out", tmp_path / "begun", *changed, "--no-resume", "--dry-run")[0] == 0
    assert (tmp_path / "begun" / "arms" / "dense" / "seed0" / "result.json").exists()


def test_a_dry_run_refuses_a_text_that_has_changed(run, recipe, tmp_path, tiny_text):
    text = tmp_path / "text.txt"
    shutil.copy(tiny_text, text)
    command = ("train", recipe, "--arm", "dense", "--out", tmp_path / "out", "--set", f"data.path={text}")
    assert run(*command)[0] == 0
    text.write_text(text.read_text(encoding="utf-8") + "\n\nOne more film.\n", encoding="utf-8")
    refused = run(*command, "--dry-run")
    assert_one_sentence(refused, "The text has changed since", "--no-resume")
    assert refused == run(*command)
    assert run(*command, "--no-resume", "--dry-run")[0] == 0


def test_a_run_goes_on_beside_a_file_that_is_not_read(run, recipe, tmp_path, tiny_text, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(tiny_text, tmp_path / "texts" / name)
    lines = tiny_text.read_text(encoding="utf-8").splitlines()
    (tmp_path / "texts" / "b.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    changed = recipe.read_text(encoding="utf-8").replace(str(tiny_text), str(tmp_path / "texts"))
    recipe.write_text(changed, encoding="utf-8")
    seed = interrupted_run(run, recipe, tmp_path / "out", monkeypatch)
    (tmp_path / "texts" / "notes.md").write_text("unread", encoding="utf-8")
    shutil.rmtree(tmp_path / "out" / "data")  # where the text is kept as it was read
    assert run("train", recipe, "--arm", "dense", "--out", tmp_path / "out") == (0, "")
    assert (seed / "result.json").exists()


def interrupted_run(run, recipe, out, monkeypatch):
    """A run of the dense arm that was stopped after its first checkpoint; gives its folder."""

    class Stop(SilentProgress):
        def advance(self, step, *, loss, tokens_per_second):
            if step == STEPS - 1:
                raise KeyboardInterrupt

    @contextmanager
    def stopping(_):
        yield Stop()

    with monkeypatch.context() as patch:
        patch.setattr(runs, "progress", stopping)
        assert run("train", recipe, "--arm", "dense", "--out", out)[0] != 0
    return out / "arms" / "dense" / "seed0"


def test_a_truncated_checkpoint_is_named_with_its_sizes(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    newest = sorted(interrupted_run(run, recipe, out, monkeypatch).glob("checkpoint-*"))[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert_one_sentence(run("train", recipe, "--arm", "dense", "--out", out), "model.safetensors", "100")


def test_a_foreign_checkpoint_is_refused(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    newest = sorted(interrupted_run(run, recipe, out, monkeypatch).glob("checkpoint-*"))[-1]
    config = json.loads((newest / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"intermediate_size": 8})
    size = len((newest / "config.json").read_bytes())
    (newest / "config.json").write_text(text.ljust(size), encoding="utf-8")
    assert_one_sentence(run("train", recipe, "--arm", "dense", "--out", out), newest.name)


def test_a_folder_that_another_program_called_a_checkpoint_is_left_alone(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seed = interrupted_run(run, recipe, out, monkeypatch)
    (seed / "checkpoint-9").mkdir()
    (seed / "checkpoint-9" / "pytorch_model.bin").write_text("weights", encoding="utf-8")
    assert_one_sentence(run("train", recipe, "--arm", "dense", "--out", out), "checkpoint-9", "move it out of the way")
    (seed / "checkpoint-9").rename(tmp_path / "checkpoint-9")
    assert run("train", recipe, "--arm", "dense", "--out", out) == (0, "")


def test_the_run_goes_on_once_the_damaged_checkpoint_is_removed(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    newest = sorted(interrupted_run(run, recipe, out, monkeypatch).glob("checkpoint-*"))[-1]
    (newest / "optimizer.pt").unlink()
    command = ("train", recipe, "--arm", "dense", "--out", out)
    assert_one_sentence(run(*command), "optimizer.pt is missing", "remove the folder")
    shutil.rmtree(newest)
    assert run(*command) == (0, "")


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_damaged_result_is_named_and_computed_again_once_deleted(run, trained, damage):
    command, seed = trained
    before = json.loads((seed / "result.json").read_text(encoding="utf-8"))
    (seed / "result.json").write_text(damage, encoding="utf-8")
    assert_one_sentence(run(*command), "result.json", "delete it")
    (seed / "result.json").unlink()
    assert run(*command) == (0, "")
    assert json.loads((seed / "result.json").read_text(encoding="utf-8"))["final"] == before["final"]


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_metrics_are_named(run, trained, finished):
    command, seed = trained
    (seed / "result.json").unlink()
    if not finished:
        shutil.rmtree(seed / "checkpoint")
    (seed / "metrics.jsonl").write_text("nonsense\n", encoding="utf-8")
    assert_one_sentence(run(*command), "metrics.jsonl")
    assert not (seed / "result.json").exists()


@pytest.fixture
def trained(run, recipe, tmp_path, keep_checkpoints):
    """The command of a finished run, and the run's folder, with the checkpoints that it had until then."""
    command = ("train", recipe, "--arm", "dense", "--out", tmp_path / "out")
    assert run(*command) == (0, "")
    return command, tmp_path / "out" / "arms" / "dense" / "seed0"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(run, recipe, tmp_path, monkeypatch):
    original, calls = MixtureForCausalLM.forward, []

    def forward(self, *arguments, **options):
        outputs = original(self, *arguments, **options)
        if self.training:
            calls.append(1)
            if len(calls) == STEPS - 1:
                outputs.language_loss = outputs.language_loss * float("nan")
        return outputs

    monkeypatch.setattr(MixtureForCausalLM, "forward", forward)
    result = run("train", recipe, "--arm", "dense", "--out", tmp_path / "out")
    assert_one_sentence(result, "dense seed 0", f"step {STEPS - 1}", "learning rate", "checkpoint-2")
    seed = tmp_path / "out" / "arms" / "dense" / "seed0"
    assert (seed / "checkpoint-2").is_dir() and not (seed / "result.json").exists()


def test_a_rate_that_is_far_too_high_names_step_arm_and_rate(run, recipe, tmp_path):
    flags = ["--set", "arms.dense.learning_rate=1e9", "--set", "training.warmup_fraction=0"]
    result = run("train", recipe, "--arm", "dense", "--out", tmp_path / "out", *flags)
    assert_one_sentence(result, "dense seed 0", "diverged", "at step", "lower its learning rate", "1e+09")
    assert not (tmp_path / "out" / "arms" / "dense" / "seed0" / "result.json").exists()


def test_train_asks_which_arm(run, recipe, tmp_path):
    assert_one_sentence(run("train", recipe, "--out", tmp_path / "out"), "--arm dense|mixture_of_tokens")
    assert_one_sentence(run("train", recipe, "--arm", "sparse", "--out", tmp_path / "out"), "'sparse'", "dense")


def damaged_copy(trained, tmp_path):
    return Path(shutil.copytree(trained[1] / "checkpoint", tmp_path / "damaged"))


def test_a_damaged_model_is_named(run, trained, tmp_path, tiny_text):
    damaged = damaged_copy(trained, tmp_path)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    for verb in (("evaluate", damaged, "--text", tiny_text), ("generate", damaged, "the film")):
        assert_one_sentence(run(*verb), damaged, "cannot be loaded", "train or export it again")


def test_a_model_with_a_weight_too_few_is_not_filled_up_with_random_numbers(run, trained, tmp_path):
    damaged = damaged_copy(trained, tmp_path)
    weights = load_file(damaged / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.weight"
    del weights[lost]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert_one_sentence(run("generate", damaged, "the film"), damaged, lost, "train or export it again")


def test_weights_that_do_not_fit_the_configuration_are_named(run, trained, tmp_path):
    damaged = damaged_copy(trained, tmp_path)
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}), encoding="utf-8")
    assert_one_sentence(run("generate", damaged, "the film"), damaged, "mlp", "does not fit its config.json")


def test_a_model_of_an_unknown_kind_is_named(run, tmp_path, tiny_text):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}', encoding="utf-8")
    assert_one_sentence(run("evaluate", tmp_path, "--text", tiny_text), tmp_path, "nonesuch")


def test_a_text_to_evaluate_must_exist_and_fill_a_batch(run, trained, tmp_path):
    model = trained[1] / "checkpoint"
    assert_one_sentence(run("evaluate", model, "--text", tmp_path / "none.txt"), "none.txt", "correct the path")
    (tmp_path / "short.txt").write_text("the film is good " * 20, encoding="utf-8")
    result = run("evaluate", model, "--text", tmp_path / "short.txt", "--batch-size", 64)
    assert_one_sentence(result, "short.txt", "one batch of 64", "--batch-size")


def test_an_evaluation_batch_must_fill_groups(run, recipe, tmp_path, tiny_text):
    assert run("train", recipe, "--arm", "mixture_of_tokens", "--out", tmp_path / "out") == (0, "")
    model = tmp_path / "out" / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint"
    result = run("evaluate", model, "--text", tiny_text, "--batch-size", 6)
    assert_one_sentence(result, "groups of 4", "make it a multiple of 4")


def test_a_prompt_must_be_text(run, trained):
    model = trained[1] / "checkpoint"
    assert_one_sentence(run("generate", model, ""), "prompt is empty", "give some text")
    assert_one_sentence(run("generate", model, "the \udcff film"), "prompt is not UTF-8")


def test_a_model_that_sees_other_tokens_cannot_generate(run, recipe, tmp_path):
    flags = ["--set", "arms.dense.family=expert_choice", "--set", "arms.dense.group_size=4"]
    assert run("train", recipe, "--arm", "dense", "--out", tmp_path / "out", *flags) == (0, "")
    model = tmp_path / "out" / "arms" / "dense" / "seed0" / "checkpoint"
    assert_one_sentence(run("generate", model, "the film"), "expert_choice", "cannot generate")


@pytest.mark.parametrize("flags", [("train", "--seed", "-1"), ("train", "--sed", "1"), ("trian",)])
def test_a_wrong_flag_is_explained_without_a_traceback(run, flags):
    code, error = run(*flags)
    assert code == 2 and flags[-2 if len(flags) > 1 else 0] in error and "--help" in error
    assert "Traceback" not in error


def test_a_family_that_sees_the_future_is_said_aloud_before_training(monkeypatch, capsys, recipe, tmp_path):
    arguments = [
        "train",
        str(recipe),
        "--arm",
        "dense",
        "--out",
        str(tmp_path / "out"),
        "--set",
        "arms.dense.family=soft",
    ]
    monkeypatch.setattr("sys.argv", ["mixtura", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    said, trained = (
        next(i for i, line in enumerate(lines) if words in line) for words in ("sees the future", "step 1/")
    )
    assert said < trained


@pytest.mark.parametrize("damage", ["{", "{}", "[]", "3"])
@pytest.mark.parametrize("name", ["timing.json", "data.json", "results.json"])
def test_a_damaged_part_of_a_comparison_is_named_and_made_again(run, compared, name, damage):
    command, out = compared
    intact = (out / name).read_text(encoding="utf-8")
    (out / name).write_text(damage, encoding="utf-8")
    code, error = run(*command)
    if (name, damage) != ("results.json", "{}"):  # results.json is only written, but for the time it took
        assert_one_sentence((code, error), name, "delete it")
        (out / name).unlink()
        assert run(*command) == (0, "")
    assert json.loads((out / name).read_text(encoding="utf-8")).keys() == json.loads(intact).keys()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a finished comparison, when a test has made one."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def compared(run, tiny_recipe, once, tmp_path, monkeypatch):
    """The command of a finished comparison without its report, and a copy of its folder."""
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)
    recipe, out = once / "tiny.toml", once / "out"
    if not out.exists():
        recipe.write_text(recipe_to_toml(tiny_recipe(steps=2)), encoding="utf-8")
        assert run("compare", recipe, "--out", out) == (0, "")
    shutil.copytree(out, tmp_path / "out")
    return ("compare", recipe, "--out", tmp_path / "out"), tmp_path / "out"
