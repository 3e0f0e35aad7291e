"""What people get wrong, from the command line: exit code 2, one sentence that names value and fix, nothing written.

Some are of a first afternoon, some of public bug reports on transformers, PEFT, TRL, torchtitan, axolotl, unsloth and
mergekit. Every command runs in one folder, whose files are in `place`; it must be the same after each of them.
What single files of data look like is in data/test_situations.py, what happens in the middle of runs in test_errors.py.
"""

import gzip
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mixtura import cli
from mixtura.config import recipe_from_dict, recipe_to_toml
from mixtura.data.prepare import train_tokenizer
from mixtura.exporting.engines import EngineMissing
from mixtura.models import MixtureConfig, MixtureForCausalLM

Mistakes = dict[str, tuple[str, str]]
"""By name: the command without `mixtura`, and parts of its sentence with | between them."""

COMPARE = "compare tiny.toml --out new/deep --set"
RECIPES: Mistakes = {
    "no such recipe": ("compare none.toml", "none.toml | --preset"),
    "a folder": ("compare dense", "'dense' | folder"),
    "below a file": ("compare tiny.toml/deeper.toml", "deeper.toml | check the path"),
    "no TOML": ("compare broken.toml", "broken.toml | TOML"),
    "YAML of another trainer": ("compare axolotl.yaml", "axolotl.yaml' is not a TOML recipe"),
    "JSON of another trainer": ("compare llama/config.json", "is not a TOML recipe"),
    "weights": ("compare llama/model.safetensors", "is not a TOML recipe"),
    "another encoding": ("compare latin.toml", "is not a TOML recipe"),
    "a key twice": ("compare twice.toml", "is not a TOML recipe | line 2"),
    "a path of Windows": ("compare windows.toml", "line 2 | write a path with backslashes in single quotes"),
    "an empty recipe": ("compare empty.toml", "lacks 'arms'"),
    "no arms": ("compare no-arms.toml", "no arm | [arms.dense]"),
    "arms as a list": ("compare arms-list.toml", "'arms' must be a section of named arms"),
    "an arm as a text": (f"{COMPARE} arms.dense=dense", "'arms.dense' must be a section"),
    "an unknown task": ("compare task.toml", "'task' is 'summarisation' | translation, classification"),
    "a task that is a number": (f"{COMPARE} task=3", "'task' is 3"),
    "a preset that is none": ("compare --preset huge", "'huge' | quick, default, full"),
    "neither recipe nor preset": ("compare", "--preset"),
    "recipe and preset": ("compare tiny.toml --preset quick", "Give either"),
    "unknown key": (f"{COMPARE} training.stps=3", "training.stps | did you mean 'training.steps'"),
    "unknown section": (f"{COMPARE} trainign.steps=3", "trainign | did you mean 'training'"),
    "a key of another trainer": (f"{COMPARE} training.num_train_epochs=3", "'training.num_train_epochs': known keys"),
    "a key that is near nothing": (f"{COMPARE} training.lr=1", "'training.lr': known keys are"),
    "wrong type": (f"{COMPARE} training.steps=many", "training.steps | 'many' | a whole number"),
    "a float for a whole number": (f"{COMPARE} training.steps=1.5", "1.5 | a whole number"),
    "a number beyond 64 bits": (f"{COMPARE} training.steps=99999999999999999999", "99999999999999999999 | less than"),
    "yes for true": (f"{COMPARE} training.activation_checkpointing=yes", "'yes' | true or false"),
    "True for true": (f"{COMPARE} training.activation_checkpointing=True", "'True' | true or false"),
    "half precision": (f"{COMPARE} training.dtype=fp16", "'fp16' | float32, bfloat16"),
    "an optimizer": (f"{COMPARE} training.optimizer=adam", "'adam' | adamw, adamw_8bit, adafactor"),
    "an activation": (f"{COMPARE} model.activation=swiglu", "'swiglu' | relu, gelu, silu"),
    "unknown source": (f"{COMPARE} data.source=web", "'web' | movie-reviews, hub, local"),
    "a tracker that is none": (f"{COMPARE} 'training.trackers=[\"mlflow\"]'", "'mlflow' | wandb"),
    "a tracker without brackets": (f"{COMPARE} training.trackers=wandb", "'wandb' | a list, such as [\"tensorboard\"]"),
    "seeds without brackets": (f"{COMPARE} seeds=3", "'seeds' is 3 | a list, such as [0, 1, 2]"),
    "rates without brackets": (f"{COMPARE} search.learning_rates=1e-3", "a list, such as [1e-3, 3e-3]"),
    "no value": (f"{COMPARE} training.steps", "--set 'training.steps' | section.key=value"),
    "a change of nothing": (f"{COMPARE} =3", "'=3' | section.key=value"),
    "a key below a value": (f"{COMPARE} training.steps.x=3", "'steps' is a value | section.key=value"),
    "an arm of another spelling": ("train tiny.toml --arm Dense --out new/deep", "'Dense' | dense, mixture_of_tokens"),
    "which arm": ("train tiny.toml --out new/deep", "--arm dense|mixture_of_tokens"),
    "unknown family": (f"{COMPARE} arms.dense.family=moe", "'moe' | token_choice"),
    "a family of another spelling": (f"{COMPARE} arms.dense.family=Dense", "'Dense' | dense, token_choice"),
    "a setting of another family": (f"{COMPARE} arms.dense.top_k=2", "top_k' is 2, which dense does not read | remoe"),
    "unknown baseline": (f"{COMPARE} baseline=sparse", "'sparse' | dense, mixture_of_tokens"),
    "an arm that is no folder": (f"{COMPARE} 'arms.\"a/b\".family=dense'", "a/b"),
    "a name that is no folder": (f"{COMPARE} name=../elsewhere", "'../elsewhere' | letters"),
    "an empty name": (f"{COMPARE} name=", "name '' cannot be a folder"),
    "unknown control": (f"{COMPARE} arms.mixture_of_tokens.control=zero", "'zero' | uniform_router"),
    "unknown placement": (f"{COMPARE} arms.mixture_of_tokens.placement=first", "'first' | all, later_half"),
}

