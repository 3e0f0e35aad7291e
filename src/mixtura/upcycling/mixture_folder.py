"""Sparse upcycling: a dense checkpoint becomes a mixture, one tensor after the other, with a receipt of what was done.

Komatsuzaki et al. 2022 (arXiv 2212.05055). The settings are in `mixtura.upcycling.request`, the arithmetic of one
layer in `mixtura.upcycling.routers`.

Shapes: E experts, D hidden, F width of an expert, C copies of the dense layer.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from mixtura import __version__
from mixtura.checkpoints.source import UPCYCLE_RECEIPT, DenseSource, check_alike, expected_shapes, open_source
from mixtura.checkpoints.tensors import copy_companions, write_shards
from mixtura.config import UserError
from mixtura.files import check_empty, free_bytes, new_folder
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.results import Facts
from mixtura.upcycling.request import (
    RouterStartKind,
    UpcycledFamily,
    UpcycleSettings,
    check_settings,
    is_exact,
    learning_warnings,
    mixture_config,
)
from mixtura.upcycling.routers import (
    GatedWeights,
    LayerStart,
    add_noise,
    generator_for,
    layer_starts,
    mean_of,
    redraw_channels,
)

_FORMAT = 1


def write_receipt(
    folder: Path,
    settings: UpcycleSettings,
    sources: Sequence[DenseSource],
    starts: Mapping[int, LayerStart],
    texts: Sequence[Path],
) -> None:
    """Writes the settings and hashes from which a reader can make the same mixture, or see that their files differ."""
    receipt = {
        "format": _FORMAT,
        "mixtura_version": __version__,
        "sources": [_source(source) for source in sources],
        "settings": dataclasses.asdict(settings),
        "layers": list(starts),
        "texts": [{"name": text.name, "sha256": _sha256(text) if text.is_file() else None} for text in texts],
        "exact": is_exact(settings, num_sources=len(sources)),
        "warnings": learning_warnings(settings, num_sources=len(sources)),
        "starts": {str(depth): _start(start) for depth, start in starts.items()},
    }
    (folder / UPCYCLE_RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _source(source: DenseSource) -> Facts:
    """The receipt's entry for a source; the hub client keeps a snapshot in a folder that is named by its commit."""
    commit = source.folder.name if re.fullmatch(r"[0-9a-f]{40}", source.folder.name) else None
    return {
        "name": source.name,
        "commit": commit,
        "attention": source.config.attention,
        "config_sha256": _sha256(source.folder / "config.json"),
        "files": {path.name: path.stat().st_size for path in source.weights.files},
    }


