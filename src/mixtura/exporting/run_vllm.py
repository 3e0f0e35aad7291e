"""Run by an interpreter that has vLLM, as a script: log-probabilities of all tokens after each position.

It imports nothing of Mixtura's. Arguments: a request in JSON (`model`, `probes`), and the safetensors file to write.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import vllm  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed in {sys.executable}", file=sys.stderr)
    sys.exit(3)
import torch
from safetensors.torch import save_file


def log_probs(folder: str, probes: list[list[int]]) -> dict[str, torch.Tensor]:
    """(L, V) in float32 for each probe, by its number.

    vLLM gives the log-probabilities of a prompt's token after the first; so each probe goes in with a token more.
    """
    model = vllm.LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        max_logprobs=-1,
        enable_prefix_caching=False,
        trust_remote_code=False,
    )
    # Flat: a dictionary for every position and token of a large vocabulary would fill the memory.
    sampling = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False, flat_logprobs=True
    )
    prompts: Any = [{"prompt_token_ids": [*probe, probe[-1]]} for probe in probes]
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    return {str(number): _rows(output.prompt_logprobs) for number, output in enumerate(outputs)}


def _rows(flat: Any) -> torch.Tensor:
    """The first position has none; the token that was there comes first in every other, and again among all."""
    ids, values = torch.tensor(flat.token_ids), torch.tensor(flat.logprobs)
    bounds = list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]
    table = torch.full((len(bounds), int(ids.max()) + 1), float("-inf"))
    for row, (start, end) in zip(table, bounds, strict=True):
        row[ids[start:end]] = values[start:end]
    return table


def main() -> None:
    """Reads the request, runs the model and writes the answer beside its version."""
    request, answer = map(Path, sys.argv[1:3])
    asked = json.loads(request.read_text(encoding="utf-8"))
    save_file(log_probs(asked["model"], asked["probes"]), answer)
    answer.with_name("version.json").write_text(json.dumps(vllm.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