NUMBERS: Mistakes = {
    "negative": (f"{COMPARE} training.batch_size=-4", "-4 | greater than zero"),
    "no steps": (f"{COMPARE} training.steps=0", "training.steps | greater than zero"),
    "no micro-batches": (f"{COMPARE} training.gradient_accumulation_steps=0", "greater than zero"),
    "never evaluated": (f"{COMPARE} training.eval_every=0", "training.eval_every | greater than zero"),
    "never saved": (f"{COMPARE} training.save_every=0", "training.save_every | greater than zero"),
    "a rate of zero": (f"{COMPARE} training.learning_rate=0", "is 0.0 | greater than zero"),
    "a rate that is text": (f"{COMPARE} training.learning_rate=1e-3x", "'1e-3x' | a number"),
    "a rate that is no number": (f"{COMPARE} training.learning_rate=nan", "training.learning_rate | nan | finite"),
    "an endless rate": (f"{COMPARE} arms.dense.learning_rate=inf", "arms.dense.learning_rate | inf"),
    "a negative rate to search": (f"{COMPARE} search.learning_rates=[-1.0]", "search.learning_rates | -1.0"),
    "no steps to search": (f"{COMPARE} search.steps=0", "search.steps | greater than zero"),
    "no clipping": (f"{COMPARE} training.max_grad_norm=-1", "max_grad_norm | greater than zero"),
    "a warm-up longer than the run": (f"{COMPARE} training.warmup_fraction=2", "2.0 | between 0 and 1"),
    "a momentum above one": (f"{COMPARE} training.adam_beta1=1.5", "adam_beta1 | 1.5 | less than 1"),
    "a negative decay": (f"{COMPARE} training.weight_decay=-1", "weight_decay | -1.0 | zero or more"),
    "more threads than a process can have": (f"{COMPARE} training.threads=100000", "100000 | at most 1024"),
    "no seeds": (f"{COMPARE} seeds=[]", "seeds | at least one seed"),
    "the same seed twice": (f"{COMPARE} seeds=[1,1]", "[1, 1] | each once"),
    "a negative seed": (f"{COMPARE} seeds=[-1]", "seeds | -1 | 4294967295"),
    "a seed that is half": (f"{COMPARE} seeds=[0.5]", "0.5 | a whole number"),
    "a seed beyond 32 bits": (f"{COMPARE} search.seeds=[99999999999]", "search.seeds | 99999999999 | 4294967295"),
    "heads that do not fit": (f"{COMPARE} model.hidden_size=30", "30 | even, whole width"),
    "three heads": (f"{COMPARE} model.num_attention_heads=3", "32 for 3 attention heads"),
    "key heads": (f"{COMPARE} model.num_key_value_heads=3", "is 3 | must divide the 2"),
    "no width": (f"{COMPARE} model.hidden_size=0", "greater than zero"),
    "no layers": (f"{COMPARE} model.num_hidden_layers=0", "greater than zero"),
    "a million layers": (f"{COMPARE} model.num_hidden_layers=1000000", "at most 10000"),
    "an impossible width": (f"{COMPARE} model.hidden_size=1000000", "128.0 TB | this machine has | hidden_size"),
    "an impossible vocabulary": (f"{COMPARE} data.vocab_size=1000000000000", "TB | data.vocab_size"),
    "too small a vocabulary": (f"{COMPARE} data.vocab_size=100", "100 | 259"),
    "no experts": (f"{COMPARE} arms.mixture_of_tokens.num_experts=0", "num_experts | greater than zero"),
    "more choices than experts": (
        f"{COMPARE} arms.dense.family=token_choice --set arms.dense.top_k=99",
        "99 | lower top_k or raise num_experts",
    ),
    "expert choice of more than there are": (
        f"{COMPARE} arms.dense.family=expert_choice --set arms.dense.group_size=4 --set arms.dense.top_k=99",
        "99 | lower top_k or raise num_experts",
    ),
    "routing dearer than the layer": (f"{COMPARE} arms.mixture_of_tokens.num_experts=4096", "4096 | fewer experts"),
    "no multiple of the group": (f"{COMPARE} training.batch_size=6", "is 6 | group_size' 4"),
    "smaller than the group": (f"{COMPARE} training.batch_size=2", "is 2 | group_size' 4"),
    "a group of one": (f"{COMPARE} arms.mixture_of_tokens.group_size=1", "is 1 | at least 2"),
    "an evaluation that fills no groups": (
        f"{COMPARE} training.eval_sequences=6",
        "is 6 | group_size' 4 | set it to 4",
    ),
    "nothing held out": (f"{COMPARE} data.validation_fraction=0", "validation_fraction | greater than zero"),
    "all held out": (f"{COMPARE} data.validation_fraction=1", "validation_fraction | between 0 and 1"),
    "nothing to predict": (f"{COMPARE} data.sequence_length=1", "data.sequence_length | is 1 | 2 or more"),
    "no bytes": (f"{COMPARE} data.max_bytes=0", "max_bytes | greater than zero"),
}

