"""Text for training: documents to token windows, and parallel and labelled text for fine-tuning.

Documents go through sources, tokenizer, packing, the order of training, and a cache over all of it. Names are imported
when they are first asked for: processes that only tokenise would wait for torch longer than a small text takes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.data.labelled import LabelledCorpus, LabelledText, load_labelled
    from mixtura.data.packing import PackedTokens, ScheduledDataset, epoch_order, pack, sequence_index
    from mixtura.data.parallel import ParallelCorpus, SentencePair, load_parallel
    from mixtura.data.prepare import PreparedData, load_tokenizer, prepare_data, train_tokenizer
    from mixtura.data.sources import Corpus, load_corpus, source_files

__all__ = [
    "Corpus",
    "LabelledCorpus",
    "LabelledText",
    "PackedTokens",
    "ParallelCorpus",
    "PreparedData",
    "ScheduledDataset",
    "SentencePair",
    "epoch_order",
    "load_corpus",
    "load_labelled",
    "load_parallel",
    "load_tokenizer",
    "pack",
    "prepare_data",
    "sequence_index",
    "source_files",
    "train_tokenizer",
]

_MODULES = {
    "labelled": ("LabelledCorpus", "LabelledText", "load_labelled"),
    "packing": ("PackedTokens", "ScheduledDataset", "epoch_order", "pack", "sequence_index"),
    "parallel": ("ParallelCorpus", "SentencePair", "load_parallel"),
    "prepare": ("PreparedData", "load_tokenizer", "prepare_data", "train_tokenizer"),
    "sources": ("Corpus", "load_corpus", "source_files"),
}


def __getattr__(name: str) -> Any:
    """Imports the module that has the name."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"mixtura.data.{module}"), name)
    raise AttributeError(f"module 'mixtura.data' has no attribute {name!r}")
