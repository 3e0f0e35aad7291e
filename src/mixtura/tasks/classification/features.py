"""Labelled texts as a classifier reads them: as tokens, or as the pooled vectors of a frozen model, computed once.

A frozen model answers the same for every seed, arm and epoch. Its normalised, pooled hidden states, M vectors a text,
are therefore computed once for a whole comparison and kept on disk, under a name that hashes what decides them: the
model's weights, the tokens, how they are pooled, and the library versions. An entry whose content does not match its
checksum is computed anew.

Shapes: N texts, B batch, L tokens of a text, M hidden states, D hidden.
"""

import dataclasses
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mixtura.checkpoints.quantized import plain
from mixtura.config import HeadConfig, UserError
from mixtura.data.packing import sequence_index
from mixtura.files import cache_entry, checksum
from mixtura.tasks.classification.heads import pool_states
from mixtura.training.interface import Batch

# Raise it when the same model and texts would give other features than before.
CACHE_FORMAT = 1
# Texts at once when features are computed; sorted by length, so that little of it is padding.
FEATURE_BATCH = 64
_FEATURES, _MANIFEST = "features.npy", "features.json"


class Examples(ABC):
    """Labelled texts in a fixed order, ready to be fed to a classifier."""

    labels: np.ndarray
    """(N,) int64; where a text may have several labels, (N, C) float32 of 0 and 1."""
    length_N: np.ndarray
    """(N,) tokens of each text."""

    @abstractmethod
    def item(self, index: int) -> Batch:
        """Example `index` with its label."""

    @abstractmethod
    def collate(self, items: Sequence[Batch]) -> dict[str, Tensor]:
        """A batch: what the classifier's forward takes, and `labels` (B,)."""

    @abstractmethod
    def chosen(self, row_K: np.ndarray) -> "Examples":
        """Those examples whose places are in (K,) int64, in that order."""

    @abstractmethod
    def part(self, rows: slice) -> "Examples":
        """Some of the examples, in their order."""


@dataclass(frozen=True)
class TokenExamples(Examples):
    """Texts as token ids."""

    ids: list[np.ndarray]
    labels: np.ndarray
    length_N: np.ndarray
    truncated: int
    """Texts that were longer and lost their end."""
    pad_token_id: int

    def item(self, index: int) -> Batch:
        """`input_ids` and the label."""
        return {"input_ids": self.ids[index], "labels": _label(self.labels, index)}

    def collate(self, items: Sequence[Batch]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L) with padding behind the longest, and `labels` (B,)."""
        longest = max(len(item["input_ids"]) for item in items)
        ids_BL = torch.full((len(items), longest), self.pad_token_id)
        mask_BL = torch.zeros(len(items), longest, dtype=torch.int64)
        for row, item in enumerate(items):
            ids = torch.from_numpy(item["input_ids"].astype(np.int64))
            ids_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": _labels(items)}

    def chosen(self, row_K: np.ndarray) -> "TokenExamples":
        """Those examples; cut texts as in `part`."""
        ids = [self.ids[row] for row in row_K]
        return dataclasses.replace(self, ids=ids, labels=self.labels[row_K], length_N=self.length_N[row_K])

    def part(self, rows: slice) -> "TokenExamples":
        """Some of the examples; the number of cut texts stays that of all, as it is not known for each text."""
        return dataclasses.replace(self, ids=self.ids[rows], labels=self.labels[rows], length_N=self.length_N[rows])


@dataclass(frozen=True)
class FeatureExamples(Examples):
    """Texts as the pooled hidden states of a frozen model."""

    features_NMD: np.ndarray
    labels: np.ndarray
    length_N: np.ndarray

    def item(self, index: int) -> Batch:
        """`features` (M, D) and the label."""
        return {"features": self.features_NMD[index], "labels": _label(self.labels, index)}

    def collate(self, items: Sequence[Batch]) -> dict[str, Tensor]:
        """`features` (B, M, D) and `labels` (B,)."""
        stacked_BMD = np.stack([item["features"] for item in items])
        return {"features": torch.from_numpy(stacked_BMD), "labels": _labels(items)}

    def chosen(self, row_K: np.ndarray) -> "FeatureExamples":
        """Those examples."""
        return FeatureExamples(self.features_NMD[row_K], self.labels[row_K], self.length_N[row_K])

    def part(self, rows: slice) -> "FeatureExamples":
        """Some of the examples."""
        return FeatureExamples(self.features_NMD[rows], self.labels[rows], self.length_N[rows])

    def one_state(self, layer: int) -> "FeatureExamples":
        """The same examples with one hidden state alone, M = 1; -1 is the last."""
        index = layer % self.features_NMD.shape[1]
        return dataclasses.replace(self, features_NMD=self.features_NMD[:, index : index + 1])


def few_of_each_class(labels: np.ndarray, rows: int, *, seed: int) -> np.ndarray:
    """Places of `rows` random examples of each class, or of all that it has; fewer rows are the first of more rows.

    Where a text may have several labels, it counts for each of them; texts without any are drawn like a class.
    """
    draw = np.random.default_rng(seed)
    if labels.ndim == 1:
        members = [labels == label for label in np.unique(labels)]
    else:
        members = [*(labels.T > 0), ~labels.any(1)]
    classes = [draw.permutation(np.flatnonzero(of)) for of in members]
    return np.unique(np.concatenate([of[:rows] for of in classes]))


class ScheduledExamples(Dataset):
    """Everything one run trains on, in order: item i is a function of (seed, i), whatever the arm."""

    def __init__(self, examples: Examples, *, length: int, seed: int) -> None:
        """Schedules `length` = steps * batch size * accumulation * ranks examples, epochs as needed."""
        self.examples, self.length, self.seed = examples, length, seed

    def __len__(self) -> int:
        """Examples in the run, repeats counted."""
        return self.length

    def __getitem__(self, position: int) -> Batch:
        """The example at `position` of the run."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a schedule of {self.length} examples")
        count = len(self.examples.labels)
        return self.examples.item(sequence_index(position, num_sequences=count, seed=self.seed))