TEXTS: Mistakes = {
    "no such file": (f"{COMPARE} data.path=nowhere.txt", "nowhere.txt"),
    "an address": (f"{COMPARE} data.path=https://example.com/a.txt", "an address | download"),
    "empty": (f"{COMPARE} data.path=empty.txt", "empty.txt | empty"),
    "blank": (f"{COMPARE} data.path=blank.txt", "blank.txt | no text"),
    "binary": (f"{COMPARE} data.path=binary.txt", "binary.txt | NUL"),
    "a folder in Latin-1": ("compare tiny.toml --out caf\udce9", "'caf\\udce9' has a name that is not UTF-8 text"),
    "an export in Latin-1": ("export dense caf\udce9", "'caf\\udce9' has a name that is not UTF-8 text"),
    "a name of Latin-1": (f"{COMPARE} data.path=caf\udce9.txt", "data.path=caf\\udce9.txt is not UTF-8 text"),
    "not UTF-8": (f"{COMPARE} data.path=latin.txt", "latin.txt | UTF-8"),
    "shorter than a sequence": (f"{COMPARE} data.path=six.txt --set data.validation_fraction=0.5", "fewer than the 16"),
    "longer sequences than the text": (f"{COMPARE} data.sequence_length=100000", "100000 | data.sequence_length"),
    "one document many times": (f"{COMPARE} data.path=repeated.txt", "1,999 repeated documents has | fewer than"),
    "a folder without text": (f"{COMPARE} data.path=nothing", "'nothing', a folder without any file of .txt"),
    "Markdown": (f"{COMPARE} data.path=notes.md", "notes.md | rename it to .txt if it is plain text"),
    "a picture": (f"{COMPARE} data.path=picture.png", "picture.png | is none of .txt"),
    "a table without such a column": (f"{COMPARE} data.path=columns.csv", "columns.csv has 'text' | one of a, b"),
    "hub without a name": (f"{COMPARE} data.source=hub", "data.name | wikitext"),
    "hub without network": (
        f"{COMPARE} data.source=hub --set data.name=wikitext",
        "'wikitext' cannot be read | network",
    ),
}

PLACES: Mistakes = {
    "a file is no folder": ("compare tiny.toml --out tiny.txt", "'tiny.txt' is a file | --out"),
    "below a file": ("compare tiny.toml --out tiny.txt/deeper/still", "'tiny.txt' is a file | --out"),
    "a place that cannot be": ("compare tiny.toml --out /proc/none", "'/proc/none' cannot be written | --out"),
    "a folder of something else": ("compare tiny.toml --out dense", "'dense' has files | --out"),
    "starting over in it": ("compare tiny.toml --out dense --no-resume", "'dense' has files | --out"),
    "a folder for another task": ("compare tiny.toml --out begun", "for translation | for pretraining | --no-resume"),
    "a model of nothing": ("upcycle llama tiny.txt", "is not empty"),
    "an upcycled model below a file": ("upcycle llama tiny.txt/deeper", "'tiny.txt' is a file"),
    "an upcycled model nowhere": ("upcycle llama /proc/none/deeper", "0.0 GB left | another disk"),
    "an upcycled model on its source": ("upcycle llama llama", "'llama' is not empty"),
    "an export on its source": ("export dense dense", "'dense' is not empty"),
    "an export below a file": ("export dense tiny.txt/deeper", "'tiny.txt' is a file"),
    "a calibrated model on something": ("calibrate mixture dense --text tiny.txt", "'dense' is not empty"),
    "a converted model on something": ("transition mixture dense --to alone", "'dense' is not empty"),
    "prompts to a folder": ("generate dense hi --out llama", "'llama' is a folder | --out"),
    "answers below a file": ("generate dense hi --out tiny.txt/a", "'tiny.txt' is a file | --out"),
    "a recipe that is there": ("init --data tiny.txt --out tiny.toml", "'tiny.toml' is there already"),
    "a recipe below a file": ("init --data tiny.txt --out tiny.txt/a.toml", "'tiny.txt' is a file"),
    "a page where a file is": ("diagnose mixture --text a=tiny.txt --out tiny.txt", "'tiny.txt' cannot be written"),
    "a report of nothing": ("report nothing", "'nothing' has no results.json"),
    "a report of a file": ("report tiny.toml", "'tiny.toml' is a file"),
    "a damaged report": ("report damaged", "results.json"),
}

