"""The model card of an export: where the model comes from, what it is, how it is loaded, and its receipt."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixtura import __version__
from mixtura.checkpoints.source import UPCYCLE_RECEIPT
from mixtura.checkpoints.tensors import PlannedTensor
from mixtura.config import UserError
from mixtura.files import write_text
from mixtura.models import MixtureConfig

_BEGIN, _END = "<!-- receipt -->", "<!-- /receipt -->"
_EXPERT = re.compile(r"\.experts\.|\.(input|output)_linear\.|\.experts$")


class Origin(NamedTuple):
    """Where a model comes from, as far as its folder says."""

    base_models: tuple[str, ...] = ()
    """Hub names."""
    settings: tuple[tuple[str, str], ...] = ()
    """How it was made of them."""


def origin_of(folder: Path, base_model: str | None) -> Origin:
    """From the name that the user gives, or else from what upcycling left in the folder.

    Raises:
        UserError: the name cannot be a hub name.
    """
    if base_model is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model, re.ASCII):
        raise UserError(f"The base model's name is {base_model!r}: give a hub name such as org/name.")
    given = () if base_model is None else (base_model,)
    try:
        record: Any = json.loads((folder / UPCYCLE_RECEIPT).read_text(encoding="utf-8"))
        names = [str(source["name"]) for source in record["sources"]]
        settings = tuple((str(key), _plain(value)) for key, value in record["settings"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Origin(given)
    # A folder's path means nothing to a reader, and is not for the public.
    public = tuple(name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII))
    return Origin(given or public, settings)


def _plain(value: Any) -> str:
    """A value for a table; texts that may be paths keep their last part."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return Path(value).name if isinstance(value, str) else str(value)


def write_card(
    folder: Path, config: MixtureConfig, container: str, tensors: list[PlannedTensor], origin: Origin
) -> None:
    """Writes README.md with the front matter that the hub reads; the receipt's place is empty."""
    lines = [*_front_matter(container, config, origin), f"# {folder.name}", "", _provenance(container, origin), ""]
    lines += [*_architecture(config, container, tensors), "", *_making(origin), *_usage(container), ""]
    lines += ["## Receipt", "", _BEGIN, "Not compared yet: `mixtura verify SOURCE THIS` does.", _END, ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _making(origin: Origin) -> Iterator[str]:
    if origin.settings:
        yield from ("## How it was upcycled", "", "| setting | value |", "| --- | --- |")
        yield from (f"| {key} | {value.replace('|', '/')} |" for key, value in origin.settings)
        yield ""


def set_receipt(folder: Path, table: str) -> None:
    """Puts a table into the card's place for it; a folder without such a card stays as it is."""
    file = folder / "README.md"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        write_text(file, f"{before}{_BEGIN}\n{table}\n{_END}{after}")


def _front_matter(container: str, config: MixtureConfig, origin: Origin) -> list[str]:
    families = sorted(set(config.mlp_layer_types or []) - {"dense"})
    tags = ["mixtura", container, *(["moe"] if families else []), *(family.replace("_", "-") for family in families)]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys(tags)]
    if container == "remote_code":
        lines.append("- custom_code")
    if origin.base_models:
        relation = "finetune" if len(origin.base_models) == 1 else "merge"
        lines += ["base_model:", *(f"- {name}" for name in origin.base_models), f"base_model_relation: {relation}"]
    return [*lines, "---", ""]


def _provenance(container: str, origin: Origin) -> str:
    made = f" made from {' and '.join(origin.base_models)}," if origin.base_models else ""
    how = (
        "It brings its own model code, which needs torch and transformers alone."
        if container == "remote_code"
        else f"It is stored as a `{container}` checkpoint, an architecture of transformers; no code comes with it."
    )
    return f"A language model{made} exported with [Mixtura](https://pypi.org/project/mixtura/) {__version__}. {how}"


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
