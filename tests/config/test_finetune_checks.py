"""Fine-tuning recipes: which kind a table is, and values that cannot work together."""

import pytest

from mixtura.config import (
    ChatRecipe,
    ClassificationRecipe,
    TranslationRecipe,
    UserError,
    recipe_from_dict,
    recipe_to_dict,
)

EXPERTS = {"feed_forward": {"family": "token_choice", "num_experts": 8, "top_k": 1, "route_by": "pair"}}
LORA = {"adapter": {"method": "lora", "rank": 4}}


def translation(arms=None, **sections):
    table = {"name": "mine", "task": "translation", "arms": {"dense": {}, **(arms or {})}}
    return recipe_from_dict(table | sections)


def classification(arms=None, **sections):
    table = {"name": "mine", "task": "classification", "arms": {"last_layer": {}, **(arms or {})}}
    return recipe_from_dict(table | sections)


def chat(arms=None, **sections):
    table = {"name": "mine", "task": "chat", "arms": {"lora": LORA, **(arms or {})}}
    return recipe_from_dict(table | sections)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"base": {"num_layers": 2}}, "'base.name' is missing: name the model to tune"),
        ({"data": {"prompt_column": "ask"}}, "'data.prompt_column' is named and 'data.completion_column' is not"),
        ({"data": {"max_length": 4}}, "'data.max_length' is 4, which holds no chat: set it to 8 tokens or more"),
        (
            {"arms": {"lora": LORA, "tasks": {"adapter": {"method": "mixture_of_lora", "router": "task"}}}},
            "'arms.tasks.adapter.router' is 'task', but chats have no tasks",
        ),
        ({"data": {"source": "local"}}, "'data.source' is 'local' but 'data.path' is missing"),
    ],
)
def test_chat_recipes_that_cannot_work_are_refused(sections, sentence):
    with pytest.raises(UserError, match=sentence):
        chat(**sections)


def test_a_classifier_reads_some_text():
    assert classification(data={"max_length": 8}).data.max_length == 8
    with pytest.raises(UserError, match=r"'data\.max_length' is 2, which holds no text: set it to 8 tokens or more"):
        classification(data={"max_length": 2})


def test_the_task_decides_the_kind_of_recipe():
    assert isinstance(chat(), ChatRecipe)
    assert isinstance(translation(), TranslationRecipe)
    assert isinstance(classification(), ClassificationRecipe)


def test_an_unknown_task_names_those_there_are():
    with pytest.raises(UserError, match="'task' is 'summarise': it must be one of translation, classification"):
        recipe_from_dict({"name": "mine", "task": "summarise", "arms": {}})


@pytest.mark.parametrize(
    "recipe",
    [
        translation({"pairs": EXPERTS}),
        translation({"lora": LORA}, base={"name": "smollm2"}),
        classification({"mix": {"head": {"kind": "layer_mix", "feed_forward": {"family": "token_choice"}}}}),
    ],
    ids=["from-scratch", "adapter", "head"],
)
def test_a_resolved_recipe_reads_back_equal(recipe):
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": {"pairs": []}}, "name at least one direction"),
        ({"data": {"pairs": ["en-de", "en-de"]}}, "each direction once"),
        ({"data": {"pairs": ["english-german"]}}, "two different language codes"),
        ({"data": {"pairs": ["en-en"]}}, "two different language codes"),
        ({"data": {"source": "local"}}, r"'data\.path' is missing"),
        ({"data": {"source": "hub"}}, r"'data\.name' is missing"),
        ({"data": {"vocab_size": 256}}, "300 or more"),
        ({"num_beams": 0}, "must be 1, which is greedy"),
        ({"data": {"teacher_mix": True}}, r"'data\.teacher' is missing"),
        ({"arms": {"lora": LORA}}, r"'base\.name' is missing"),
        ({"arms": {"x": EXPERTS}, "base": {"name": "smollm2"}}, "is for models from scratch"),
        ({"arms": {"x": {"feed_forward": {"family": "soft"}}}}, "cannot translate one sentence alone"),
        ({"arms": {"x": {"feed_forward": EXPERTS["feed_forward"] | {"top_k": 2}}}}, "names one expert: set it to 1"),
        ({"arms": {"x": {"feed_forward": {"family": "dense", "route_by": "pair"}}}}, "which dense does not read"),
        ({"arms": {"x": {"learning_rate": 0.0}}}, "greater than zero"),
        ({"base": {"num_layers": 0}}, "keep at least 1 layer"),
        ({"training": {"steps": 0}}, r"'training\.steps' is 0"),
    ],
)
def test_a_translation_recipe_names_the_key_the_value_and_the_fix(arguments, message):
    with pytest.raises(UserError, match=message):
        translation(**arguments)