def encode_texts(
    texts: Sequence[str], labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> TokenExamples:
    """Texts as tokens with the tokenizer's own special tokens, cut to `max_length`, cuts counted.

    A text without any token, such as an empty one where the tokenizer adds no special tokens, becomes one end-of-text
    token.
    """
    tokenizer_: Any = tokenizer
    tokenizer_.truncation_side = "right"
    encoded = tokenizer_(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    longer = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    blank = [tokenizer_.eos_token_id or 0]
    ids = [np.asarray(row or blank, dtype=np.int32) for row in encoded["input_ids"]]
    pad = tokenizer_.pad_token_id
    lengths = np.array([len(row) for row in ids])
    return TokenExamples(ids, labels, lengths, longer, 0 if pad is None else pad)


def pooled_features(
    base: nn.Module,
    examples: TokenExamples,
    head: HeadConfig,
    *,
    cache_dir: Path | None,
    on_progress: Callable[[str], None],
) -> np.ndarray:
    """(N, M, D) float32: every text's normalised and pooled hidden states, from the cache where they are in it.

    Args:
        base: the frozen model.
        examples: the texts.
        head: its `pooling` and `normalization` decide.
        cache_dir: folder of cache entries, made when missing; None caches nothing.
        on_progress: called with a phrase when the slow part begins.

    Raises:
        UserError: the cache folder cannot be written.
    """
    if cache_dir is None:
        on_progress("computing features")
        return compute_features(base, examples, head)
    entry = cache_dir / f"features-{_cache_key(base, examples, head)}"
    cached = _load(entry)
    if cached is not None:
        on_progress("loading cached features")
        return cached
    on_progress("computing features")
    features_NMD = compute_features(base, examples, head)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _store(features_NMD, entry)
    except OSError as error:
        raise UserError(
            f"The cache folder '{cache_dir}' cannot be written ({error.strerror}): name another or make room."
        ) from error
    return features_NMD


@torch.no_grad()
def compute_features(base: nn.Module, examples: TokenExamples, head: HeadConfig) -> np.ndarray:
    """(N, M, D) float32, one pass of the model in evaluation mode over all texts."""
    was_training = base.training
    base.eval()
    device = next(base.parameters()).device
    order_N = np.argsort(examples.length_N, kind="stable")
    features_NMD: np.ndarray | None = None
    for start in range(0, len(order_N), FEATURE_BATCH):
        chosen = order_N[start : start + FEATURE_BATCH]
        batch = examples.collate([examples.item(int(index)) for index in chosen])
        mask_BL = batch["attention_mask"].to(device)
        states = hidden_states(base, batch["input_ids"].to(device), mask_BL)
        pooled_BMD = pool_states(states, mask_BL, head).float().cpu().numpy()
        if features_NMD is None:
            features_NMD = np.empty((len(order_N), *pooled_BMD.shape[1:]), dtype=np.float32)
        features_NMD[chosen] = pooled_BMD
    base.train(was_training)
    assert features_NMD is not None, "load_labelled never gives an empty corpus"
    return features_NMD


def hidden_states(base: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, ...]:
    """M tensors (B, L, D): the embeddings and the output of every layer of an encoder or decoder without head."""
    return base(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states


def weights_digest(module: nn.Module) -> str:
    """128 bits over the names and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        value = plain(value)
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data if value.dim() else b"")
    return digest.hexdigest()


def _label(labels: np.ndarray, index: int) -> int | np.ndarray:
    return int(labels[index]) if labels.ndim == 1 else labels[index]


def _labels(items: Sequence[Batch]) -> Tensor:
    """(B,) int64 or (B, C) float32."""
    return torch.from_numpy(np.stack([item["labels"] for item in items]))


def _cache_key(base: nn.Module, examples: TokenExamples, head: HeadConfig) -> str:
    tokens = hashlib.blake2b(digest_size=16)
    for row in examples.ids:
        tokens.update(len(row).to_bytes(4, "little") + row.tobytes())
    parts = {
        "format": CACHE_FORMAT,
        "weights": weights_digest(base),
        "tokens": tokens.hexdigest(),
        "pooling": head.pooling,
        "normalization": head.normalization,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _store(features_NMD: np.ndarray, entry: Path) -> None:
    with cache_entry(entry) as new:
        np.save(new / _FEATURES, features_NMD, allow_pickle=False)
        (new / _MANIFEST).write_text(json.dumps({"checksum": checksum(new / _FEATURES)}), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # what is there does not match its checksum


def _load(entry: Path) -> np.ndarray | None:
    """The entry, or None when it is missing or changed; it stays on disk, and only what is read comes to memory."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["checksum"] != checksum(entry / _FEATURES):
            return None
        return np.load(entry / _FEATURES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
