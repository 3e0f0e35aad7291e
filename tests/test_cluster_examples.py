"""The examples for Slurm and Kubernetes: they parse, start torchrun, and name recipes, verbs and options that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mixtura.config import load_recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))


def check_command(words: list[str]) -> None:
    """`torchrun ... -m mixtura VERB RECIPE ...`, with an arm of that recipe where one is named."""
    assert words[0] == "torchrun" and "--nproc-per-node=8" in words and "--max-restarts=3" in words
    verb, recipe, *options = words[words.index("mixtura") + 1 :]
    assert words[words.index("mixtura") - 1] == "-m" and verb in ("compare", "train")
    loaded = load_recipe(ROOT / recipe)
    if "--arm" in options:
        assert options[options.index("--arm") + 1] in loaded.arms
    assert any(option.startswith("--out") for option in options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_batch_script_parses_and_starts_torchrun(script):
    text = script.read_text(encoding="utf-8")
    if bash := shutil.which("bash"):
        assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
    asked = dict(line.split("=", 1) for line in re.findall(r"^#SBATCH --(\S+)", text, re.MULTILINE) if "=" in line)
    assert asked["ntasks-per-node"] == "1" and asked["gpus-per-node"] == "8" and "#SBATCH --requeue" in text
    assert asked["signal"].startswith("TERM@")
    command = text.replace("\\\n", " ").strip().splitlines()[-1]
    words = shlex.split(command)
    check_command(words[words.index("torchrun") :])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_parses_and_starts_torchrun(manifest):
    service, job = yaml.safe_load_all(manifest.read_text(encoding="utf-8"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["command"])
    assert f"--nnodes={spec['completions']}" in container["command"] and spec["parallelism"] == spec["completions"]
    meeting = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv-endpoint={meeting}:29500" in container["command"]
    assert pod["subdomain"] == service["metadata"]["name"] and pod["terminationGracePeriodSeconds"] >= 60
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_there_are_both():
    assert SCRIPTS and MANIFESTS
