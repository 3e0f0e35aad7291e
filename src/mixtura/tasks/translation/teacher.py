"""Sequence-level distillation: a teacher's translations as the targets that a smaller model is trained on.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv 1606.07947, section 3.2). Only training pairs change:
validation and test keep their own targets, and a translation that is the text of a held-out pair is left out.

A model's translations are kept, a line each, in a file that is named by a hash of the model's files, the sentences and
the beams. It grows by some hundred lines at a time, so a run that was stopped goes on from there.
"""

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mixtura.checkpoints.source import hub_folder
from mixtura.config import UserError
from mixtura.config.languages import split_pair
from mixtura.data.held_out import normalise
from mixtura.data.parallel import ParallelCorpus, SentencePair
from mixtura.errors import reason_of
from mixtura.files import checksum
from mixtura.tasks.translation.engine import DIRECTIONS, PACKAGE, engine_version, translated
from mixtura.tasks.translation.trained_model import Translator

AT_ONCE = 256
"""Sentences between two writes of the cache."""
QUIET_SECONDS = 20.0
"""Until the next word on how far a teacher has come."""
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt"]
_TOO_LONG, _CUT = "too long for it", "cut at its longest"


class Said(NamedTuple):
    """What a teacher makes of a sentence."""

    source: str
    output: str | None
    reason: str = ""
    """Why there is no output."""


Translations = dict[tuple[str, str], Said]
"""By direction and source."""
Speaker = Callable[[list[str]], list[Said]]
"""What a teacher makes of some sentences, in their order."""


def with_teacher(
    corpus: ParallelCorpus,
    teacher: str,
    *,
    num_beams: int,
    cache_dir: Path | None,
    on_progress: Callable[[str], None],
) -> ParallelCorpus:
    """The corpus with the teacher's targets in its training pairs, beside their own if `data.teacher_mix` says so.

    Args:
        corpus: whose `config` has the recipe's data section.
        teacher: a model folder, a hub name, the name of the package with a production engine, or a .jsonl file with
            "source" and "output", and with "pair" where there are several directions, as `outputs.jsonl` of a run has
            them.
        num_beams: of a model's search; 1 is greedy.
        cache_dir: where a model's translations are kept; None keeps none.
        on_progress: called with a sentence when translating begins, and with one that says how many were taken.

    Raises:
        UserError: the teacher cannot be read or run, or no training pair has a translation of it.
    """
    sources: dict[str, dict[str, None]] = {}
    for pair in corpus.train:
        sources.setdefault(pair.pair, {})[pair.source] = None
    if teacher.endswith(".jsonl"):
        found = _read_outputs(Path(teacher), tuple(sources))
    else:
        asked = {direction: list(texts) for direction, texts in sources.items()}
        found = _translate(teacher, asked, num_beams=num_beams, cache_dir=cache_dir, on_progress=on_progress)
    taught, left_out = _taught(corpus, found)
    missed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    said = f"{len(taught):,} of {len(corpus.train):,} training pairs take the translation of the teacher {teacher}"
    said += f" (left out: {missed})" if missed else ""
    if not taught:
        raise UserError(f"{said}: give a teacher of these sentences, or leave out 'data.teacher'.")
    on_progress(said)
    train = _beside(corpus.train, taught) if corpus.config.teacher_mix else list(taught.values())
    per_direction = Counter(pair.pair for pair in train)
    return dataclasses.replace(
        corpus,
        train=train,
        description=f"{corpus.description}; {said}{', beside their own' if corpus.config.teacher_mix else ''}",
        counts={pair: {**sides, "train": per_direction[pair]} for pair, sides in corpus.counts.items()},
    )


def _taught(corpus: ParallelCorpus, found: Translations) -> tuple[dict[int, SentencePair], Counter[str]]:
    """Training pairs with the teacher's targets, by their place, and a count of those without, by reason."""
    held_out = {normalise(text) for pair in (*corpus.validation, *corpus.test) for text in pair[:2]}
    taught: dict[int, SentencePair] = {}
    left_out: Counter[str] = Counter()
    for place, pair in enumerate(corpus.train):
        said = found.get((pair.pair, pair.source), Said(pair.source, None, "not translated"))
        translation, reason = said.output, said.reason
        if translation is not None:
            reason = _fault(pair, translation, held_out, corpus.config.max_characters)
        if translation is None or reason:
            left_out[reason] += 1
        else:
            taught[place] = pair._replace(target=translation)
    return taught, left_out


def _fault(pair: SentencePair, translation: str, held_out: set[str], max_characters: int | None) -> str:
    """Why nothing is learnt from a translation, by the rules for any pair; empty where something is."""
    if not translation:
        return "empty"
    if max_characters is not None and len(translation) > max_characters:
        return "longer than 'data.max_characters'"
    key = normalise(translation)
    if key == normalise(pair.source):
        return "untranslated"
    return "equal to held-out text" if key in held_out else ""


