"""`mixtura diagnose` for any folder: translation models are read on their own test sentences, others on given texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtura.diagnostics.examine import diagnose_texts, read_texts, write_diagnosis
from mixtura.diagnostics.findings import Diagnosis
from mixtura.errors import need


@dataclass(frozen=True)
class Diagnosed:
    """What `diagnose` found and wrote."""

    folder: Path
    """Where `diagnosis.json` and `diagnosis.html` are."""
    headline: str
    """What the experts have learned, in a sentence."""
    record: Diagnosis
    """The content of diagnosis.json, see docs/diagnose.md."""


def diagnose(
    model: Path | str,
    texts: Sequence[str] | Mapping[str, Path | str] = (),
    *,
    out: Path | str = "diagnosis",
    text_column: str = "text",
    max_tokens: int = 20_000,
    command: str = "",
) -> Diagnosed:
    """Diagnoses the model in a folder, and writes `diagnosis.json` and `diagnosis.html` into `out`.

    Args:
        model: the folder of any causal language model; the `checkpoint` of a translation run needs no texts.
        texts: files by name, or as "name=path"; none for a translation run, whose test sentences are then read by
            language pair.
        out: folder to write; made if it is missing.
        text_column: key or column that holds the text.
        max_tokens: of each text.
        command: the command line, for the record.

    Raises:
        UserError: the model or a text cannot be used, or `out` cannot be written.
    """
    folder, out = Path(model), Path(out)
    sources = [f"{name}={path}" for name, path in texts.items()] if isinstance(texts, Mapping) else texts
    record = None
    if not sources:
        find = need("mixtura.tasks.translation.trained_model").diagnose_language_pairs
        record = find(folder, max_tokens=max_tokens, command=command)
    if record is not None:
        write_diagnosis(record, out)
    else:
        named = read_texts(sources, text_column=text_column)
        record = diagnose_texts(folder, named, out=out, max_tokens=max_tokens, command=command)
    return Diagnosed(out, record.verdict.headline, record)
