"""`mixtura diagnose`: the model reads named texts once, and the choices of its experts are compared with the texts.

It reads short excerpts of each text. The counts are stored in `diagnosis.json`, and `diagnosis.html` shows them.

Shapes: T tokens that are counted, R routed rows, E experts, K experts a token is given, L length.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixtura.config import DataConfig, UserError
from mixtura.data.sources import read_documents
from mixtura.diagnostics.choices import routed_layers, unread_layers
from mixtura.diagnostics.excerpts import (
    TOKEN_TYPES,
    Excerpts,
    batches,
    cut_excerpts,
    token_surfaces,
    token_types,
    typical_tokens,
)
from mixtura.diagnostics.findings import (
    ByTokenType,
    Diagnosis,
    LayerDiagnosis,
    LayerLoad,
    LeakFindings,
    ModelFacts,
    ShownExcerpt,
    cautions,
    verdict,
)
from mixtura.diagnostics.health import summarize_load
from mixtura.diagnostics.leak import probe_causal_lm
from mixtura.diagnostics.page import render_page
from mixtura.diagnostics.specialization import ObservedChoices, describe_layer, observe
from mixtura.errors import is_utf8
from mixtura.files import replacing
from mixtura.models.inference import grouped_layers, mixing_layers, running_in
from mixtura.models.loading import load_model
from mixtura.results.json_form import to_plain

LONGEST_EXCERPT = 128
"""Tokens of an excerpt, at most: short excerpts are many, and permutations of many excerpts measure chance well."""

MAX_PROBED_PARAMETERS = 200_000_000
"""Larger models are not probed for leaks, which copies them to float64."""


def diagnose_texts(
    model_folder: Path,
    texts: Mapping[str, Sequence[str]],
    *,
    out: Path,
    max_tokens: int = 20_000,
    batch_size: int = 8,
    group_word: str = "text",
    command: str = "",
    seed: int = 0,
) -> Diagnosis:
    """Diagnoses the model in a folder on named texts; writes `diagnosis.json` and `diagnosis.html` into `out`.

    Args:
        model_folder: as `save_pretrained` writes it, tokenizer included: a checkpoint of this library or a Hugging Face
            model.
        texts: documents by the name of their group.
        out: folder to write; made if it is missing.
        max_tokens: of each group; the rest of its text is not read.
        batch_size: excerpts at once.
        group_word: what a group is called in sentences, such as "language pair".
        command: the command line, for the record.
        seed: of the permutations that measure chance.

    Returns:
        What diagnosis.json holds, see docs/diagnose.md.

    Raises:
        UserError: the model or a text cannot be used, or `out` cannot be written.
    """
    model, tokenizer = load_model(model_folder)
    results = diagnose_model(
        model,
        tokenizer,
        texts,
        name=str(model_folder),
        max_tokens=max_tokens,
        batch_size=batch_size,
        group_word=group_word,
        seed=seed,
    )
    results = dataclasses.replace(results, command=command)
    write_diagnosis(results, out)
    return results


def read_texts(sources: Sequence[str], *, text_column: str = "text") -> dict[str, list[str]]:
    """Documents by name, from "name=path" each; a path is a file or folder of .txt, .jsonl or .parquet.

    Raises:
        UserError: an argument has no name or path, a name comes twice, or a text cannot be read.
    """
    texts: dict[str, list[str]] = {}
    for source in sources:
        name, found, path = source.partition("=")
        if not is_utf8(name):
            raise UserError(f"'{source}' has a name that is not UTF-8 text: write another before the =.")
        if not found or not name.strip() or not path.strip():
            raise UserError(f"'{source}' names no text: write a name and a file, such as de=german.txt.")
        if name.strip() in texts:
            raise UserError(f"The name '{name.strip()}' comes twice: give each text a name of its own.")
        texts[name.strip()] = read_documents(DataConfig(source="local", path=path.strip(), text_column=text_column))
    return texts


def diagnose_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    name: str,
    max_tokens: int = 20_000,
    batch_size: int = 8,
    group_word: str = "text",
    seed: int = 0,
) -> Diagnosis:
    """As `diagnose_texts`, for a model that is loaded, and without writing; the model is unchanged afterwards.

    Raises:
        UserError: there is no text, or the model needs groups that the texts are not.
    """
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or LONGEST_EXCERPT
    excerpts = cut_excerpts(tokenizer, texts, length=min(longest, LONGEST_EXCERPT), max_tokens=max_tokens)
    return diagnose_excerpts(
        model, tokenizer, excerpts, name=name, batch_size=batch_size, group_word=group_word, seed=seed
    )


def diagnose_excerpts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    excerpts: Excerpts,
    *,
    name: str,
    batch_size: int = 8,
    group_word: str = "text",
    command: str = "",
    seed: int = 0,
    before_batch: Callable[[Tensor], object] | None = None,
) -> Diagnosis:
    """As `diagnose_model`, for text that is tokens already.

    `before_batch` is called with the groups (B,) of every batch, for a model that routes by groups and does not get
    them in its forward; such a model is not probed for leaks.

    Raises:
        UserError: the model needs groups that the excerpts are not.
    """
    surfaces = token_surfaces(tokenizer, excerpts.token_T.tolist())
    special = set(tokenizer.all_special_ids)
    types_T = numpy.array(
        token_types(
            [surfaces[token] for token in excerpts.token_T.tolist()],
            [token in special for token in excerpts.token_T.tolist()],
            starts=excerpts.starts_T.tolist(),
        )
    )
    facts, groups = _describe_model(model, name), excerpts.describe(types_T)
    leaks = _probe(model, by_group=before_batch is not None)
    layers: list[LayerDiagnosis] = []
    samples = excerpts.samples(tokenizer, surfaces)
    if routed_layers(model):
        with running_in(grouped_layers(model), "alone"):  # which is how they are deployed
            observed = observe(model, batches(model, tokenizer, excerpts, batch_size, before_batch))
        layers = [
            _layer(observed, place, excerpts, types_T, surfaces, seed=seed) for place in range(len(observed.layers))
        ]
        _add_experts(samples, observed, excerpts)
    return Diagnosis(
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command,
        model=facts,
        group_word=group_word,
        groups=groups,
        token_types=list(TOKEN_TYPES),
        layers=layers,
        samples=samples,
        leaks=leaks,
        cautions=cautions(facts, groups, layers, leaks),
        verdict=verdict(facts, groups, layers, group_word=group_word),
    )


def write_diagnosis(results: Diagnosis, out: Path) -> None:
    """Writes `diagnosis.json` and `diagnosis.html`, which appear under these names only when both are whole.

    Raises:
        UserError: the folder cannot be written.
    """
    numbers = json.dumps(to_plain(results), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    page = render_page(results)
    # A model's folder may have a name that UTF-8 cannot hold; JSON reads its escape back.
    form = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with replacing(out / "diagnosis.json") as json_file, replacing(out / "diagnosis.html") as html_file:
            json_file.write_text(numbers, **form)
            html_file.write_text(page, **form)
    except OSError as error:
        raise UserError(
            f"'{out}' cannot be written ({error.strerror or error}): make room, or choose another folder with --out."
        ) from error


def _describe_model(model: PreTrainedModel, name: str) -> ModelFacts:
    config: Any = model.config
    return ModelFacts(
        name=name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        num_layers=getattr(config, "num_hidden_layers", None),
        routed_layers=[layer.name for layer in routed_layers(model)],
        unread_layers=unread_layers(model),
        families=sorted(set(getattr(config, "mlp_layer_types", None) or [])),
        route_by=getattr(config, "route_by", "token"),
        expert_names=getattr(config, "expert_names", None),
        mode=_deployed_mode(model),
    )


def _deployed_mode(model: nn.Module) -> str:
    """The mode that the diagnosis runs the model in, in the words of `mixtura.evaluation.evaluation_modes`."""
    modes = {layer.inference_mode for layer in mixing_layers(model)}
    if modes:
        return "population" if "population" in modes else "alone"
    return "group" if unread_layers(model) else "causal"


def _layer(
    observed: ObservedChoices,
    place: int,
    excerpts: Excerpts,
    types_T: numpy.ndarray,
    surfaces: Mapping[int, str],
    *,
    seed: int,
) -> LayerDiagnosis:
    """One layer against the groups and the kinds of tokens, with its load and every expert's typical tokens."""
    by_group = describe_layer(observed, place, num_groups=len(excerpts.names), seed=seed)
    by_token = observed._replace(unit_T=numpy.arange(len(types_T)), group_U=types_T)
    by_type = describe_layer(by_token, place, num_groups=len(TOKEN_TYPES), seed=seed)
    expert_TK, rows_TK = observed.expert_TK[place], observed.rows_TK[place]
    typical = typical_tokens(
        numpy.repeat(excerpts.token_T, expert_TK.shape[1]),
        expert_TK.ravel().astype(numpy.int64),
        rows_TK.ravel(),
        num_experts=by_group.num_experts,
    )
    load_E = numpy.array(by_group.rows).sum(1)
    return LayerDiagnosis(
        **vars(by_group),
        token_types=ByTokenType(
            **{field.name: getattr(by_type, field.name) for field in dataclasses.fields(ByTokenType)}
        ),
        typical_tokens=[
            [
                dataclasses.replace(token, text=surfaces[token.id], share=token.share * by_group.rows_per_token)
                for token in own
            ]
            for own in typical
        ],
        load=LayerLoad(share=(load_E / load_E.sum()).tolist(), **dataclasses.asdict(summarize_load(load_E))),
    )


