"""The verbs that use a model, from the command line: files and standard input, what is cut, what is refused."""

import io
import json

import pytest
import torch

from mixtura import cli
from mixtura.data.prepare import train_tokenizer
from mixtura.models import MixtureForCausalLM
from mixtura.tasks.classification.classifier import Answer
from mixtura.tasks.translation.trained_model import Translated

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a verb; gives the exit code, standard output and standard error."""

    def run(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        monkeypatch.setattr("sys.argv", ["mixtura", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus):
    return train_tokenizer(tiny_corpus, vocab_size=300)


@pytest.fixture
def model(tiny_config, tokenizer, tmp_path):
    """A model folder of token choice with 64 positions."""

    def make(family="token_choice", template=None, **changes):
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
        config = tiny_config(family, vocab_size=len(tokenizer), tie_word_embeddings=False, **(special | changes))
        MixtureForCausalLM(config).save_pretrained(tmp_path / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


SHORT = ("--max-new-tokens", 5)
DRAWN = ("--temperature", 1.0, *SHORT)


def test_several_prompts_come_typed_from_a_file_or_from_standard_input_and_do_not_touch_each_other(
    run, model, tmp_path
):
    folder = model()
    (tmp_path / "prompts.txt").write_bytes("the film\r\n\nwinter\u2028road\n".encode())
    prompts = ["the film", "winter\u2028road"]
    alone = [run("generate", folder, prompt, *DRAWN)[1] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    expected = (0, "\n".join(alone), "")
    assert run("generate", folder, *prompts, *DRAWN) == expected
    assert run("generate", folder, "--in", tmp_path / "prompts.txt", *DRAWN) == expected
    for source in (("-",), ("--in", "-")):
        assert run("generate", folder, *source, *DRAWN, stdin="\n".join(prompts)) == expected
    assert run("generate", folder, *prompts, *DRAWN, "--out", tmp_path / "texts.jsonl")[:2] == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert rows == [{"prompt": p, "text": text.removesuffix("\n")} for p, text in zip(prompts, alone, strict=True)]


def test_what_is_streamed_is_what_is_written_at_once(run, model):
    folder = model()
    assert run("generate", folder, "the film", *DRAWN, "--stream") == run("generate", folder, "the film", *DRAWN)


def test_top_p_top_k_and_the_seed_decide_what_is_drawn(run, model):
    folder = model()
    command = ("generate", folder, "the film", "--max-new-tokens", 12)
    greedy = run(*command)[1]
    assert run(*command, "--temperature", 5, "--top-k", 1)[1] == greedy
    assert run(*command, "--temperature", 5, "--top-p", 1e-6)[1] == greedy
    drawn = [run(*command, "--temperature", 5, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn


def test_a_chat_goes_through_the_template_and_shows_the_answer_alone(run, model):
    folder = model(template=TEMPLATE)
    whole = run("generate", folder, "<user> hello\n<assistant>", *SHORT)[1]
    answer = run("generate", folder, "hello", "--chat", *SHORT)
    assert answer[0] == 0 and whole == f"<user> hello\n<assistant>{answer[1]}"
    assert run("generate", folder, "hello", "--chat", "--stream", *SHORT) == answer


def test_a_prompt_beyond_the_positions_gets_a_note_and_an_answer(run, model):
    folder = model(max_position_embeddings=16)
    code, text, told = run("generate", folder, "the film " * 20, *SHORT)
    assert code == 0 and text and "The prompt has " in told and "the model 16 positions" in told
    code, text, told = run("generate", folder, "the film", "--max-new-tokens", 20)
    assert code == 0 and text and "lower --max-new-tokens" in told and told.startswith("Note: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param((), ("Give either a prompt", "--in"), id="no prompt"),
        pytest.param(("",), ("The prompt is empty",), id="empty"),
        pytest.param(("the", "--in", "x.txt"), ("Give either a prompt",), id="two sources"),
        pytest.param(("--in", "none.txt"), ("'none.txt' cannot be read (No such file",), id="no file"),
        pytest.param(("--in", "rows.csv"), ("'rows.csv' is a table",), id="a table"),
        pytest.param(("-",), ("Standard input is empty",), id="empty standard input"),
        pytest.param(("the", "--out", "."), ("'.' is a folder",), id="out is a folder"),
        pytest.param(("the", "--top-p", "0.5"), ("temperature 0 draws nothing",), id="top-p without temperature"),
        pytest.param(("the", "--temperature", "1", "--top-p", "0"), ("top-p is 0",), id="top-p 0"),
        pytest.param(("the", "--chat"), ("has no chat template", "--chat"), id="no template"),
    ],
)
def test_a_mistake_of_generate_is_one_sentence(run, model, arguments, parts):
    code, text, told = run("generate", model(), *arguments, stdin=" \n")
    assert (code, text) == (2, "") and told.count("\n") == 1 and all(part in told for part in parts), told


def test_a_file_of_another_encoding_is_named(run, model, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    code, _, told = run("generate", model(), "--in", tmp_path / "latin.txt")
    assert code == 2 and "is not UTF-8 text (byte 4)" in told


def test_a_file_is_translated_line_by_line(run, tmp_path, monkeypatch):
    def shout(folder, lines, **_):
        return Translated([line.upper() for line in lines], [3])

    monkeypatch.setattr("mixtura.tasks.translation.trained_model.translate_lines", shout)
    (tmp_path / "in.txt").write_text("a b\n\nc\n", encoding="utf-8")
    command = ("translate", tmp_path, "--from", "en", "--to", "de")
    code, text, told = run(*command, "--in", tmp_path / "in.txt", "--out", tmp_path / "out.txt")
    assert (code, text) == (0, "") and (tmp_path / "out.txt").read_text("utf-8") == "A B\n\nC\n"
    assert "Note: 1 of the translations ended at the model's longest, not by themselves: line 3." in told
    assert run(*command, "a\nb")[:2] == (0, "A\nB\n")
    assert run(*command, "-", stdin="a\n\nb")[:2] == (0, "A\n\nB\n")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    code, _, told = run(*command, "--in", tmp_path / "empty.txt", "--out", tmp_path / "none.txt")
    assert code == 2 and "is empty" in told and not (tmp_path / "none.txt").exists()


def test_a_file_is_classified_line_by_line(run, tmp_path, monkeypatch):
    def judge(folder, texts):
        given = ["long" if len(text) > 3 else "short" for text in texts]
        return [Answer(label, 0.75, (label,), {label: 0.75}, cut=label == "long") for label in given]

    monkeypatch.setattr("mixtura.tasks.classification.classifier.classify", judge)
    (tmp_path / "in.txt").write_text("one\n\nthree\n", encoding="utf-8")
    code, _, told = run("classify", tmp_path, "--in", tmp_path / "in.txt", "--out", tmp_path / "out.txt")
    assert code == 0 and (tmp_path / "out.txt").read_text("utf-8") == "short\t0.750000\n\nlong\t0.750000\n"
    assert "Note: 1 of the texts were longer than the classifier reads" in told and "line 3." in told
    assert run("classify", tmp_path, "one", "two")[1] == "short         75.0%  one\nshort         75.0%  two\n"
    code, text, told = run("classify", tmp_path, "one", " ")
    assert (code, text) == (2, "") and "The text is empty" in told


def test_a_column_of_a_table_is_classified_row_by_row(run, tmp_path, monkeypatch):
    def judge(folder, texts):
        return [Answer(text[:3], 0.75, (text[:3],), {text[:3]: 0.75}, cut=False) for text in texts]

    monkeypatch.setattr("mixtura.tasks.classification.classifier.classify", judge)
    table = tmp_path / "new.csv"
    table.write_text('Nr.;\u00c4u\u00dferung\r\n1;"one\r\nmore; two"\r\n2;\r\n3;three\r\n', encoding="utf-8-sig")
    command = ("classify", tmp_path, "--in", table)
    code, text, _ = run(*command, "--text-column", "\u00c4u\u00dferung")
    assert code == 0 and text == "one           75.0%  one more; two\n\nthr           75.0%  three\n"
    code, _, told = run(*command)
    assert code == 2 and "is a table: name its column of texts with --text-column." in told
    code, _, told = run(*command, "--text-column", "text")
    assert code == 2 and "has text in 'text': name another column" in told and "\u00c4u\u00dferung" in told
    code, _, told = run("classify", tmp_path, "one", "--text-column", "text")
    assert code == 2 and "give either" in told
    code, _, told = run("classify", tmp_path, "--text-column", "text")
    assert code == 2 and "no file is given with --in" in told


def test_an_evaluation_says_how_much_it_read_and_can_be_json(run, model, tiny_text):
    folder = model("mixture_of_tokens")
    command = ("evaluate", folder, "--text", tiny_text, "--batch-size", 8, "--sequence-length", 16)
    code, text, told = run(*command, "--max-sequences", 20)
    assert code == 0 and "240 tokens in 16 of " in told and "sequences of 16" in told
    code, found, told = run(*command, "--max-sequences", 20, "--json")
    found = json.loads(found)
    assert code == 0 and not told and list(found) == ["group", "alone", "alone_all"]
    assert f"{found['alone']['loss']:.4f} nats" in text
    assert (found["alone"]["tokens"], found["alone"]["sequences"]) == (240, 16) and found["alone"]["sequences_left_out"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), ("--text", "--tasks")),
        (("--text", "none.txt"), ("--text is '", "none.txt', where there is no file")),
        (("--text", "TEXT", "--batch-size", 6), ("--batch-size 6 does not fill groups of 4",)),
        (("--text", "TEXT", "--sequence-length", 65), ("64 positions", "lower --sequence-length")),
        (("--text", "SHORT"), ("fewer than the 64 of --sequence-length", "lower --sequence-length.")),
    ],
)
def test_a_mistake_of_evaluate_is_told_in_its_own_flags(run, model, tiny_text, tmp_path, flags, parts):
    (tmp_path / "short.txt").write_text("the film is long", encoding="utf-8")
    files = {"TEXT": tiny_text, "SHORT": tmp_path / "short.txt"}
    code, text, told = run("evaluate", model("mixture_of_tokens"), *(files.get(flag, flag) for flag in flags))
    assert (code, text) == (2, "") and "'data." not in told and told.count("\n") == 1
    assert all(part in told for part in parts), told


def test_without_lm_eval_one_sentence_names_the_extra(run, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, told = run("evaluate", model(), "--tasks", "hellaswag")
    assert code == 2 and "lm-eval" in told and "mixtura[clients]" in told and told.count("\n") == 1


def broken(folder, value):
    """The model in a folder with an output layer that gives nothing but `value`."""
    changed = MixtureForCausalLM.from_pretrained(folder)
    changed.get_output_embeddings().weight.data.fill_(value)
    changed.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [SHORT, DRAWN])
def test_a_model_without_numbers_writes_nothing(run, model, value, flags):
    code, out, told = run("generate", broken(model(), value), "the film", *flags)
    assert code == 2 and out == "" and "no finite probabilities: its weights are broken" in told


def test_a_loss_that_is_no_number_is_refused(run, model, tiny_text):
    code, out, told = run("evaluate", broken(model(), float("nan")), "--text", tiny_text, "--json")
    assert code == 2 and out == "" and "in mode causal is nan: its weights are no usable numbers" in told


def test_an_infinite_perplexity_is_null_in_json(run, model, tiny_text):
    code, out, _ = run("evaluate", model(initializer_range=3000.0), "--text", tiny_text, "--json")
    found = json.loads(out, parse_constant=pytest.fail)["causal"]
    assert code == 0 and found["loss"] > 710 and found["perplexity"] is None


HALF = '{"text": "half \\ud800 a letter"}\n{"text": null}\n{"text": " "}\n'


def test_half_a_character_is_no_text_to_evaluate_or_diagnose(run, model, tiny_corpus, tmp_path):
    lone = tmp_path / "lone.jsonl"
    lone.write_text(HALF + "".join(json.dumps({"text": text}) + "\n" for text in tiny_corpus), encoding="utf-8")
    folder = model()
    code, out, told = run("evaluate", folder, "--text", lone, "--json")
    skipped = {"not text": 2, "empty": 1}
    assert code == 0 and json.loads(out)["causal"]["rows_skipped"] == skipped
    assert "; rows skipped: 2 not text, 1 empty." in run("evaluate", folder, "--text", lone)[2]
    assert run("diagnose", folder, "--text", f"a={lone}", "--out", tmp_path / "d", "--max-tokens", 300)[0] == 0
    assert "rows skipped" not in told


def test_half_a_character_is_no_text_to_classify(run, monkeypatch, tmp_path):
    asked = []

    def answer(_, texts):
        asked.extend(texts)
        return [Answer("good", 0.9, ("good",), {"good": 0.9}) for _ in texts]

    monkeypatch.setattr("mixtura.tasks.classification.classifier.classify", answer)
    (tmp_path / "lone.jsonl").write_text(HALF + '{"text": "fine"}\n', encoding="utf-8")
    code, out, _ = run("classify", tmp_path, "--in", tmp_path / "lone.jsonl", "--text-column", "text")
    assert code == 0 and asked == ["fine"] and out.split("\n")[:3] == ["", "", ""]


def test_a_folder_with_a_name_that_utf8_cannot_hold_gets_its_pages(run, model, tiny_text, tmp_path):
    out = tmp_path / "caf\udce9"
    assert run("diagnose", model(), "--text", f"a={tiny_text}", "--out", out, "--max-tokens", 300)[0] == 0
    assert "caf\udce9" in json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))["command"]
    assert "caf\\udce9" in (out / "diagnosis.html").read_text(encoding="utf-8")