TRANSLATION = "finetune translation --preset quick --out new/deep --data"
CLASSES = "finetune classification --preset quick --out new/deep --data"
CHATS = "finetune chat --preset quick --base llama --out new/deep --data"
PAIRS, SMALL = "pairs.jsonl --columns English,German", "--set model.hidden_size=32 --set model.num_hidden_layers=1"
TUNING: Mistakes = {
    "a task of another spelling": ("finetune translaton", "'translaton' | translation, classification"),
    "a task that is not there": ("finetune poetry", "'poetry' | translation, classification, chat"),
    "a recipe for a task": ("finetune tiny.toml", "'tiny.toml' | translation"),
    "a recipe of another kind": ("finetune translation tiny.toml", "for pretraining"),
    "a preset of others": ("finetune translation --preset full", "'full' | quick or default"),
    "no such data": (f"{TRANSLATION} none.jsonl", "--data is 'none.jsonl'"),
    "no data": (f"{CLASSES} ''", "--data is '' | hub:NAME"),
    "a hub dataset without name": (f"{CLASSES} hub:", "--data is 'hub:'"),
    "a hub dataset without network": (f"{CLASSES} hub:imdb", "'imdb' cannot be read | network"),
    "plain text as pairs": (f"{TRANSLATION} tiny.txt --columns a,b", "--data is 'tiny.txt' | .jsonl"),
    "columns that were not said": (f"{TRANSLATION} pairs.jsonl", "--columns | English, German"),
    "one column": (f"{TRANSLATION} pairs.jsonl --columns English", "'English' | SOURCE,TARGET"),
    "three columns": (f"{TRANSLATION} pairs.jsonl --columns English,German,x", "SOURCE,TARGET"),
    "one column twice": (f"{TRANSLATION} pairs.jsonl --columns English,English", "both 'English'"),
    "five columns": (f"{TRANSLATION} pairs.jsonl --columns a,b,c,d,e", "or four with SOURCE_LANGUAGE"),
    "languages that nothing says": (
        f"{TRANSLATION} columns.csv --columns a,b",
        "Nothing says which languages | --pairs",
    ),
    "a column of another spelling": (f"{TRANSLATION} pairs.jsonl --columns English,Germn", "'Germn' | 'German'"),
    "empty columns": (f"{CLASSES} reviews.jsonl --columns ''", "--columns is '' | TEXT,LABEL"),
    "one language": (f"{TRANSLATION} {PAIRS} --pairs en", "--pairs has 'en'"),
    "a language into itself": (f"{TRANSLATION} {PAIRS} --pairs en-en", "--pairs has 'en-en'"),
    "an arrow": (f"{TRANSLATION} {PAIRS} --pairs 'en>de'", "--pairs has 'en>de'"),
    "names of languages": (f"{TRANSLATION} {PAIRS} --pairs English-German", "en for English, de for German"),
    "columns the other way round": (
        f"{TRANSLATION} {PAIRS} --pairs de-en",
        "The columns English,German (--columns) are English and German | in --pairs is de-en: name them German,English",
    ),
    "columns of another language": (f"{TRANSLATION} {PAIRS} --pairs en-fr", "name columns of English and French"),
    "a direction twice": (f"{TRANSLATION} {PAIRS} --pairs en-de,en-de", "each direction once"),
    "no direction": (f"{TRANSLATION} {PAIRS} --pairs ''", "--pairs has ''"),
    "directions of classes": (f"{CLASSES} reviews.jsonl --pairs en-de", "no directions | leave it out"),
    "one pair": (f"{TRANSLATION} one-pair.jsonl --columns en,de", "No train pairs | 1 usable"),
    "pairs without targets": (f"{TRANSLATION} no-targets.jsonl --columns en,de", "No sentence pair is left | 30 empty"),
    "pairs that are copies": (f"{TRANSLATION} copies.jsonl --columns en,de", "30 untranslated"),
    "pairs that are too long": (f"{TRANSLATION} long.jsonl --columns en,de {SMALL}", "30 too long | max_characters"),
    "more held out than there is": (f"{TRANSLATION} {PAIRS} --set data.test_sources=999", "test_sources 999"),
    "room for no sentence": (
        f"{TRANSLATION} {PAIRS} {SMALL} --set data.max_length=4",
        "max_length | more than 4 tokens",
    ),
    "experts by word": (
        f"{TRANSLATION} {PAIRS} --set arms.language_experts.feed_forward.route_by=word",
        "'word' | token, pair, source, target",
    ),
    "no rank": (f"{TRANSLATION} {PAIRS} --base llama --set arms.lora.adapter.rank=0", "rank is 0"),
    "an adapter of others": (f"{TRANSLATION} {PAIRS} --base llama --set arms.lora.adapter.method=qlora", "'qlora'"),
    "a base with room for no prompt": (f"{TRANSLATION} {PAIRS} --base short", "more than 64 tokens | more positions"),
    "targets of another model": (
        f"{TRANSLATION} {PAIRS} --base llama --set 'arms.lora.adapter.targets=[\"query_key_value\"]'",
        "'query_key_value' | q_proj, k_proj",
    ),
    "targets without brackets": (
        f"{TRANSLATION} {PAIRS} --base llama --set arms.lora.adapter.targets=q_proj",
        '\'q_proj\' | a list, such as ["one", "two"]',
    ),
    "one class": (f"{CLASSES} one-class.jsonl", "label 'a' | two classes or more"),
    "instructions": (f"{CHATS} alpaca.json", "has 'messages' | set --columns to 'instruction+input' and 'output'."),
    "chats of another name": (f"{CHATS} shared.jsonl", "has 'messages' | set --columns to 'conversations'."),
    "three columns of chats": (f"{CHATS} alpaca.json --columns a,b,c", "PROMPT,COMPLETION, or the one column"),
    "a text without labels": (f"{CLASSES} tiny.txt", "'tiny.txt' has no labels | __label__"),
    "a packed file cut short": (f"{CLASSES} cut.csv.gz", "'cut.csv.gz' cannot be unpacked"),
    "a class for every text": (f"{CLASSES} own-class.jsonl", "60 different labels | --columns"),
    "three rows": (f"{CLASSES} three.jsonl", "No training example | more examples"),
    "the same labels everywhere": (f"{CLASSES} lists.jsonl", "All 60 | 'a, b' | two classes or more"),
    "one text, two labels": (f"{CLASSES} contradictory.jsonl", "60 contradictory labels"),
    "texts without words": (f"{CLASSES} no-texts.jsonl", "60 empty"),
    "more test than there is": (f"{CLASSES} reviews.jsonl --set data.test_examples=999", "test_examples 999"),
    "pooling": (
        f"{CLASSES} reviews.jsonl --set arms.last_layer.head.pooling=max",
        "'max' | mean, first, last, attention",
    ),
    "a head": (
        f"{CLASSES} reviews.jsonl --set arms.last_layer.head.kind=linear",
        "'linear' | last_layer, best_layer, layer_mix",
    ),
    "what is tuned": (f"{CLASSES} reviews.jsonl --set arms.last_layer.tune=lora", "'lora' | frozen, adapter, full"),
}