def _beside(own: Sequence[SentencePair], taught: Mapping[int, SentencePair]) -> list[SentencePair]:
    """Every pair, followed by the one with the teacher's target where that differs."""
    both = []
    for place, pair in enumerate(own):
        both.append(pair)
        if place in taught and taught[place].target != pair.target:
            both.append(taught[place])
    return both


def _read_outputs(path: Path, directions: Sequence[str]) -> Translations:
    found: Translations = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            named = row.get("pair", directions[0] if len(directions) == 1 else None)
            texts = (row.get("source"), row.get("output"))
            if split_pair(named or "") is None or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f'Line {number} of the teacher\'s file \'{path}\' lacks "source" or "output", or "pair" such as '
                    '"en-de" where there are several directions: add them.'
                )
            source, output = (" ".join(text.split()) for text in texts)
            found.setdefault((str(split_pair(named)), source), Said(source, output))
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"The teacher's file '{path}' cannot be read ({reason_of(error)}): give JSON lines with \"source\" and "
            '"output".'
        ) from error
    return found


def _translate(
    teacher: str,
    asked: Mapping[str, list[str]],
    *,
    num_beams: int,
    cache_dir: Path | None,
    on_progress: Callable[[str], None],
) -> Translations:
    identity, speaker = _engine() if teacher == PACKAGE else _model(teacher, num_beams=num_beams)
    found: Translations = {}
    for direction, sources in asked.items():
        try:
            say = speaker(direction)
        except UserError as error:
            raise UserError(f"'data.teacher' is '{teacher}', which cannot be used. {error}") from error
        key = hashlib.sha256(json.dumps([identity, direction, num_beams, sources]).encode()).hexdigest()[:24]
        path = None if cache_dir is None else cache_dir / f"teacher-{direction}-{key}.jsonl"
        done = [] if path is None else _kept(path, sources)
        if len(done) < len(sources):
            kept = f", {len(done):,} are there already" if done else ""
            on_progress(f"translating {len(sources):,} sentences {direction} with the teacher{kept}")
        heard = time.monotonic()
        for start in range(len(done), len(sources), AT_ONCE):
            rows = say(sources[start : start + AT_ONCE])
            if time.monotonic() - heard > QUIET_SECONDS:
                on_progress(f"{start + len(rows):,} of {len(sources):,} are translated")
                heard = time.monotonic()
            if path is not None:
                _append(path, rows)
            done += rows
        found |= {(direction, said.source): said for said in done}
    return found


def _model(teacher: str, *, num_beams: int) -> tuple[list[list[str]], Callable[[str], Speaker]]:
    """A model folder's files with their hashes, and how it translates in a direction."""
    folder = _folder(teacher)
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def speaker(direction: str) -> Speaker:
        return partial(_said, Translator(folder, *direction.split("-")), num_beams)

    return [[str(path.relative_to(folder)), checksum(path)] for path in files], speaker


def _said(translator: Translator, num_beams: int, sources: list[str]) -> list[Said]:
    encoded = translator.encode(sources)
    short = [i for i, ids in enumerate(encoded) if len(ids) + 1 < translator.max_length]
    rows = [Said(source, None, _TOO_LONG) for source in sources]
    if short:
        lines, is_cut = translator.translate([encoded[i] for i in short], num_beams=num_beams)
        for i, line, cut in zip(short, lines, is_cut, strict=True):
            rows[i] = Said(sources[i], None, _CUT) if cut else Said(sources[i], " ".join(line.split()))
    return rows


def _engine() -> tuple[str, Callable[[str], Speaker]]:
    """The production engine's version, and how it translates in a direction."""

    def speaker(direction: str) -> Speaker:
        if direction not in DIRECTIONS:
            raise UserError(f"It has the directions {' and '.join(DIRECTIONS)}, and 'data.pairs' has {direction}.")
        return lambda sources: [Said(source, " ".join(translated(direction, source).split())) for source in sources]

    return f"{PACKAGE} {engine_version()}", speaker


def _kept(path: Path, sources: Sequence[str]) -> list[Said]:
    """The rows that are there, from the first sentence on; a torn or foreign line and all after it are removed."""
    rows: list[Said] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for line, source in zip(lines[:-1], sources, strict=False):
        try:
            row = Said(**json.loads(line))
        except (ValueError, TypeError):
            break
        if row.source != source:
            break
        rows.append(row)
    if lines and lines[len(rows) :] != [b""]:
        path.write_bytes(b"".join(line + b"\n" for line in lines[: len(rows)]))
    return rows


def _append(path: Path, rows: Sequence[Said]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(
            f"The teacher's translations cannot be kept in '{path.parent}' ({reason_of(error)}): make room."
        ) from error


def _folder(teacher: str) -> Path:
    folder = Path(teacher)
    if folder.is_dir():
        return folder
    return hub_folder(
        teacher,
        _FETCHED,
        missing=f"'data.teacher' is '{teacher}', which is no folder",
        fix="give a model that `mixtura translate` runs, or a .jsonl file of its outputs",
    )