def test_routing_by_target_counts_target_languages():
    arm = {"feed_forward": EXPERTS["feed_forward"] | {"route_by": "target", "num_experts": 1}}
    recipe = translation({"target": arm}, data={"pairs": ["de-en", "fr-en"]})
    assert recipe.arms["target"].feed_forward.num_experts == 1


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"tune": "adapter"}, "add an adapter section"),
        ({"adapter": {"rank": 4}}, "set tune to 'adapter'"),
        ({"head": {"per_token": True}}, "use 'layer_mix'"),
        ({"tune": "full", "head": {"kind": "best_layer"}}, "set tune to 'frozen'"),
        ({"tune": "adapter", "adapter": {"rank": 4, "method": "mixture_of_lora", "top_k": 1}}, "never learn"),
        ({"tune": "adapter", "adapter": {"rank": 4, "method": "mixture_of_lora", "top_k": 9}}, "lower it"),
        ({"tune": "adapter", "adapter": {"rank": 4, "method": "mixture_of_tokens", "group_size": 3}}, "no multiple"),
        ({"tune": "adapter", "adapter": {"rank": 0}}, "rank' is 0"),
        ({"tune": "adapter", "adapter": {"rank": 4, "dropout": 1.0}}, "between 0 and 1"),
        ({"tune": "adapter", "adapter": {"method": "lora"}}, "names no rank to match"),
        ({"head": {"feed_forward": {"family": "mixture_of_tokens", "group_size": 5}}}, "no multiple"),
    ],
)
def test_a_classification_recipe_names_the_key_the_value_and_the_fix(arm, message):
    with pytest.raises(UserError, match=message):
        classification({"other": arm})


@pytest.mark.parametrize("budgets", [[8, 8], [0, 8]])
def test_budgets_are_different_numbers(budgets):
    table = {"name": "mine", "task": "classification", "arms": {"last_layer": {}}, "data": {"budgets": budgets}}
    with pytest.raises(UserError, match=r"'data\.budgets' is .*give different numbers"):
        recipe_from_dict(table)


def test_a_rank_left_open_is_matched_to_a_baseline_that_names_its_own():
    lora = {"tune": "adapter", "adapter": {"rank": 8}}
    mixture = {"tune": "adapter", "adapter": {"method": "mixture_of_lora"}}
    recipe = recipe_from_dict(
        {"name": "mine", "task": "classification", "baseline": "lora", "arms": {"lora": lora, "mixture": mixture}}
    )
    assert recipe.arms["mixture"].adapter.rank is None


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "lora", "rank": 4, "num_experts": 8}, "num_experts' is 8, which lora does not read"),
        ({"method": "lora", "rank": 4, "group_size": 8}, "set method to mixture_of_tokens"),
        (
            {"method": "mixture_of_lora", "rank": 4, "alone_top_k": 1},
            "alone_top_k' is 1, which mixture_of_lora does not",
        ),
        (
            {"method": "mixture_of_tokens", "rank": 4, "router": "dense"},
            "'dense', which mixture_of_tokens does not read",
        ),
        ({"method": "expert_specialized", "rank": 4}, "set method to lora or mixture_of_lora or mixture_of_tokens"),
        ({"method": "expert_specialized", "targets": ["q_proj"]}, r"\['q_proj'\], which expert_specialized does not"),
    ],
)
def test_a_setting_that_the_adapters_method_does_not_read_is_refused(adapter, message):
    with pytest.raises(UserError, match=message):
        chat({"other": {"adapter": adapter}}, base={"name": "smollm2"}, baseline="lora")


def test_plain_text_has_no_languages_to_route_by():
    arms = {"dense": {"family": "dense"}, "x": EXPERTS["feed_forward"]}
    with pytest.raises(UserError, match="plain text has no language pairs"):
        recipe_from_dict({"name": "mine", "arms": arms})
