"""Marian, M2M100, NLLB, T5, mT5 and MADLAD as bases of translation: languages, losses, adapters, decoding, folders."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from fixtures.encoder_decoders import WORDS, encoder_decoder, parallel_rows  # noqa: F401 - fixtures
from mixtura import cli
from mixtura.adapters.reach import check_adapter
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import (
    AdapterConfig,
    BaseConfig,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    UserError,
)
from mixtura.data.parallel import SentencePair
from mixtura.models.generation import Writer
from mixtura.results import Leaks
from mixtura.tasks.inspection import diagnose
from mixtura.tasks.translation.decoding import ExampleRouting
from mixtura.tasks.translation.encoder_decoder import collate_pairs, decode_prompts, forward_pairs, prompts_for
from mixtura.tasks.translation.experiment import make_translation
from mixtura.tasks.translation.experts_by_direction import prune_for_sentences
from mixtura.tasks.translation.trained_model import translate, translate_lines
from mixtura.training import train

BASES = ("marian_multi", "m2m100", "nllb", "t5", "mt5", "madlad")
ADAPTERS = {
    "lora": AdapterConfig(rank=8),
    "languages": AdapterConfig(method="mixture_of_lora", router="task", rank=2),
    "mixture": AdapterConfig(method="mixture_of_lora", num_experts=3, rank=2, scope="feed_forward"),
    "mot": AdapterConfig(method="mixture_of_tokens", num_experts=2, group_size=4, rank=2),
    "full": None,
}
PAIR = SentencePair("ban nab", "fin gat", "en", "de")


def recipe_for(folder, rows, *, arms=ADAPTERS, pairs=("en-de", "en-fr"), **settings):
    held_out = {"validation_sources": 4, "test_sources": 4, "max_length": 120}
    training = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_sequences": 4, "final_eval_sequences": 8}
    return TranslationRecipe(
        name="toy",
        baseline=next(iter(arms)),
        data=TranslationDataConfig(source="local", path=str(rows), pairs=pairs, **held_out),
        base=BaseConfig(name=str(folder)),
        training=TrainingConfig(**training, save_every=1),
        arms={name: TranslationArmConfig(adapter=adapter) for name, adapter in arms.items()},
        **settings,
    )


@pytest.fixture(scope="module")
def experiments(encoder_decoder, parallel_rows):  # noqa: F811
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_translation(recipe_for(encoder_decoder(name), parallel_rows), cache_dir=None)
        return made[name]

    return make


def run(experiment, name, out, *, resume=False):
    arm, model = experiment.arms[name], experiment.arms[name].build(0)
    how = {"learning_rate": 1e-2, "seed": 0, "label": name, "resume": resume}
    train(model, task=arm.task, config=experiment.recipe.training, out=out, **how)
    return model


def opened(folder):
    model, tokenizer = load_base(str(folder))
    return model.eval(), tokenizer, prompts_for(tokenizer, model.config)


def test_sources_are_what_each_tokenizer_makes_of_them(encoder_decoder):  # noqa: F811
    expected = {
        "marian": lambda tokenizer: tokenizer("ban nab"),
        "marian_multi": lambda tokenizer: tokenizer(">>deu<< ban nab"),
        "t5": lambda tokenizer: tokenizer("translate English to German: ban nab"),
        "mt5": lambda tokenizer: tokenizer("translate English to German: ban nab"),
        "madlad": lambda tokenizer: tokenizer("<2de> ban nab"),
        "m2m100": lambda tokenizer: tokenizer("ban nab"),
        "nllb": lambda tokenizer: tokenizer("ban nab"),
    }
    for name, encode in expected.items():
        _, tokenizer, prompts = opened(encoder_decoder(name))
        ids = prompts.encode([PAIR._replace(source_language="fr"), PAIR])[1]
        if name in ("m2m100", "nllb"):
            tokenizer.src_lang = {"m2m100": "en", "nllb": "eng_Latn"}[name]
        assert ids == encode(tokenizer)["input_ids"], name
        (target,) = prompts.encode_targets(["fin gat"])
        assert prompts.decode([target]) == ["fin gat"], name
        if name in ("m2m100", "nllb"):
            tokenizer.tgt_lang = {"m2m100": "de", "nllb": "deu_Latn"}[name]
        labels = tokenizer(text_target="fin gat")["input_ids"]
        assert prompts.prefix("de")[1:] + target == labels, name


@pytest.mark.parametrize("name", BASES)
def test_the_loss_is_that_of_the_model_itself_and_padding_changes_nothing(experiments, name):
    experiment = experiments(name)
    task = experiment.arms["full"].task
    model = experiment.arms["full"].build(0).eval().requires_grad_(False)
    rows = task.dataset(length=4, seed=0)
    items = sorted((rows[index] for index in range(4)), key=lambda item: len(item["tokens"]))
    batch = task.collate(items)
    together = task.losses(model, batch, num_targets=1).task_loss
    alone = [task.losses(model, task.collate([item]), num_targets=1).task_loss for item in items]
    assert together == pytest.approx(sum(loss.item() for loss in alone), rel=1e-5)
    for item, loss in zip(items, alone, strict=True):
        source, target = item["tokens"][: item["prompt"]], item["tokens"][item["prompt"] :]
        prefix = task.data.prompts.prefix(task.data.directions[item["direction"]].split("-")[1])
        labels = torch.tensor([*prefix[1:], *target])
        logits = model(input_ids=source[None], labels=labels[None]).logits[0, len(prefix) - 1 :]
        own = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        assert loss == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_decoding_is_that_of_generate_with_a_forced_first_token(encoder_decoder, name):  # noqa: F811
    model, _, prompts = opened(encoder_decoder(name))
    pairs = [SentencePair(word, "", "en", language) for word in WORDS[:3] for language in ("de", "fr")]
    sources = prompts.encode(pairs)
    asked = {"prompts": prompts, "directions": [0, 1] * 3, "names": ("en-de", "en-fr"), "routing": ExampleRouting()}
    for beams in (1, 2):
        decoded = decode_prompts(model, sources, **asked, max_length=120, num_beams=beams)
        assert sum(map(len, decoded)) > 6
        for ids, pair, found in zip(sources, pairs, decoded, strict=True):
            forced = prompts.prefix(pair.target_language)[1:]
            how = {"max_new_tokens": 2 * len(ids) + 16 + len(forced), "num_beams": beams, "do_sample": False}
            if forced:
                how["forced_bos_token_id"] = forced[0]
            own = model.generate(torch.tensor([ids]), forced_eos_token_id=None, **how)[0, 1 + len(forced) :].tolist()
            assert found == (own[: own.index(prompts.eos)] if prompts.eos in own else own)


@pytest.mark.parametrize("name", ["marian_multi", "nllb", "t5"])
def test_a_base_learns_a_few_sentences_in_two_languages_by_heart(encoder_decoder, name):  # noqa: F811
    model, _, prompts = opened(encoder_decoder(name))
    german = [SentencePair(word, word[::-1], "en", "de") for word in WORDS[:4]]
    french = [SentencePair(word, " ".join(word.split()[::-1]), "en", "fr") for word in WORDS[:4]]
    pairs, directions = [*german, *french], [0] * 4 + [1] * 4
    sources, targets = prompts.encode(pairs), prompts.encode_targets([pair.target for pair in pairs])
    items = [
        {"tokens": torch.tensor([*source, *target]), "prompt": len(source), "direction": direction}
        for source, target, direction in zip(sources, targets, directions, strict=True)
    ]
    batch = collate_pairs(items, prompts, ("en-de", "en-fr"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = forward_pairs(model, batch, {})[1] / batch["labels"].ne(-100).sum()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    asked = {"prompts": prompts, "directions": directions, "names": ("en-de", "en-fr"), "routing": ExampleRouting()}
    for beams in (1, 3):
        decoded = decode_prompts(model, sources, **asked, max_length=120, num_beams=beams)
        assert prompts.decode(decoded) == [pair.target for pair in pairs]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *(("nllb", name) for name in ADAPTERS),
        *((base, "full") for base in ("marian_multi", "madlad", "nllb_moe")),
        ("nllb_moe", "mot"),
    ],
)
def test_a_run_trains_resumes_scores_and_translates(experiments, base, name, tmp_path):
    experiment = experiments(base)
    arm = experiment.arms[name]
    before = {key: value.clone() for key, value in arm.build(0).state_dict().items()}
    model = run(experiment, name, tmp_path / "run")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not changed & frozen and bool(frozen) == (name != "full")
    for part in ("checkpoint", "checkpoint-2"):
        (tmp_path / "run" / part).rename(tmp_path / part)
    resumed = run(experiment, name, tmp_path / "run", resume=True)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    measured = arm.task.evaluate(resumed, final=True)
    assert measured[arm.deployed_mode]["chrf"] >= 0
    details = arm.task.details(resumed, out=tmp_path / "run")
    sample = details.samples[0]
    checkpoint = tmp_path / "run" / "checkpoint"
    line = translate(checkpoint, sample.source, source_language="en", target_language="de")
    assert (sample.pair, line) == ("en-de", sample.output)
    again = arm.build(1)
    arm.task.load(again, checkpoint)
    assert arm.task.decode_test(again) == arm.task.decode_test(resumed)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_reaches_both_sides_of_every_base(experiments, base, name):
    arm = experiments(base).arms[name]
    model = arm.build(0)
    items = [arm.task.dataset(length=4, seed=0)[index] for index in range(4)]
    batch = arm.task.collate(items)
    losses = arm.task.losses(model.train(), batch, num_targets=arm.task.count_targets(batch))
    losses.task_loss.backward()
    if name == "full":
        return
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("encoder." in key for key in trained) and any("decoder." in key for key in trained)
    if name in ("mixture", "mot", "languages"):
        assert losses.routing is not None and len(losses.routing) >= 4
    if name == "languages":
        arm.task.routing.name_experts(model, torch.tensor([0, 1]))
    reached = check_adapter(model)
    assert len(reached.targets) >= 4 and all(target.output_change > 0 for target in reached.targets)


def test_experts_can_be_named_by_the_target_language_alone(encoder_decoder, tmp_path):  # noqa: F811
    rows = [{"en": word, "de": word[::-1], "fr": word.upper()} for word in WORDS]
    directions = ("en-de", "fr-de", "de-en")
    lines = [
        {"source": row[a], "target": row[b], "source_language": a, "target_language": b}
        for row in rows
        for a, b in (direction.split("-") for direction in directions)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    by_target = dataclasses.replace(ADAPTERS["languages"], route_by="target")
    arms = {"by_pair": ADAPTERS["languages"], "by_target": by_target}
    recipe = recipe_for(encoder_decoder("nllb"), tmp_path / "pairs.jsonl", arms=arms, pairs=directions)
    experiment = make_translation(recipe, cache_dir=None)
    assert experiment.arms["by_target"].task.routing.expert_of_direction == (0, 0, 1)
    sizes = [arm.describe(arm).parameters_trainable for arm in experiment.arms.values()]
    assert sizes[0] * 2 == sizes[1] * 3


@pytest.mark.parametrize("base", ["marian_multi", "t5", "nllb_moe"])
def test_only_a_mixture_of_tokens_leaks_and_only_while_it_is_trained(experiments, base):
    arms = experiments(base).arms
    assert {name: arms[name].leaks() for name in ("languages", "mot")} == {
        "languages": Leaks(False, False, False),
        "mot": Leaks(False, True, False),
    }


def test_padding_of_each_side_stays_out_of_its_own_mixtures(experiments):
    arm = experiments("nllb").arms["mot"]
    model = arm.build(0).train()
    rows = arm.task.dataset(length=4, seed=0)
    batch = arm.task.collate([rows[index] for index in range(4)])
    losses = arm.task.losses(model, batch, num_targets=1)
    real = [batch["attention_mask"].sum()] * 2 + [batch["decoder_attention_mask"].sum()] * 2
    assert [stats.routed_rows.item() for stats in losses.routing] == [count.item() for count in real]


def test_languages_reach_their_own_adapters_alone(experiments):
    arm = experiments("m2m100").arms["languages"]
    model = arm.build(0).train()
    rows = arm.task.dataset(length=16, seed=0)
    items = [item for item in (rows[i] for i in range(16)) if item["direction"] == 1][:3]
    arm.task.losses(model, arm.task.collate(items), num_targets=1).task_loss.backward()
    grads = [p.grad.flatten(1).abs().sum(1) for n, p in model.named_parameters() if p.requires_grad and ".B." in n]
    assert grads and all(grad[0] == 0 and grad[1] > 0 for grad in grads)


def test_a_tuned_folder_serves_in_transformers_too(experiments, tmp_path):
    experiment = experiments("m2m100")
    model = run(experiment, "full", tmp_path / "run")
    sample = experiment.arms["full"].task.details(model, out=tmp_path / "run").samples[0]
    checkpoint = tmp_path / "run" / "checkpoint"
    stock = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    prompts = experiment.translation.prompts
    ids = prompts.encode([SentencePair(sample.source, "", "en", "de")])
    german = prompts.languages.ids["de"]
    how = {"forced_bos_token_id": german, "max_new_tokens": 2 * len(ids[0]) + 17, "do_sample": False}
    assert prompts.decode(stock.generate(torch.tensor(ids), **how)[:, 2:].tolist()) == [sample.output]
    with pytest.raises(UserError, match="is an encoder-decoder, which goes on from no text: use `mixtura translate`"):
        Writer(checkpoint)
    with pytest.raises(UserError, match="only decoders are diagnosed: its run's report says how its experts divide"):
        diagnose(checkpoint, [], out=tmp_path / "diagnosis")


def test_marian_without_language_tokens_has_one_target(encoder_decoder, parallel_rows, tmp_path):  # noqa: F811
    folder = encoder_decoder("marian")
    with pytest.raises(UserError, match=r"translates into one, but 'data\.pairs' has de, fr: name pairs with one"):
        make_translation(recipe_for(folder, parallel_rows), cache_dir=None)
    full = {"full": None}
    experiment = make_translation(recipe_for(folder, parallel_rows, arms=full, pairs=("en-de",)), cache_dir=None)
    run(experiment, "full", tmp_path / "run")
    lines = ["ban nab", "", "den tik"]
    done = translate_lines(tmp_path / "run" / "checkpoint", lines, source_language="en-US", target_language="deu")
    assert len(done.lines) == 3 and done.lines[1] == ""


@pytest.mark.parametrize(
    ("base", "pairs", "sentence"),
    [
        ("m2m100", ("en-de", "en-tlh"), r"has no token for the language 'tlh': name one of af, am"),
        ("nllb", ("en-zh",), r"several scripts for the language 'zh': name one of zh_hans, zh_hant"),
        ("nllb", ("en-pt_br", "en-pt_pt"), r"'pt_br' and 'pt_pt', which are one language to the base model, por_Latn"),
        ("madlad", ("de-en",), r"has no token for the language 'en': name one of de, fr, zh_latn"),
    ],
)
def test_languages_that_a_base_cannot_be_told_are_refused(encoder_decoder, base, pairs, sentence):  # noqa: F811
    prompts = opened(encoder_decoder(base))[2]
    with pytest.raises(UserError, match=sentence):
        prompts.languages.check(pairs)


def test_codes_are_found_however_they_are_known(encoder_decoder):  # noqa: F811
    nllb, m2m100, marian = (opened(encoder_decoder(name))[2].languages for name in ("nllb", "m2m100", "marian_multi"))
    asked = {"de": "deu_Latn", "pt_br": "por_Latn", "sr": "srp_Cyrl", "ko": "kor_Hang", "zh_hant": "zho_Hant"}
    assert {code: nllb.own_code(code) for code in asked} == asked
    assert m2m100.own_code("zh_hans") == "zh" and marian.own_code("de") == "deu"
    assert marian.own_code("pt_br") == "pt_BR"


def test_a_base_keeps_the_first_layers_of_both_sides_and_skips_none(encoder_decoder):  # noqa: F811
    model, _ = load_base(str(encoder_decoder("m2m100")), num_layers=1)
    assert [len(side.layers) for side in (model.model.encoder, model.model.decoder)] == [1, 1]
    assert model.config.encoder_layerdrop == model.model.encoder.layerdrop == 0
    t5, _ = load_base(str(encoder_decoder("t5")), num_layers=1)
    assert [len(side.block) for side in (t5.encoder, t5.decoder)] == [1, 1]


def test_a_report_shows_beams_and_copying_for_a_base(encoder_decoder, parallel_rows, tmp_path):  # noqa: F811
    recipe = recipe_for(encoder_decoder("t5"), parallel_rows, arms={"full": None}, num_beams=2)
    experiment = make_translation(recipe, cache_dir=None)
    model = experiment.arms["full"].build(0)
    details = experiment.arms["full"].task.details(model, out=tmp_path)
    assert all(pair.beam_chrf is not None and pair.copy_chrf > 0 for pair in details.pairs.values())
    lines = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"source", "reference", "output", "beam", "pair"} <= json.loads(lines[0]).keys() and len(lines) == 8


def test_a_base_translates_before_it_is_tuned(encoder_decoder):  # noqa: F811
    folder = encoder_decoder("nllb")
    model, _, prompts = opened(folder)
    line = translate(folder, "ban nab", source_language="en", target_language="deu_Latn")
    ids = prompts.encode([PAIR])[0]
    how = {"forced_bos_token_id": prompts.prefix("de")[1], "max_new_tokens": 2 * len(ids) + 17, "do_sample": False}
    assert prompts.decode(model.generate(torch.tensor([ids]), **how)[:, 2:].tolist()) == [line]
    with pytest.raises(UserError, match="no token for the language 'tlh'"):
        translate(folder, "ban nab", source_language="en", target_language="tlh")


def test_experts_are_pruned_for_the_languages_of_some_sentences(encoder_decoder, tmp_path):  # noqa: F811
    pairs = [PAIR, PAIR._replace(target_language="fr")]
    pruned = prune_for_sentences(str(encoder_decoder("nllb_moe")), pairs, tmp_path / "small", keep=2)
    receipt = json.loads((tmp_path / "small" / "pruning.json").read_text(encoding="utf-8"))
    assert receipt["directions"] == ["en-de", "en-fr"] and len(receipt["layers"]) == 2
    assert all(len(layer.kept) == 2 and 0.5 <= layer.share <= 1 for layer in pruned)
    model, _, _ = opened(tmp_path / "small")
    assert model.config.num_experts == 2 and model.model.encoder.layers[1].ffn.num_experts == 2
    translate(tmp_path / "small", "ban nab", source_language="en", target_language="de")
    with pytest.raises(UserError, match="is there already: name a new folder"):
        prune_for_sentences(str(encoder_decoder("nllb_moe")), pairs, tmp_path / "small", keep=2)


def test_one_command_leads_from_a_file_of_pairs_to_arms_a_report_and_a_translated_file(
    encoder_decoder,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    def run_verb(*arguments):
        monkeypatch.setattr("sys.argv", ["mixtura", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"english": word, "german": word[::-1]}) for word in WORDS]
    (tmp_path / "own.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "new.txt").write_text("ban tik\n\nmon sef\n", encoding="utf-8")
    short = [f"training.{key}" for key in ("steps=2", "batch_size=4", "eval_every=2", "eval_sequences=4")]
    less = [part for change in (*short, "seeds=[0]", "num_beams=2") for part in ("--set", change)]
    flags = ("--data", "own.jsonl", "--columns", "english,german", "--base", encoder_decoder("marian"))
    run_verb("finetune", "translation", *flags, *less, "--out", "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == ["lora", "lora_by_pair", "mixture_of_lora"]
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "copying" in page.lower() and "en-de" in page
    checkpoint = tmp_path / "run" / "arms" / "mixture_of_lora" / "seed0" / "checkpoint"
    run_verb("translate", checkpoint, "--from", "en", "--to", "de", "--in", "new.txt", "--out", "done.txt")
    assert len((tmp_path / "done.txt").read_text(encoding="utf-8").splitlines()) == 3