BASE = f"{CLASSES} reviews.jsonl --base"
MODELS: Mistakes = {
    "no such base": (f"{BASE} nowhere", "'nowhere' cannot be loaded | --base"),
    "a GGUF file as base": (f"{BASE} model.gguf", "--base is 'model.gguf', a file"),
    "an adapter as base": (f"{BASE} adapter", "an adapter alone: merge it into its base model 'some/base'"),
    "a base without tokenizer": (f"{BASE} no-tokenizer", "has no tokenizer: copy tokenizer.json"),
    "a base without weights": (f"{BASE} no-weights", "'no-weights' cannot be loaded"),
    "a base that was cut": (f"{BASE} cut", "'cut' cannot be loaded"),
    "a base that lacks a shard": (f"{BASE} shard", "model-00002-of-00002.safetensors"),
    "a quantised base": (f"{BASE} quantised", "'quantised' cannot be loaded"),
    "a base of its own code": (f"{BASE} own-code", "'own-code' cannot be loaded"),
    "an encoder that should write": (f"{TRANSLATION} {PAIRS} --base encoder", "cannot write text"),
    "from nowhere": ("train --from nowhere --out new/deep", "no folder 'nowhere'"),
    "from a file": ("train --from tiny.txt --out new/deep", "'tiny.txt' is a file"),
    "from a classifier": ("train --from classifier --text tiny.txt --out new/deep", "classifier"),
    "on no text": ("train --from dense --text none.txt --out new/deep", "--text is 'none.txt'"),
    "on other columns": ("train --from dense --text columns.csv --out new/deep", "columns.csv has 'text'"),
    "no such model": ("generate nowhere hi", "'nowhere' is no model folder"),
    "a comparison for a model": ("generate runs hi", "'runs' is no model folder | runs/arms/a/seed0/checkpoint"),
    "an arm for a model": ("evaluate runs/arms/a --text tiny.txt", "give one such as runs/arms/a/seed0/checkpoint"),
    "a file for a model": ("generate dense/model.safetensors hi", "is no model folder"),
    "an adapter for a model": ("generate adapter hi", "merge it into its base model 'some/base'"),
    "a classifier that should write": ("generate classifier hi", "holds a classifier | mixtura classify"),
    "an encoder asked to write": ("generate encoder hi", "holds a BertModel, which cannot write text"),
    "a model of an unknown kind": ("generate unknown hi", "nonesuch"),
    "a configuration without a kind": ("generate kindless hi", "'kindless' cannot be loaded"),
    "a configuration that is a list": ("generate list hi", "list/config.json' is damaged"),
    "a configuration that is no JSON": ("generate prose hi", "prose/config.json' is damaged"),
    "a negative width": ("generate negative hi", "'negative' cannot be loaded"),
    "more layers than there are": ("generate layers hi", "'layers'"),
    "another vocabulary": ("generate vocabulary hi", "embed_tokens | does not fit its config.json"),
    "a model that was cut": ("evaluate cut --text tiny.txt", "'cut' cannot be loaded | train or export it again"),
    "a model without tokenizer": ("generate no-tokenizer hi", "has no tokenizer: copy tokenizer.json"),
}

