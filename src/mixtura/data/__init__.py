"""Text to token windows: sources, tokenizer, packing, the order of training, and the cache over all of it."""

from mixtura.data.packing import PackedTokens, ScheduledDataset, epoch_order, pack, sequence_index
from mixtura.data.prepare import PreparedData, prepare_data
from mixtura.data.sources import Corpus, load_corpus, source_files
from mixtura.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "PackedTokens",
    "PreparedData",
    "ScheduledDataset",
    "epoch_order",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "prepare_data",
    "sequence_index",
    "source_files",
    "train_tokenizer",
]
