"""lm-eval and transformers' pipeline on a tiny Mixtura model: scores do not depend on what shares a batch."""

import importlib
import json
from typing import Any

import pytest
import torch
from transformers import pipeline

from mixtura import cli
from mixtura.data import train_tokenizer
from mixtura.models import MixtureForCausalLM

TEXTS = [f"the ship number {number} leaves the harbour at night" for number in range(8)]
PROMPTS = ["the ship", "the ship number 3 leaves the", "at", "the harbour at night the ship"]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def build(tiny_config: Any, tokenizer: Any, family: str, **changes: Any) -> MixtureForCausalLM:
    size = max(tokenizer.get_vocab().values()) + 1
    config = tiny_config(family, vocab_size=size, initializer_range=0.3, group_size=2, **changes)
    return MixtureForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
@pytest.mark.parametrize(
    ("family", "changes", "invariant"),
    [
        ("dense", {}, True),
        ("token_choice", {}, True),
        ("mixture_of_tokens", {}, True),
        ("mixture_of_tokens", {"inference_mode": "group"}, False),
    ],
    ids=["dense", "token_choice", "mixture_of_tokens_alone", "mixture_of_tokens_in_groups"],
)
def test_scores_of_lm_eval_do_not_depend_on_the_batch_size(
    family: str, changes: dict[str, Any], invariant: bool, tiny_config: Any, tokenizer: Any
) -> None:
    """A mixture of tokens in training groups shows that the check can fail: its scores do depend on it."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    model = build(tiny_config, tokenizer, family, **changes)
    scores = []
    for batch_size in (1, 4):
        client = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        requests = [
            instance(request_type="loglikelihood", doc={}, arguments=(prompt, " leaves the harbour"), idx=index)
            for index, prompt in enumerate(PROMPTS)
        ]
        scores.append(torch.tensor([score for score, _ in client.loglikelihood(requests, disable_tqdm=True)]))
    assert (scores[0] < 0).all()
    assert torch.allclose(scores[0], scores[1], rtol=0, atol=1e-4) is invariant


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_a_pipeline_writes_the_same_text_alone_and_in_a_batch(family: str, tiny_config: Any, tokenizer: Any) -> None:
    model = build(tiny_config, tokenizer, family)
    writer: Any = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    alone = [writer(prompt, **settings)[0]["generated_text"] for prompt in PROMPTS]
    together = [output[0]["generated_text"] for output in writer(PROMPTS, batch_size=4, **settings)]
    assert together == alone and any(alone)


TASK = """
task: ships
dataset_path: json
dataset_kwargs:
  data_files: {test: "%s"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
metric_list:
  - metric: acc
    higher_is_better: true
metadata: {version: 1.0}
"""


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_task_of_ones_own_is_scored_as_deployed(
    tiny_config: Any, tokenizer: Any, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    """The scores are those of the model itself, and of no task that does not exist."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    ends = [" leaves the harbour", " at night", " ship number 3"]
    rows = [{"start": prompt, "ends": ends} for prompt in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "ships.yaml").write_text(TASK % (tmp_path / "rows.jsonl"), encoding="utf-8")
    model = build(tiny_config, tokenizer, "mixture_of_tokens")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(*flags: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["mixtura", "evaluate", str(tmp_path / "model"), *flags])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    code, text, _ = run("--tasks", "ships", "--task-folder", str(tmp_path), "--json")
    (found,) = json.loads(text)
    right = [max(ends, key=lambda end: log_likelihood(model, tokenizer, prompt, end)) == ends[0] for prompt in PROMPTS]
    assert code == 0 and (found["task"], found["metric"], found["examples"]) == ("ships", "acc", len(PROMPTS))
    assert found["value"] == pytest.approx(sum(right) / len(PROMPTS))
    code, text, _ = run("--tasks", "ships", "--task-folder", str(tmp_path), "--limit", "2")
    assert code == 0 and text.startswith("ships ") and "(2 examples)" in text
    code, _, told = run("--tasks", "ship", "--task-folder", str(tmp_path))
    assert code == 2 and "lm-eval has no task 'ship': there are ships" in told


def log_likelihood(model: Any, tokenizer: Any, prompt: str, end: str) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + end)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
