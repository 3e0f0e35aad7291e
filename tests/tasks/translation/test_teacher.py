"""Targets by a teacher: a file of outputs, or a model whose translations are kept and gone on with."""

import contextlib
import json

import pytest

from fixtures.encoder_decoders import encoder_decoder, parallel_rows  # noqa: F401 - fixtures
from mixtura.checkpoints import source
from mixtura.config import (
    BaseConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.data.parallel import load_parallel
from mixtura.tasks.translation import teacher
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.trained_model import translate_lines


def data_of(rows, **keys):
    held_out = {"validation_sources": 4, "test_sources": 4, "max_length": 120}
    return TranslationDataConfig(source="local", path=str(rows), pairs=("en-de", "en-fr"), **held_out, **keys)


@pytest.fixture
def corpus(parallel_rows):  # noqa: F811
    def corpus(**keys):
        return load_parallel(data_of(parallel_rows, **keys))

    return corpus


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def taught(corpus, name, *, cache_dir=None, said=None):
    said = [] if said is None else said
    return teacher.with_teacher(corpus, name, num_beams=1, cache_dir=cache_dir, on_progress=said.append)


def test_a_file_of_outputs_takes_the_place_of_the_targets_of_training_alone(corpus, tmp_path):
    plain, said = corpus(), []
    rows = [{"pair": pair.pair, "source": pair.source, "output": f" taught  {i}"} for i, pair in enumerate(plain.train)]
    first, copied, leaked = (rows[i] for i in (0, 1, 2))
    copied["output"], leaked["output"], rows[3]["output"] = copied["source"].upper(), plain.test[0].target, " "
    found = taught(plain, write(tmp_path / "outputs.jsonl", rows[:-1]), said=said)
    assert (found.validation, found.test) == (plain.validation, plain.test)
    assert found.train[0] == plain.train[0]._replace(target="taught 0") and first["output"] == " taught  0"
    total = len(plain.train)
    assert [pair.source for pair in found.train] == [pair.source for pair in plain.train[:1] + plain.train[4:-1]]
    assert said == [
        f"{total - 4} of {total} training pairs take the translation of the teacher {tmp_path / 'outputs.jsonl'} "
        "(left out: 1 empty, 1 equal to held-out text, 1 not translated, 1 untranslated)"
    ]
    assert said[0] in found.description
    assert sum(sides["train"] for sides in found.counts.values()) == total - 4


def test_own_targets_stay_beside_those_of_the_teacher(corpus, tmp_path):
    plain = corpus(teacher="x", teacher_mix=True)
    rows = [{"pair": pair.pair, "source": pair.source, "output": "other"} for pair in plain.train[:2]]
    rows[1]["output"] = plain.train[1].target  # adds nothing
    found = taught(plain, write(tmp_path / "outputs.jsonl", rows))
    assert found.train == [plain.train[0], plain.train[0]._replace(target="other"), *plain.train[1:]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no JSON", "cannot be read"),
        ('{"source": "a", "output": "b"}', 'Line 1 .* lacks .*"pair"'),
        ('{"pair": "en-de", "source": "never seen", "output": "b"}', "0 of .* give a teacher of these sentences"),
    ],
)
def test_a_file_that_teaches_nothing_is_refused(corpus, tmp_path, text, complaint):
    (tmp_path / "outputs.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        taught(corpus(), str(tmp_path / "outputs.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        taught(corpus(), str(tmp_path / "missing.jsonl"))


def test_a_model_that_is_nowhere_is_refused(corpus, monkeypatch):
    def nowhere(*_, **__):
        raise OSError("no such model")

    monkeypatch.setattr(source, "snapshot_download", nowhere)
    with pytest.raises(UserError, match=r"'data\.teacher' is 'some/model', which is no folder"):
        taught(corpus(), "some/model")


def test_a_folder_that_does_not_translate_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"'data\.teacher' is .*, which cannot be used\. .* is no translation model"):
        taught(corpus(), str(tmp_path))


def test_translations_of_a_model_are_kept_and_gone_on_with(corpus, encoder_decoder, tmp_path, monkeypatch):  # noqa: F811
    """After a stop the same lines come out, and only what was missing is translated."""
    folder, plain, asked = encoder_decoder("m2m100"), corpus(), []
    monkeypatch.setattr(teacher, "AT_ONCE", 5)
    real = teacher.Translator.translate

    def translate(self, encoded, **how):
        asked.append(len(encoded))
        lines, is_cut = real(self, encoded, **how)
        return [f"{line} end" for line in lines], [False] * len(is_cut)  # what a random model says never ends

    monkeypatch.setattr(teacher.Translator, "translate", translate)
    whole = taught(plain, str(folder), cache_dir=tmp_path)
    assert max(asked) == 5
    german = next(tmp_path.glob("teacher-en-de-*.jsonl"))
    lines = german.read_bytes().split(b"\n")
    asked.clear()
    again = taught(plain, str(folder), cache_dir=tmp_path)
    assert again == whole and not asked
    german.write_bytes(b"\n".join(lines[:7]) + b"\n" + lines[7][:9])  # stopped while it wrote
    said = []
    again = taught(plain, str(folder), cache_dir=tmp_path, said=said)
    assert again == whole and german.read_bytes().split(b"\n") == lines
    assert sum(asked) == len(lines) - 1 - 7 and "7 are there already" in said[0]
    taught(plain, str(folder))
    assert sum(asked) > len(lines)  # nothing is kept without a folder


def test_a_teacher_says_what_the_translate_verb_says(corpus, encoder_decoder, tmp_path):  # noqa: F811
    folder, plain = encoder_decoder("nllb"), corpus()
    sources = list(dict.fromkeys(pair.source for pair in plain.train if pair.pair == "en-de"))
    with contextlib.suppress(UserError):  # a random model may have nothing to teach
        taught(plain, str(folder), cache_dir=tmp_path)
    rows = [json.loads(line) for line in next(tmp_path.glob("teacher-en-de-*.jsonl")).read_text().splitlines()]
    done = translate_lines(folder, sources, source_language="en", target_language="de")
    assert [row["source"] for row in rows] == sources
    for number, (row, line) in enumerate(zip(rows, done.lines, strict=True), 1):
        assert row["output"] == (None if number in done.cut else " ".join(line.split()))


def test_a_run_learns_from_its_teacher(parallel_rows, encoder_decoder, tmp_path):  # noqa: F811
    plain = load_parallel(data_of(parallel_rows))
    rows = [{"pair": pair.pair, "source": pair.source, "output": "ban"} for pair in plain.train]
    name = write(tmp_path / "outputs.jsonl", rows)
    training = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_sequences": 4, "final_eval_sequences": 8}
    said, made = [], {}
    for given in (None, name):
        recipe = TranslationRecipe(
            name="toy",
            baseline="full",
            data=data_of(parallel_rows, teacher=given),
            base=BaseConfig(name=str(encoder_decoder("m2m100"))),
            training=TrainingConfig(**training, save_every=1),
            arms={"full": TranslationArmConfig()},
        )
        made[given] = make_translation(recipe, cache_dir=None, on_progress=said.append).translation
    own, learnt = made[None], made[name]
    assert (own.test.sentences, own.validation.digest) == (learnt.test.sentences, learnt.validation.digest)
    assert {pair.target for pair in learnt.train.sentences} == {"ban"}
    assert sum("take the translation of the teacher" in line for line in said) == 1
