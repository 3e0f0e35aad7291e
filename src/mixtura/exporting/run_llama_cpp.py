"""Run by an interpreter that has llama-cpp-python, as a script: log-probabilities of all tokens after each position.

It imports nothing of Mixtura's. The model goes through llama.cpp's own converter, to float32 and without a vocabulary:
token ids go in, and the converter would refuse a tokenizer that it has not met. Arguments: a request in JSON (`model`,
`probes`, `converter`, the folder of llama.cpp's source), and the safetensors file to write.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

try:
    import llama_cpp  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed in {sys.executable}", file=sys.stderr)
    sys.exit(3)
import numpy as np
from safetensors.numpy import save_file


def to_gguf(model: str, converter: str, file: Path) -> None:
    """Writes the model as llama.cpp's converter does, but for its vocabulary."""
    sys.path[:0] = [converter, str(Path(converter, "gguf-py"))]
    convert_hf_to_gguf: Any = import_module("convert_hf_to_gguf")
    text_model: Any = sys.modules["conversion.base"].TextModel

    def without_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    def patch(cls: Any) -> None:
        cls.set_vocab = without_vocabulary
        for below in cls.__subclasses__():
            patch(below)

    original = convert_hf_to_gguf.get_model_class

    def patched_class(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        patch(text_model)
        return found

    convert_hf_to_gguf.get_model_class = patched_class
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", str(file), "--outtype", "f32"]
    convert_hf_to_gguf.main()


def log_probs(file: Path, probes: list[list[int]]) -> dict[str, np.ndarray]:
    """(L, V) in float32 for each probe, by its number; the cache is float32 too."""
    model = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    found = {}
    for number, probe in enumerate(probes):
        model.reset()
        model.eval(probe)
        logits = np.array(model.scores[: len(probe)], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        found[str(number)] = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    return found


def main() -> None:
    """Reads the request, converts and runs the model and writes the answer beside its version."""
    request, answer = map(Path, sys.argv[1:3])
    asked = json.loads(request.read_text(encoding="utf-8"))
    converter = asked["converter"] or os.environ.get("LLAMA_CPP_SOURCE", "")
    if not Path(converter, "convert_hf_to_gguf.py").is_file():
        print(f"convert_hf_to_gguf.py is not in '{converter}': give llama.cpp's source", file=sys.stderr)
        sys.exit(3)
    file = request.with_name("model.gguf")
    to_gguf(asked["model"], converter, file)
    save_file(log_probs(file, asked["probes"]), answer)
    answer.with_name("version.json").write_text(json.dumps(llama_cpp.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
