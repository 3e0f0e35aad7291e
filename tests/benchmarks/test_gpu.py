"""The script for a GPU runs to its end without one, and keeps to its time."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script with arguments and returns its record."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["gpu.py", "--rounds", "1", "--out", str(tmp_path), *arguments])
        script.main()
        (path,) = tmp_path.glob("gpu-*.json")
        return json.loads(path.read_text())

    before = torch.get_default_dtype()
    yield start
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def test_smoke_run_measures_every_family_and_stores_it(run):
    record = run("--smoke")
    assert not record["left_out"] and record["settings"]["smoke"]
    rows = {(row["contender"], row["pass"]): row for row in record["layers"]}
    for name in ("token choice", "token choice, without Triton", "mixture of tokens", "soft", "expert choice"):
        for what in ("forward", "training"):
            row = rows[name, what]
            assert row["milliseconds"] > 0 and row["to_dense"] > 0 and row["utilisation"] > 0 and row["launches"] > 0
    assert {row["family"] for row in record["models"]} == {"token_choice", "expert_choice", "mixture_of_tokens"}


def test_nothing_is_begun_when_the_time_is_used_up_and_all_of_it_is_named(run, capsys):
    record = run("--smoke", "--budget", "0")
    assert not record["layers"] and not record["models"]
    assert any("token choice, training" in name for name in record["left_out"])
    assert "Left out: training steps of token_choice: the time was used up." in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_to_do(run, capsys):
    with pytest.raises(SystemExit):
        run()
    assert "--smoke" in capsys.readouterr().err