def _start(start: LayerStart) -> Facts:
    return {
        "router_spread": start.router.spread,
        "first_choices": start.router.load_C,
        "first_factor": start.first_factor,
        "second_factor": start.second_factor,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Upcycled:
    """What `upcycle` wrote."""

    folder: Path
    config: MixtureConfig
    exact: bool
    """Whether the mixture computes what the dense model does, up to rounding, whatever its router says."""
    layers: tuple[int, ...]
    """Depths of the mixtures, from 0."""
    warnings: tuple[str, ...]
    """What is bad for learning in these settings, and how to avoid it."""
    num_bytes: int
    """Of all tensors."""


def upcycle(
    source: str | Path,
    destination: str | Path,
    *,
    family: UpcycledFamily = "token_choice",
    num_experts: int = 8,
    top_k: int = 2,
    layers: str = "all",
    split: int = 1,
    shared: int = 0,
    drop: float = 0.0,
    noise: float = 0.0,
    normalize_top_k: bool = True,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    router: RouterStartKind = "random",
    router_spread: float | None = None,
    group_size: int | None = None,
    others: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    max_text_tokens: int = 4096,
    max_shard_bytes: int = 2 * 10**9,
    seed: int = 0,
) -> Upcycled:
    """Writes the mixture that a dense checkpoint becomes; reads and keeps one layer and one shard at a time.

    Args:
        source: a folder, a hub name or "smollm2": a dense Llama, Mistral, Qwen2, Qwen3 or gated Mixtura model.
        destination: a new folder; nothing is there unless all is.
        family: "token_choice" or "mixture_of_tokens".
        num_experts: routed experts of a layer.
        top_k: experts a token runs; for mixture of tokens `alone_top_k`.
        layers: "all", "later_half", or depths such as "0,4-11"; the others stay dense.
        split: parts that the columns of a layer are cut into, an expert each (granularity). An expert is then one part
            of a copy, the parts of a copy share their router rows at the start, and counts are multiples of the parts.
        shared: how many of the parts become the shared expert, which every token runs (token choice only).
        drop: share of every expert's channels that is drawn anew (Drop-Upcycling).
        noise: standard deviation of the noise on every expert's weights, relative to the weights' own.
        normalize_top_k: make a token's weights sum to one, which keeps the dense output exactly.
        score_function: "softmax" or "sigmoid".
        router: rows at the start: "random", "clusters" (of the layer's inputs on the texts) or "texts" (the mean input
            of each text, one for each copy).
        router_spread: standard deviation of a token's logits over the copies; without a text an estimate. None is 0.5,
            and 0.05 for mixture of tokens, whose output drifts from the dense model's as the spread grows.
        group_size: of mixture of tokens; by default the number of experts.
        others: further checkpoints of the same shape (branch-train-mix): copies are dealt to all in turn, and what is
            no expert is their mean.
        texts: files that the routers are brought to their spread on.
        max_text_tokens: tokens read of all texts together.
        max_shard_bytes: size of a file of weights.
        seed: of columns, redrawn channels, noise and router rows.

    Raises:
        UserError: the source cannot be used, the values do not fit together, or there is no room for the result.
    """
    settings = UpcycleSettings(
        family=family,
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        split=split,
        shared=shared,
        drop=drop,
        noise=noise,
        normalize_top_k=normalize_top_k,
        score_function=score_function,
        router=router,
        spread=router_spread,
        group_size=group_size,
        seed=seed,
    )
    names, paths = [str(name) for name in (source, *others)], [Path(text) for text in texts]
    check_settings(settings, num_sources=len(names), num_texts=len(paths))
    check_empty(Path(destination))
    return _run(settings, names, paths, Path(destination), max_text_tokens, max_shard_bytes)


def _run(
    settings: UpcycleSettings,
    names: list[str],
    texts: list[Path],
    out: Path,
    max_text_tokens: int,
    max_shard_bytes: int,
) -> Upcycled:
    sources = [open_source(name) for name in names]
    check_alike(sources)
    config = mixture_config(settings, sources[0].config)
    starts = layer_starts(settings, sources, texts, max_tokens=max_text_tokens)
    job = _Job(settings, sources, config, starts)
    _write(job, out, texts, max_shard_bytes)
    return Upcycled(
        folder=out,
        config=config,
        exact=is_exact(settings, num_sources=len(sources)),
        layers=tuple(starts),
        warnings=tuple(learning_warnings(settings, num_sources=len(sources))),
        num_bytes=_num_bytes(job),
    )


@dataclass(frozen=True)
class _Job:
    settings: UpcycleSettings
    sources: list[DenseSource]
    config: MixtureConfig
    starts: dict[int, LayerStart]

    def averaged(self, name: str) -> Tensor:
        """A tensor that is no expert: the source's, or the mean over all sources."""
        return mean_of([source.weights.read(name) for source in self.sources])


def _num_bytes(job: _Job) -> int:
    """Bytes of the result, every tensor in the dtype that the first source has there."""
    total = 0
    for name, shape in expected_shapes(job.config).items():
        kept = name in job.sources[0].weights.tensors
        origin = name if kept else f"{name.partition('.mlp.')[0]}.mlp.gate_proj.weight"
        total += torch.Size(shape).numel() * job.sources[0].weights.tensors[origin].dtype.itemsize
    return total


def _write(job: _Job, out: Path, texts: list[Path], max_shard_bytes: int) -> None:
    """Fills a folder beside the destination and puts it there when it is whole."""
    needed, free = _num_bytes(job), free_bytes(out)
    if needed > free:
        raise UserError(
            f"The mixture needs {needed / 1e9:.1f} GB and '{out.parent}' has {free / 1e9:.1f} GB left: make room, or "
            "name a folder on another disk."
        )
    try:
        with new_folder(out) as new:
            write_shards(new, _tensors(job), max_bytes=max_shard_bytes)
            job.config.save_pretrained(new)
            copy_companions(job.sources[0].folder, new)
            write_receipt(new, job.settings, job.sources, job.starts, texts)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{out}' cannot be written ({error}): check the folder and its disk.") from error


def _tensors(job: _Job) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the mixture, made when it is asked for."""
    written: set[int] = set()
    for name in expected_shapes(job.config):
        depth = _depth(name)
        if depth not in job.starts or ".mlp." not in name:
            yield name, job.averaged(name)
        elif depth not in written:
            written.add(depth)
            yield from _mixture_layer(job, depth)


def _depth(name: str) -> int:
    """The layer that a tensor belongs to; -1 for none."""
    pieces = name.split(".")
    return int(pieces[2]) if pieces[1] == "layers" else -1


def _mixture_layer(job: _Job, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Router, experts and shared expert of one layer."""
    settings, prefix = job.settings, f"model.layers.{depth}.mlp."
    width = job.config.intermediate_size
    order_F = torch.arange(width)
    if settings.split > 1:
        order_F = torch.randperm(width, generator=generator_for(settings.seed, depth, "columns"))
    index_PF = order_F.view(settings.split, -1)
    own_PF = index_PF[settings.shared :]
    gate_up_EHD, down_EDF = _experts(job, depth, own_PF)
    rows_ED = job.starts[depth].router.rows_CD.repeat_interleave(settings.parts, 0)
    yield f"{prefix}gate.weight", rows_ED.to(gate_up_EHD.dtype)
    yield f"{prefix}experts.gate_up_proj", gate_up_EHD
    del gate_up_EHD
    yield f"{prefix}experts.down_proj", down_EDF
    if settings.shared:
        names = [f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")]
        shared = GatedWeights(*map(job.averaged, names)).channels(index_PF[: settings.shared].flatten())
        for part, weight in zip(("gate", "up", "down"), shared, strict=True):
            yield f"{prefix}shared_expert.{part}_proj.weight", weight


def _experts(job: _Job, depth: int, own_PF: Tensor) -> tuple[Tensor, Tensor]:
    """First (E, 2F, D) and second (E, D, F) projections: copy by copy, each cut into its parts."""
    settings, start = job.settings, job.starts[depth]
    parts, width = own_PF.shape
    gate_up: Any = None
    down: Any = None
    for copy in range(settings.copies):
        source = job.sources[copy % len(job.sources)]
        weights = _dense_layer(source, depth).channels(own_PF.flatten())
        weights = redraw_channels(weights, settings.drop, generator_for(settings.seed, depth, copy, "drop"))
        weights = add_noise(weights, settings.noise, generator_for(settings.seed, depth, copy, "noise"))
        weights = weights.scaled(start.first_factor, start.second_factor)
        if gate_up is None:
            gate_up = weights.gate_FD.new_empty(settings.num_experts, 2 * width, weights.gate_FD.size(1))
            down = weights.down_DF.new_empty(settings.num_experts, weights.down_DF.size(0), width)
        rows = slice(copy * parts, (copy + 1) * parts)
        gate_up[rows, :width] = weights.gate_FD.unflatten(0, (parts, width))
        gate_up[rows, width:] = weights.up_FD.unflatten(0, (parts, width))
        down[rows] = weights.down_DF.unflatten(1, (parts, width)).transpose(0, 1)
    return gate_up, down


def _dense_layer(source: DenseSource, depth: int) -> GatedWeights:
    return GatedWeights(
        *(source.weights.read(f"model.layers.{depth}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    )