USE: Mistakes = {
    "an empty prompt": ("generate dense ''", "prompt is empty | give some text"),
    "no prompt": ("generate dense", "Give either a prompt"),
    "standard input and more": ("generate dense - hi", "stands for standard input"),
    "prompts in a folder": ("generate dense --in llama", "'llama' cannot be read"),
    "prompts in a table": ("generate dense --in pairs.jsonl", "'pairs.jsonl' is a table"),
    "a share of two": ("generate dense hi --temperature 1 --top-p 2", "top-p is 2"),
    "top-k of the likeliest": ("generate dense hi --top-k 5", "temperature 0 draws nothing"),
    "a chat without template": ("generate dense hi --chat", "no chat template | --chat"),
    "nothing to evaluate": ("evaluate dense", "--text | --tasks"),
    "fewer sequences than a batch": (
        "evaluate dense --text tiny.txt --max-sequences 1",
        "--max-sequences 1 is fewer than one batch of 16: raise it",
    ),
    "a name of a text in Latin-1": ("diagnose dense --text caf\udce9=tiny.txt", "not UTF-8 text | before the ="),
    "two things to evaluate": ("evaluate dense --text tiny.txt --tasks arc", "--text | --tasks"),
    "no task": ("evaluate dense --tasks ''", "--tasks is '' | hellaswag"),
    "a short text": ("evaluate dense --text short.txt", "'short.txt' has | or lower --sequence-length"),
    "a blank text": ("evaluate dense --text blank.txt", "no text in the file blank.txt"),
    "a column of another name": ("evaluate dense --text columns.csv", "--text-column to one of a, b"),
    "longer than the positions": ("evaluate dense --text tiny.txt --sequence-length 99999", "64 positions"),
    "more than the text fills": ("evaluate dense --text tiny.txt --batch-size 9999", "--batch-size"),
    "groups that are not filled": ("evaluate mixture --text tiny.txt --batch-size 6", "multiple of 4"),
    "a model that does not translate": ("translate dense hi --from en --to de", "'dense' is no translation model"),
    "a direction it has not": (
        "translate translator hi --from de --to en",
        "does not translate de-en: choose one of en-de",
    ),
    "a language by its name": ("translate translator hi --from English --to German", "en for English"),
    "no text to translate": ("translate translator '' --from en --to de", "text is empty"),
    "a model that is no classifier": ("classify dense hi", "'dense' holds no classifier"),
    "no text to classify": ("classify classifier ''", "text is empty"),
    "a text of Latin-1 to classify": ("classify classifier caf\udce9", "The text is not UTF-8 text"),
    "a text of Latin-1 to translate": (
        "translate translator caf\udce9 --from en --to de",
        "The text is not UTF-8 text",
    ),
    "a blank file to classify": ("classify classifier --in blank.txt", "'blank.txt' is empty"),
    "nothing to diagnose on": ("diagnose mixture --out new", "--text de=german.txt"),
    "a text without name": ("diagnose mixture --text tiny.txt --out new", "'tiny.txt' names no text"),
    "one name twice": ("diagnose mixture --text a=tiny.txt --text a=six.txt --out new", "'a' comes twice"),
    "a key that there is not": ("keys foo", "'foo' | sections are"),
    "a section of another spelling": ("keys traning", "did you mean 'training'"),
    "a recipe for no data": ("init --data none.jsonl", "--data is 'none.jsonl'"),
    "a recipe for an unknown task": ("init --data tiny.txt --task summarise", "'summarise' | pretraining"),
    "a recipe for other columns": ("init --data pairs.jsonl --columns English,x", "'x' | English, German"),
    "sizes that there are not": ("bench --sizes huge", "--sizes is 'huge' | quick, default, full"),
}

