"""Every kind of base model, with every adapter, in every task: it trains and is probed, or a sentence refuses it."""

import functools
import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    ChatArmConfig,
    ChatDataConfig,
    ChatRecipe,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.data.prepare import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.tasks.chat.experiment import make_chat
from mixtura.tasks.classification.experiment import make_classification
from mixtura.tasks.translation.experiment import make_translation

SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
DECODER = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1}
DECODER |= {"eos_token_id": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
OURS = {**DECODER, **FEW, "moe_intermediate_size": 12, "group_size": 2, "gated": True, "hidden_act": "silu"}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**DECODER, **FEW, moe_intermediate_size=12, head_dim=8)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**DECODER, **FEW)),
    "dense": lambda: MixtureForCausalLM(MixtureConfig(**OURS)),
    "token_choice": lambda: MixtureForCausalLM(MixtureConfig(**OURS, mlp_layer_types=["token_choice"] * 2)),
    "mixture_of_tokens": lambda: MixtureForCausalLM(MixtureConfig(**OURS, mlp_layer_types=["mixture_of_tokens"] * 2)),
    "late_mixture_of_tokens": lambda: MixtureForCausalLM(
        MixtureConfig(**{**OURS, "num_hidden_layers": 4}, mlp_layer_types=["dense"] * 3 + ["mixture_of_tokens"])
    ),
    "late_qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{**DECODER, **FEW, "num_hidden_layers": 3}, moe_intermediate_size=12, head_dim=8, mlp_only_layers=[0, 1]
        )
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES, num_attention_heads=2), add_pooling_layer=False),
}
ADAPTERS = {
    "full": None,
    "lora": AdapterConfig(rank=2),
    "lora_on_attention": AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
    "mixture_of_lora": AdapterConfig(method="mixture_of_lora", rank=2, num_experts=3),
    "mixture_of_lora_blocks": AdapterConfig(method="mixture_of_lora", rank=2, num_experts=3, scope="feed_forward"),
    "languages": AdapterConfig(method="mixture_of_lora", rank=2, router="task"),
    "mixture_of_tokens": AdapterConfig(method="mixture_of_tokens", rank=2, num_experts=2, group_size=2),
    "expert_specialized": AdapterConfig(method="expert_specialized"),
}
STOCK_MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
MIXTURES = (*STOCK_MIXTURES, "token_choice", "mixture_of_tokens")


