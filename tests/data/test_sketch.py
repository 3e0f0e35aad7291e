"""A recipe for one's own data: the task and the columns are found, and the recipe loads."""

import json
import random
import tomllib

import pandas as pd
import pytest

from mixtura.config import ChatRecipe, ClassificationRecipe, Recipe, TranslationRecipe, UserError, load_recipe
from mixtura.data.labelled import load_labelled
from mixtura.data.sketch import sketch_recipe

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "house", "river", "cat", "dog", "moon"]


def sentences(number):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=6)) + f" {index}" for index in range(number)]


@pytest.fixture
def sketched(tmp_path):
    """Writes what is sketched for some data, and reads it as a recipe."""

    def sketch(data, **how):
        path = tmp_path / "sketched.toml"
        path.write_text(sketch_recipe(data, name="mine", **how), encoding="utf-8")
        return load_recipe(path)

    return sketch


@pytest.fixture
def labelled(tmp_path):
    """Twelve classes, one with half of the rows."""
    path = tmp_path / "labelled.parquet"
    labels = ["common"] * 60 + [f"class {index % 11}" for index in range(60)]
    pd.DataFrame({"id": range(120), "Body": sentences(120), "Mood": labels}).to_parquet(path)
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [f"{text}\t{text[::-1]}" for text in sentences(40)]
    path.write_text("\n".join(["German text\tfr", *rows]), encoding="utf-8")
    return path


def test_labels_make_it_classification(sketched, labelled):
    recipe = sketched(labelled)
    assert isinstance(recipe, ClassificationRecipe)
    assert (recipe.data.text_column, recipe.data.label_column, recipe.data.path) == ("Body", "Mood", str(labelled))
    assert recipe.data.test_examples is None
    assert "part = " not in sketch_recipe(labelled, name="mine")  # of the movie reviews that come along


def test_lists_of_labels_make_it_classification_too(sketched, tmp_path):
    path = tmp_path / "topics.jsonl"
    topics = [[], ["old"], ["new", "old"], ["new"]]
    rows = [{"said": text, "topics": topics[index % 4]} for index, text in enumerate(sentences(60))]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = sketched(path)
    assert isinstance(recipe, ClassificationRecipe)
    assert (recipe.data.text_column, recipe.data.label_column) == ("said", "topics")
    assert load_labelled(recipe.data).several


def test_columns_named_after_languages_make_it_translation(sketched, pairs):
    recipe = sketched(pairs)
    assert isinstance(recipe, TranslationRecipe)
    assert (recipe.data.source_column, recipe.data.target_column) == ("German text", "fr")
    assert recipe.data.pairs == ("de-fr",)


def test_two_of_three_columns_named_after_languages_are_enough(sketched, tmp_path):
    texts = sentences(40)
    table = {
        "Fassung": texts,
        "Text (English)": [text[::-1] for text in texts],
        "Version fr": [t.upper() for t in texts],
    }
    pd.DataFrame(table).to_csv(tmp_path / "three.tsv", sep="\t", index=False)
    recipe = sketched(tmp_path / "three.tsv")
    assert isinstance(recipe, TranslationRecipe) and recipe.data.pairs == ("en-fr",)
    assert (recipe.data.source_column, recipe.data.target_column) == ("Text (English)", "Version fr")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, (None, None)),
        ({"prompt": "a", "completion": "b"}, ("prompt", "completion")),
        ({"Question": "a", "Answer": "b", "source": "c"}, ("Question", "Answer")),
        ({"instruction": "a", "input": "", "output": "b"}, ("instruction+input", "output")),
        ({"category": "a", "response": "b", "instruction": "c", "context": "d"}, ("instruction+context", "response")),
        ({"input": "a", "output": "b"}, ("input", "output")),
    ],
)
def test_messages_or_prompts_make_it_chat(sketched, tmp_path, row, columns):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps(row)] * 20), encoding="utf-8")
    recipe = sketched(file)
    assert isinstance(recipe, ChatRecipe) and recipe.data.path == str(file)
    assert (recipe.data.prompt_column, recipe.data.completion_column) == columns