CONVERT: Mistakes = {
    "no such source": ("upcycle nowhere new/deep", "no folder 'nowhere'"),
    "a family that cannot be": ("upcycle llama new/deep --family soft", "'soft' | token_choice or mixture_of_tokens"),
    "more than there are": ("upcycle llama new/deep --top-k 9", "9 of 8 experts"),
    "layers by word": ("upcycle llama new/deep --layers first", "'first' | later_half"),
    "layers beyond": ("upcycle llama new/deep --layers 0,9", "no layers '9' | 0 to 1"),
    "parts of odd size": ("upcycle llama new/deep --split 5", "a multiple of 5"),
    "all parts shared": ("upcycle llama new/deep --split 2 --shared 2", "share fewer"),
    "a share of two": ("upcycle llama new/deep --drop 2", "drop is 2.0"),
    "noise that is no number": ("upcycle llama new/deep --noise nan", "noise is nan"),
    "groups of token choice": ("upcycle llama new/deep --group-size 4", "token_choice has no groups"),
    "routers of no text": ("upcycle llama new/deep --router texts", "give --text FILE"),
    "a checkpoint of another shape": ("upcycle llama new/deep --with wide", "only checkpoints of one shape"),
    "a mixture": ("upcycle mixture new/deep", "no plain dense model"),
    "layers without a gate": ("upcycle dense new/deep", "without a gate"),
    "an encoder": ("upcycle encoder new/deep", "'bert' model | llama, mistral"),
    "a source that was cut": ("upcycle cut new/deep", "damaged"),
    "a source without weights": ("upcycle no-weights new/deep", "no weights | model.safetensors"),
    "a source that lacks a shard": ("upcycle shard new/deep", "model-00002-of-00002.safetensors"),
    "a quantised source": ("upcycle quantised new/deep", "is quantised"),
    "an adapter": ("upcycle adapter new/deep", "merge it into its base model"),
    "averages of a dense model": ("calibrate dense new/deep --text tiny.txt", "no mixture-of-tokens layer"),
    "averages of a short text": ("calibrate mixture new/deep --text short.txt", "one sequence: give more text."),
    "token choice without text": ("transition mixture new/deep --to token_choice", "--text"),
    "more experts than there are": (
        "transition mixture new/deep --to token_choice --text tiny.txt --top-k 99",
        "99 experts of the 4",
    ),
    "text for alone": ("transition mixture new/deep --to alone --text tiny.txt", "leave --text out"),
    "a container that is none": ("export dense new/deep --to gguf", "'gguf' | llama, mistral"),
    "layers that no stock model has": ("export mixture new/deep", "remote_code | token choice"),
    "a stock model": ("export llama new/deep", "not one of Mixtura's"),
    "a comparison": ("export runs new/deep", "give one such as runs/arms/a/seed0/checkpoint"),
    "a model that was cut": ("export cut-dense new/deep", "damaged"),
    "an engine that is none": ("verify dense dense --with tgi", "'tgi' | transformers, vllm, llama.cpp"),
    "an engine that is not here": ("verify dense dense --with vllm=/none/python", "'/none/python' is no Python"),
    "no export to judge": ("verify dense nowhere", "'nowhere' is no model folder"),
}

TABLES = {
    "recipe": RECIPES,
    "number": NUMBERS,
    "text": TEXTS,
    "place": PLACES,
    "tuning": TUNING,
    "model": MODELS,
    "use": USE,
    "convert": CONVERT,
}
MISTAKES = {f"{kind}: {name}": mistake for kind, table in TABLES.items() for name, mistake in table.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_everything_as_it_was(name, place, monkeypatch, capsys):
    command, parts = MISTAKES[name]
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["mixtura", *shlex.split(command)])
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("mixtura: ") and said.count("\n") == 1 and said.rstrip().endswith((".", "?")), said
    assert not [part for part in parts.split(" | ") if part not in said], said
    assert contents(place) == before


USAGE = {
    "no task": ("finetune", "Missing argument"),
    "a verb of another spelling": ("finetun", "Did you mean 'finetune'"),
    "a flag that there is not": ("train --sed 1", "--sed"),
    "a negative seed": ("train --seed -1", "--seed"),
    "no tokens": ("generate dense hi --max-new-tokens 0", "--max-new-tokens"),
    "a temperature that is no number": ("generate dense hi --temperature nan", "--temperature"),
    "no target language": ("translate translator hi --from en", "--to"),
    "no beams": ("translate translator hi --from en --to de --beams 0", "--beams"),
    "what a model becomes": ("transition mixture new --to soft", "'soft' | token_choice"),
    "shards of nothing": ("export dense new --shard-size 0", "--shard-size"),
}
"""What the parser of flags refuses, in its own words."""


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_flag_shows_the_usage_and_leaves_everything_as_it_was(name, place, monkeypatch, capsys):
    command, parts = USAGE[name]
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["mixtura", *shlex.split(command)])
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--help" in said and "Traceback" not in said, said
    assert not [part for part in parts.split(" | ") if part not in said], said
    assert contents(place) == before


def test_an_export_that_no_engine_could_run_is_not_taken_for_verified(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "dense", tmp_path / "export")
    command = ["verify", str(place / "dense"), str(tmp_path / "export"), "--with", "vllm"]
    monkeypatch.setattr("sys.argv", ["mixtura", *command])
    monkeypatch.setattr("mixtura.exporting.verification.run_engine", missing)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "Nothing was compared (vllm is not here): install" in capsys.readouterr().err


def missing(*_: object) -> None:
    raise EngineMissing("vllm is not here")


def test_the_list_is_long_and_no_command_is_in_it_twice():
    commands = [command for command, _ in MISTAKES.values()]
    assert len(set(commands)) == len(commands) >= 150


def contents(folder: Path) -> dict[str, tuple[int, int] | None]:
    """What lies below a folder; of files their size and the time of their last change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def place(tiny_corpus, tmp_path_factory) -> Path:
    """The folder in which all commands run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.txt").write_text("\n\n".join(tiny_corpus), encoding="utf-8")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "nothing").mkdir()
    (folder / "tiny.toml").write_text(recipe_to_toml(recipe_from_dict(RECIPE)), encoding="utf-8")
    save_models(folder, train_tokenizer(tiny_corpus, vocab_size=300))
    return folder


RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0],
    "data": {
        "source": "local",
        "path": "tiny.txt",
        "vocab_size": 300,
        "sequence_length": 16,
        "validation_fraction": 0.2,
    },
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "training": {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_sequences": 8, "final_eval_sequences": 8},
    "arms": {
        "dense": {"family": "dense"},
        "mixture_of_tokens": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
    },
}


