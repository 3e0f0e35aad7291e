"""What travels with a model's weights from folder to folder: tokenizer, chat template, generation settings, licence."""

import shutil
from pathlib import Path

COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
"""Patterns of file names. The licence goes along because the weights may be passed on under it alone."""


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that are there; those of the same name in `folder` are replaced."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
