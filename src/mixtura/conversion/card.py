"""The model card of an export: where the model comes from, what it is, how it is loaded, and its receipt."""

import json
import re
from pathlib import Path

from mixtura.config import UserError
from mixtura.conversion.tensors import PlannedTensor
from mixtura.models import MixtureConfig

_BEGIN, _END = "<!-- receipt -->", "<!-- /receipt -->"
_EXPERT = re.compile(r"\.experts\.|\.(input|output)_linear\.|\.experts$")


def write_card(
    folder: Path, config: MixtureConfig, container: str, tensors: list[PlannedTensor], *, base_model: str | None
) -> None:
    """Writes README.md with the front matter that the hub reads; the receipt's place is empty."""
    title = folder.name.replace("\n", " ")
    lines = [*_front_matter(container, config, base_model), f"# {title}", "", *_provenance(container, base_model), ""]
    lines += [*_architecture(config, container, tensors), "", *_usage(container), ""]
    lines += ["## Receipt", "", _BEGIN, "Not compared yet: `mixtura verify SOURCE THIS` does.", _END, ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def set_receipt(folder: Path, table: str) -> None:
    """Puts a table into the card's place for it; a folder without such a card stays as it is."""
    file = folder / "README.md"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        file.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def _front_matter(container: str, config: MixtureConfig, base_model: str | None) -> list[str]:
    families = sorted(set(config.mlp_layer_types or []) - {"dense"})
    tags = ["mixtura", container, *(["moe"] if families else []), *(family.replace("_", "-") for family in families)]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys(tags)]
    if container == "remote_code":
        lines.append("- custom_code")
    if base_model is not None:
        if "\n" in base_model or not base_model.strip():
            raise UserError(f"The base model's name is {base_model!r}: give a hub name such as org/name.")
        lines += ["base_model:", f"- {json.dumps(base_model)}", "base_model_relation: finetune"]
    return [*lines, "---", ""]


def _provenance(container: str, base_model: str | None) -> list[str]:
    origin = f", made from {base_model}," if base_model else ""
    how = (
        "It brings its own model code, which needs torch and transformers alone."
        if container == "remote_code"
        else f"It is stored as a `{container}` checkpoint, an architecture of transformers; no code comes with it."
    )
    return [f"A language model{origin} exported with [Mixtura](https://pypi.org/project/mixtura/). {how}"]


def _architecture(config: MixtureConfig, container: str, tensors: list[PlannedTensor]) -> list[str]:
    families = config.mlp_layer_types or []
    total = sum(tensor.bytes // tensor.dtype.itemsize for tensor in tensors)
    routed = sum(tensor.bytes // tensor.dtype.itemsize for tensor in tensors if _EXPERT.search(tensor.name))
    rows = [
        ("container", container),
        ("layers", ", ".join(f"{families.count(family)} {family}" for family in dict.fromkeys(families))),
        ("parameters", f"{total:,}"),
    ]
    if "token_choice" in families:
        used = config.num_experts_per_tok / config.num_experts
        gates = f"{config.scoring_func}, {'summing to one' if config.norm_topk_prob else 'not normalised'}"
        rows += [
            ("parameters a token uses", f"{total - routed + round(routed * used):,}"),
            ("experts", f"{config.num_experts}, of which a token takes {config.num_experts_per_tok}"),
            ("gates", gates),
        ]
    if "mixture_of_tokens" in families:
        count = config.alone_top_k or config.num_experts * config.mixtures_per_expert
        mode = "population" if config.inference_mode == "population" else "alone"
        rows.append(
            ("mixtures of tokens", f"groups of {config.group_size} in training; here `{mode}`, {count} a token")
        )
    return ["## Model", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]


def _usage(container: str) -> list[str]:
    trust = ", trust_remote_code=True" if container == "remote_code" else ""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
    ]