def rows(*each: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in each)


def labelled(text: str, *labels: object, number: int = 60) -> str:
    return rows(*({"text": text.format(i), "label": labels[i % len(labels)]} for i in range(number)))


def translated(source: str, target: str, number: int = 30) -> str:
    return rows(*({"en": source.format(i), "de": target.format(i)} for i in range(number)))


FILES: dict[str, str | bytes] = {
    "broken.toml": "arms = [",
    "axolotl.yaml": "base_model: some/base\n",
    "latin.toml": 'name = "gr\u00fcn"'.encode("latin-1"),
    "twice.toml": "seeds = [0]\nseeds = [1]\n",
    "windows.toml": '[data]\npath = "C:\\Users\\me"\n',
    "empty.toml": "",
    "no-arms.toml": "[arms]\n",
    "arms-list.toml": 'arms = ["dense"]\n',
    "task.toml": 'task = "summarisation"\n',
    "empty.txt": "",
    "blank.txt": "\n \n\n",
    "binary.txt": b"some text\x00\x01 and more\n" * 20,
    "latin.txt": "gr\u00fcn\n\n".encode("latin-1") * 20,
    "six.txt": "abc\n\ndef\n\nghi\n\njkl\n\nmno\n\npqr",
    "short.txt": "the film",
    "repeated.txt": "the film is good\n\n" * 2000,
    "notes.md": "# Notes\n",
    "picture.png": b"\x89PNG\r\n\x1a\n",
    "columns.csv": "a,b\n1,2\n",
    "pairs.jsonl": rows(*({"English": f"number {i} here", "German": f"Nummer {i} hier"} for i in range(60))),
    "reviews.jsonl": labelled("review {} of a film", "good", "bad"),
    "alpaca.json": json.dumps([{"instruction": "Sum up.", "input": "A text.", "output": "It is one."}] * 60),
    "shared.jsonl": rows(*[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 60),
    "cut.csv.gz": gzip.compress(b"text,label\n" + b"a film,good\n" * 60)[:-9],
    "one-pair.jsonl": translated("a", "b", 1),
    "no-targets.jsonl": translated("number {}", ""),
    "copies.jsonl": translated("number {}", "number {}"),
    "long.jsonl": translated("{} " + "a b " * 3000, "b " * 3000),
    "one-class.jsonl": labelled("text {}", "a"),
    "own-class.jsonl": labelled("text {}", *range(60)),
    "three.jsonl": labelled("text {}", 0, 1, number=3),
    "lists.jsonl": labelled("text {}", ["a", "b"]),
    "contradictory.jsonl": labelled("the same", "a", "b"),
    "no-texts.jsonl": labelled("", "a", "b"),
    "model.gguf": b"GGUF\x03\x00",
    "adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}',
    "classifier/classifier.json": "{}",
    "translator/translation.json": '{"directions": ["en-de"], "prompt": "tags", "max_length": 16, "experts": null, '
    '"experts_through": "task_ids"}',
    "unknown/config.json": '{"model_type": "nonesuch"}',
    "kindless/config.json": "{}",
    "list/config.json": "[1]",
    "prose/config.json": "not JSON",
    "runs/arms/a/seed0/checkpoint/config.json": "{}",
    "damaged/results.json": "{",
    "begun/recipe.toml": 'task = "translation"\n',
    "begun/environment.json": "{}",
    "begun/arms/a/seed0/run.json": "{}",
}

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def save_models(folder: Path, tokenizer: Any) -> None:
    """Models that can be opened, and damaged copies of them."""
    torch.manual_seed(0)
    mixture = {"mlp_layer_types": ["dense", "mixture_of_tokens"], "num_experts": 4, "group_size": 4}
    models = {
        "dense": MixtureForCausalLM(MixtureConfig(**SIZES, **IDS)),
        "mixture": MixtureForCausalLM(MixtureConfig(**SIZES, **IDS, **mixture, moe_intermediate_size=12)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 256}, **IDS)),
        "short": LlamaForCausalLM(LlamaConfig(**SIZES, **IDS)),
        "wide": LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 32}, **IDS)),
        "encoder": BertModel(BertConfig(**SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, source in {"cut": "llama", "cut-dense": "dense", "no-weights": "llama", "shard": "llama"}.items():
        shutil.copytree(folder / source, folder / name)
        weights = folder / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        if name in ("no-weights", "shard"):
            weights.unlink()
    places = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "shard" / "model.safetensors.index.json").write_text(json.dumps(places), encoding="utf-8")
    for name, (source, changes) in CHANGED.items():
        shutil.copytree(folder / source, folder / name)
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        (folder / name / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()


CHANGED: dict[str, tuple[str, dict[str, object]]] = {
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "own-code": ("llama", {"model_type": "own", "auto_map": {"AutoModel": "code.Model"}}),
    "negative": ("dense", {"hidden_size": -4}),
    "layers": ("dense", {"num_hidden_layers": 9}),
    "vocabulary": ("dense", {"vocab_size": 10}),
    "no-tokenizer": ("llama", {}),
}