def _add_experts(samples: list[ShownExcerpt], observed: ObservedChoices, excerpts: Excerpts) -> None:
    """For every layer and token of the samples its experts, the strongest first; at most the first three."""
    ends = numpy.cumsum([len(ids) for ids in excerpts.ids])
    for sample in samples:
        start = int(ends[sample.excerpt]) - len(excerpts.ids[sample.excerpt])
        shown = slice(start, start + len(sample.pieces))
        for expert_TK, rows_TK in zip(observed.expert_TK, observed.rows_TK, strict=True):
            pairs = zip(expert_TK[shown, :3].tolist(), rows_TK[shown, :3].tolist(), strict=True)
            sample.experts.append([[e for e, rows in zip(*pair, strict=True) if rows > 0] for pair in pairs])


def _probe(model: PreTrainedModel, *, by_group: bool) -> LeakFindings:
    """Whether a token's logits depend on what it must not see, as deployed; or why that was not tried."""
    if model.num_parameters() > MAX_PROBED_PARAMETERS:
        limit = MAX_PROBED_PARAMETERS // 10**6
        return LeakFindings(
            probed=False, reason=f"The model has more than {limit} million parameters, too many to probe."
        )
    config: Any = model.config
    if by_group or getattr(config, "route_by", "token") != "token":
        return LeakFindings(
            probed=False, reason="Its experts are named for whole examples, and the probe has no languages."
        )
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    group_size = getattr(config, "group_size", None) if unread_layers(model) else None
    with running_in(grouped_layers(model), "alone"):  # which is how they are deployed
        report = probe_causal_lm(
            model, vocab_size=embeddings.num_embeddings, batch=group_size or 4, length=12, num_probes=12
        )
    return LeakFindings(probed=True, **report._asdict())