def refusal(task: str, base: str, adapter: str) -> str | None:
    """The sentence that says why a combination makes no sense; None where it must work."""
    if adapter == "expert_specialized" and base not in (*STOCK_MIXTURES, "token_choice", "late_qwen3_moe"):
        return "has no layer whose tokens choose among experts"
    if adapter == "lora_on_attention" and base == "bert":
        return "which is no linear layer of BertModel"
    if adapter == "languages" and task in ("classification", "chat"):
        return "this data has no tasks or languages"
    if base in MIXTURES and adapter in ("lora", "mixture_of_lora", "languages"):
        return r"only experts in stacked tensors: name linear layers in 'arms\.\w+\.adapter\.targets'"
    if base == "late_qwen3_moe" and adapter == "lora":
        return "PEFT would put LoRA there in place of its linear layers down_proj, gate_proj, up_proj"
    if base in MIXTURES and adapter == "mixture_of_lora_blocks":
        return "are mixtures already"
    return None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every base model with a tokenizer, as a folder."""
    tokenizer = train_tokenizer(["Translate this from English to German: ban den"], vocab_size=300)
    found = {}
    for name, build in BASES.items():
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        build().save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A few sentence pairs and a few labelled texts."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"{a} {b}" for a in ("ban", "den", "fin", "gat") for b in ("nab", "pol", "rud", "sef")]
    pairs = [
        {"source": word, "target": word[::-1], "source_language": "en", "target_language": language}
        for word in words
        for language in ("de", "fr")
    ]
    texts = [{"text": f"{word} {number}", "label": "ab"[number % 2]} for number, word in enumerate(words * 2)]
    chats = [{"prompt": word, "completion": word[::-1]} for word in words]
    for name, rows in (("pairs", pairs), ("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


TRAINING = TrainingConfig(steps=2, batch_size=4, eval_every=2, eval_sequences=4, final_eval_sequences=4, save_every=2)


def translation_arms(base, files):
    recipe = TranslationRecipe(
        name="tiny",
        baseline="lora_on_attention",
        data=TranslationDataConfig(
            source="local",
            path=str(files / "pairs.jsonl"),
            pairs=("en-de", "en-fr"),
            **{"validation_sources": 2, "test_sources": 2, "max_length": 120},
        ),
        base=BaseConfig(name=str(base)),
        training=TRAINING,
        arms={name: TranslationArmConfig(adapter=adapter) for name, adapter in ADAPTERS.items()},
    )
    return make_translation(recipe, cache_dir=None).arms


def classification_arm(base, files, name):
    tune = {"tune": "full"} if ADAPTERS[name] is None else {"tune": "adapter", "adapter": ADAPTERS[name]}
    recipe = ClassificationRecipe(
        name="tiny",
        baseline=name,
        data=ClassificationDataConfig(
            source="local", path=str(files / "texts.jsonl"), max_length=10, validation_examples=8, test_examples=8
        ),
        base=BaseConfig(name=str(base)),
        training=TRAINING,
        arms={name: ClassificationArmConfig(**tune)},
    )
    return make_classification(recipe, cache_dir=None, on_progress=lambda _: None).arms[name]


def chat_arms(base, files):
    recipe = ChatRecipe(
        name="tiny",
        baseline="lora_on_attention",
        data=ChatDataConfig(
            source="local",
            path=str(files / "chats.jsonl"),
            prompt_column="prompt",
            completion_column="completion",
            **{"validation_chats": 4, "test_chats": 4, "max_length": 40},
        ),
        base=BaseConfig(name=str(base)),
        training=TRAINING,
        arms={name: ChatArmConfig(adapter=adapter) for name, adapter in ADAPTERS.items()},
    )
    return make_chat(recipe, cache_dir=None).arms


def check(arm):
    """One step moves what is trained, the probe answers in float64, and the model evaluates as deployed."""
    leaks = arm.leaks()
    assert leaks.batch_deployed is False and leaks.batch == (arm.training_mode == "group")
    model = arm.build(0).train()
    items = arm.task.dataset(length=4, seed=0)
    batch = arm.task.collate([items[index] for index in range(4)])
    losses = arm.task.losses(model, batch, num_targets=arm.task.count_targets(batch))
    weights = arm.task.router_loss_weights(model)
    added = [weight * value for weight, value in zip(weights, losses[1:3], strict=True) if value is not None]
    (losses.task_loss + sum(added)).backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and any(gradient is not None and gradient.any() for gradient in trained.values())
    assert all(gradient is None or gradient.isfinite().all() for gradient in trained.values())
    assert arm.task.evaluate(model, final=False)[arm.deployed_mode]["loss"] > 0
    return model, losses


@pytest.fixture(scope="module")
def translation(folders, files):
    """The arms of a base model, prepared once."""
    found = {}

    def arms(base):
        if base not in found:
            found[base] = translation_arms(folders[base], files)
        return found[base]

    return arms


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", [name for name in BASES if name != "bert"])
def test_every_adapter_translates_on_every_decoder(translation, base, adapter):
    arm, sentence = translation(base)[adapter], refusal("translation", base, adapter)
    if sentence is not None:
        with pytest.raises(UserError, match=sentence):
            arm.build(0)
        return
    check(arm)


@pytest.fixture(scope="module")
def chatting(folders, files):
    """The arms of a base model, prepared once; its tokenizer has no chat template."""
    return functools.cache(lambda base: chat_arms(folders[base], files))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", [name for name in BASES if name != "bert"])
def test_every_adapter_answers_on_every_decoder(chatting, base, adapter):
    arm, sentence = chatting(base)[adapter], refusal("chat", base, adapter)
    if sentence is not None:
        with pytest.raises(UserError, match=sentence):
            arm.build(0)
        return
    check(arm)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_every_adapter_classifies_on_every_base(folders, files, base, adapter):
    sentence = refusal("classification", base, adapter)
    if sentence is not None:
        with pytest.raises(UserError, match=sentence):
            classification_arm(folders[base], files, adapter)
        return
    check(classification_arm(folders[base], files, adapter))


def test_an_encoder_is_no_base_to_translate_with(folders, files):
    with pytest.raises(UserError, match="cannot write text: its files lack"):
        translation_arms(folders["bert"], files)["lora"].build(0)


@pytest.mark.parametrize("coefficient", [0.0, 100.0])
def test_a_classifier_that_is_tuned_whole_balances_its_token_choice(folders, files, tmp_path, coefficient):
    model = MixtureForCausalLM.from_pretrained(folders["token_choice"])
    model.config.router_aux_loss_coef = coefficient
    model.save_pretrained(tmp_path)
    for path in folders["token_choice"].glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tuned, losses = check(classification_arm(tmp_path, files, "full"))
    gate = tuned.base.layers[0].mlp.gate.weight.grad.norm()
    if not coefficient:
        assert losses.aux_loss is None
        return
    assert losses.aux_loss >= 0.9 and len(losses.routing) == 2 and gate > 1
