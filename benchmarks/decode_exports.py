"""Times `generate` of exported models in transformers, and llama.cpp on them, beside Mixtura's own.

Gated SiLU models with random weights at equal active width, exported as a user would: dense to llama, token choice to
mixtral, mixture of tokens (mode `alone`, the best two mixtures) to a folder with its own code. One sequence or several,
on one thread, greedy, each engine's `generate`; llama.cpp, which is called token by token, has one sequence. Rounds
alternate between the engines, and a time is the processor time of all new tokens, the short prompt included.

Run `python benchmarks/decode_exports.py --llama PYTHON --converter FOLDER`, where PYTHON has llama-cpp-python and what
llama.cpp's converter needs, and FOLDER is llama.cpp's source; without them its rows are left out. The rows are stored
under benchmarks/results/ with versions and hardware.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode import PROMPT, decode  # beside this file
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.benchmarks.measure import alternating, store_record
from mixtura.models import MixtureConfig, MixtureForCausalLM

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 2048
FORMS = {
    "dense": ("dense", "llama"),
    "token choice, top 2": ("token_choice", "mixtral"),
    "MoT alone, top 2": ("mixture_of_tokens", "remote_code"),
}
"""By name: the family, and where it is exported to."""
IN_LLAMA_CPP = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import llama_cpp
from run_llama_cpp import to_gguf
folder, converter, file, tokens, prompt = sys.argv[2:5] + [int(number) for number in sys.argv[5:7]]
from pathlib import Path
if not Path(file).exists():
    to_gguf(folder, converter, Path(file))
model = llama_cpp.Llama(file, n_ctx=512, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
import numpy as np
for _ in range(2):  # the first time is for warming up
    model.reset()
    started = time.process_time()
    model.eval([5] * prompt)
    for _ in range(tokens - 1):
        row = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
        model.eval([int(row.argmax())])
    seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "version": llama_cpp.__version__}))
"""


def build(form: str, hidden: int, layers: int, experts: int) -> MixtureForCausalLM:
    """The model of a form; two experts of a token are as wide as the dense layer."""
    torch.manual_seed(0)
    family = FORMS[form][0]
    settings: dict[str, Any] = {}
    if family == "token_choice":
        settings = {"num_experts_per_tok": 2, "norm_topk_prob": True}
    elif family == "mixture_of_tokens":
        settings = {"alone_top_k": 2, "group_size": experts}
    config = MixtureConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        moe_intermediate_size=3 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        mlp_layer_types=[family] * layers,
        num_experts=experts,
        hidden_act="silu",
        gated=True,
        **settings,
    )
    return MixtureForCausalLM(config).eval()


def llama_cpp_seconds(options: argparse.Namespace, folder: Path, tokens: int) -> tuple[float, str]:
    """Processor seconds of llama.cpp for one sequence, and its package's version."""
    script = Path(mixtura.__file__).parent / "exporting"
    arguments = [script, folder, options.converter, folder / "model.gguf", tokens, PROMPT]
    done = subprocess.run(
        [options.llama, "-c", IN_LLAMA_CPP, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"llama.cpp: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["seconds"], found["version"]


def rows_of(options: argparse.Namespace, work: Path) -> tuple[list[dict[str, Any]], str | None]:
    """A row for each form, engine and number of sequences, and llama.cpp's version."""
    rows: list[dict[str, Any]] = []
    version = None
    for form, (_, container) in FORMS.items():
        own = build(form, options.hidden, options.layers, options.experts)
        source, folder = work / form.replace(" ", "-") / "own", work / form.replace(" ", "-") / "export"
        own.save_pretrained(source)
        mixtura.export(source, folder, to=container)
        remote = container == "remote_code"
        stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote).eval()
        for batch in options.batch:
            runs = {
                "Mixtura": decode(own, batch, options.tokens),
                f"transformers, {container.replace('_', ' ')}": decode(stock, batch, options.tokens),
            }
            seconds = alternating(runs, rounds=options.rounds, repeats=1)
            if options.llama and batch == 1 and not remote:
                measured = [llama_cpp_seconds(options, folder, options.tokens) for _ in range(options.rounds)]
                seconds["llama.cpp"], version = [took for took, _ in measured], measured[0][1]
            for engine, taken in seconds.items():
                rate = batch * options.tokens / statistics.median(taken)
                rows.append({"form": form, "engine": engine, "batch": batch, "tokens_per_second": rate})
                print(f"{time.strftime('%H:%M:%S')} {form}, batch {batch}, {engine}: {rate:,.0f} tokens/s", flush=True)
    return rows, version


def main() -> None:
    """Measures and stores the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="layers, all mixtures")
    parser.add_argument("--experts", type=int, default=16, help="experts, and tokens of a training group")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--llama", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--converter", help="llama.cpp's source, with convert_hf_to_gguf.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows, version = rows_of(options, Path(work))
    shown = {key: getattr(options, key) for key in ("hidden", "layers", "experts", "tokens", "rounds")}
    path = store_record(RESULTS, "served", settings=shown | {"llama_cpp_python": version}, rows=rows)
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