def test_chats_whose_columns_say_nothing_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"one": "a", "two": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="name two with --columns, PROMPT,COMPLETION"):
        sketch_recipe(tmp_path / "a.jsonl", task="chat", name="mine")


def test_columns_may_be_joined(labelled):
    text = sketch_recipe(labelled, columns="Body+id,Mood", name="mine")
    assert 'text_column = "Body+id"' in text
    with pytest.raises(UserError, match="has 'title', which is no column"):
        sketch_recipe(labelled, columns="title+Body,Mood", name="mine")


def test_a_folder_for_each_class_needs_no_columns(sketched, tmp_path):
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_text("text", encoding="utf-8")
    recipe = sketched(tmp_path, task="classification")
    assert isinstance(recipe, ClassificationRecipe) and recipe.data.path == str(tmp_path)


def test_folders_of_texts_may_be_classes(tmp_path):
    for folder in ("good", "bad\nseeds = [9]", "of\u2028films"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.txt").write_text("text", encoding="utf-8")
    text = sketch_recipe(tmp_path, name="mine")
    assert (
        "# They lie in folders (bad seeds = [9], good, of films): with --task classification, these are the cl" in text
    )
    assert tomllib.loads(text)["seeds"] != [9]


def test_translations_in_an_object_make_it_translation(sketched, tmp_path):
    rows = [{"id": str(i), "translation": {"en": text, "pt": text[::-1]}} for i, text in enumerate(sentences(30))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = sketched(tmp_path / "a.jsonl")
    assert isinstance(recipe, TranslationRecipe) and recipe.data.pairs == ("en-pt",)
    assert (recipe.data.source_column, recipe.data.target_column) == ("translation.en", "translation.pt")


def test_columns_without_names_have_numbers(sketched, tmp_path):
    rows = [f"{i}\t{text}\t{text[::-1]}" for i, text in enumerate(sentences(30))]
    (tmp_path / "a.tsv").write_text("\n".join(rows), encoding="utf-8")
    recipe = sketched(tmp_path / "a.tsv", columns="2,3", pairs="en-pt", task="translation")
    assert isinstance(recipe, TranslationRecipe)
    assert (recipe.data.source_column, recipe.data.target_column) == ("2", "3")


def test_lines_with_labels_make_it_classification(sketched, tmp_path):
    (tmp_path / "a.txt").write_text("\n__label__good a film\n__label__bad another\n", encoding="utf-8")
    assert isinstance(sketched(tmp_path / "a.txt"), ClassificationRecipe)


def test_chats_of_another_name_are_known_by_their_turns(sketched, tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(row)] * 20), encoding="utf-8")
    recipe = sketched(tmp_path / "chats.jsonl")
    assert isinstance(recipe, ChatRecipe) and recipe.data.messages_column == "conversations"


def test_a_text_makes_it_pretraining(sketched, tiny_text):
    recipe = sketched(tiny_text)
    assert isinstance(recipe, Recipe) and recipe.data.path == str(tiny_text) and len(recipe.arms) == 3


def test_what_the_user_says_counts(sketched, labelled, pairs):
    assert sketched(pairs, task="pretraining").data.text_column == "German text"
    assert sketched(labelled, columns="Body,id").data.label_column == "id"
    assert sketched(pairs, pairs="nl-en").data.pairs == ("nl-en",)


def test_columns_that_say_nothing_are_asked_for(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(json.dumps({"a": text, "b": text[::-1]}) for text in sentences(9)), encoding="utf-8")
    with pytest.raises(UserError, match="give --pairs"):
        sketch_recipe(path, task="translation", name="x")
    with pytest.raises(UserError, match="name them with --columns"):
        sketch_recipe(path, task="classification", name="x")
    with pytest.raises(UserError, match="There is no task 'poetry'"):
        sketch_recipe(path, task="poetry", name="x")


def test_every_key_that_is_shown_says_what_it_is(tiny_text):
    text = sketch_recipe(tiny_text, name="../odd name")
    assert "\n# Sequences in one micro-batch.\nbatch_size = 32\n" in text and '\nname = "odd name"\n' in text
