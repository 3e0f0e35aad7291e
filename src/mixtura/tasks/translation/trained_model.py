"""A finished translation run in use: translations, and a diagnosis by language pair on the run's own test sentences.

The model is one trained from scratch, a tuned base model, or an adapter on one.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

from mixtura.adapters.attach import load_adapter
from mixtura.checkpoints.nllb_moe import compute_as_published
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import UserError
from mixtura.config.languages import code_advice, find_language, language_code
from mixtura.config.requests import MOST_PAIR_TOKENS
from mixtura.data.parallel import SentencePair
from mixtura.diagnostics.examine import diagnose_excerpts
from mixtura.diagnostics.excerpts import Excerpts
from mixtura.diagnostics.findings import Diagnosis
from mixtura.files import check_inside
from mixtura.models.loading import folder_settings, load_config, load_model, load_weights, open_tokenizer
from mixtura.results.document import Plain
from mixtura.tasks.translation.decoding import ExampleRouting, token_limit
from mixtura.tasks.translation.encoder_decoder import AnyPrompts, EncoderDecoderPrompts, decode_prompts, prompts_for
from mixtura.tasks.translation.prompts import Prompts
from mixtura.tasks.translation.task import OUTPUTS_FILE, TRANSLATION_FILE, read_outputs
from mixtura.tasks.tuning import inference_modes, running
from mixtura.training.saving import load_weights as saved_weights
from mixtura.upcycling.copied_layers import FIELD, place_mixtures


class Translated(NamedTuple):
    """Lines in another language."""

    lines: list[str]
    """In the order of what was translated, and empty where that was."""
    cut: list[int]
    """Lines, from 1, whose translation ended because it was as long as it may be."""


def translate(model_folder: Path, text: str, *, source_language: str, target_language: str, num_beams: int = 1) -> str:
    """Translates every line of a text by itself; empty lines stay. See `translate_lines`."""
    done = translate_lines(
        model_folder,
        text.splitlines(),
        source_language=source_language,
        target_language=target_language,
        num_beams=num_beams,
    )
    return "\n".join(done.lines)


def translate_lines(
    model_folder: Path,
    lines: Sequence[str],
    *,
    source_language: str,
    target_language: str,
    num_beams: int = 1,
) -> Translated:
    """Translates every line by itself, many at once; empty lines stay.

    Args:
        model_folder: the `checkpoint` of a translation run, or an encoder-decoder that was never tuned here.
        lines: of a sentence or two, as long as those that the model was trained on.
        source_language: code of the text's language, such as "en" or "pt-BR".
        target_language: code of the language to translate into; see `find_language` for what stands for what.
        num_beams: 1 is greedy.

    Raises:
        UserError: the folder is none of a translation run, the model does not know the direction, all lines are empty,
            or some are too long.
    """
    translator = Translator(model_folder, source_language, target_language)
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams}: give 1 for greedy decoding, or more.")
    asked = [i for i, line in enumerate(lines) if line.strip()]
    if not asked:
        raise UserError("The text is empty: give a sentence to translate.")
    encoded = translator.encode([lines[i] for i in asked])
    _check_lengths(asked, encoded, translator.max_length)
    translations, is_cut = translator.translate(encoded, num_beams=num_beams)
    done = [""] * len(lines)
    for i, translation in zip(asked, translations, strict=True):
        done[i] = translation
    return Translated(done, [i + 1 for i, at_limit in zip(asked, is_cut, strict=True) if at_limit])


class Translator:
    """A translation model opened for one direction; its weights are loaded when it first translates."""

    def __init__(self, model_folder: Path, source_language: str, target_language: str) -> None:
        """Reads what the folder says; see `translate_lines` for the arguments.

        Raises:
            UserError: the folder is none of a translation run, or the model does not know the direction.
        """
        settings = _untuned_settings(model_folder, source_language, target_language) or _read_settings(model_folder)
        languages = _languages(settings["directions"], source_language, target_language)
        direction = "-".join(languages)
        if direction not in settings["directions"]:
            raise UserError(
                f"The model does not translate {direction}: choose one of {', '.join(settings['directions'])}, or "
                "train it so."
            )
        self._folder, self._settings, self._languages = model_folder, settings, languages
        self._direction: int = settings["directions"].index(direction)
        self._prompts = _prompts(model_folder, settings)
        self.max_length: int = settings["max_length"]

    @functools.cached_property
    def _model(self) -> Any:
        return _load(self._folder, self._settings)

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Lines as prompts; one that has `max_length` - 1 tokens or more leaves no room for a translation."""
        return self._prompts.encode([SentencePair(line, "", *self._languages) for line in lines])

    def translate(self, encoded: Sequence[Sequence[int]], *, num_beams: int) -> tuple[list[str], list[bool]]:
        """A line for each prompt, and whether it ended only because it was as long as it may be."""
        model, settings = self._model, self._settings
        with running(model, inference_modes(model)[-1]):
            generated = decode_prompts(
                model,
                encoded,
                prompts=self._prompts,
                directions=[self._direction] * len(encoded),
                names=settings["directions"],
                routing=_routing(settings),
                max_length=self.max_length,
                num_beams=num_beams,
            )
        lines = [" ".join(text.splitlines()) for text in self._prompts.decode(generated)]  # a line for a line
        limits = [token_limit(len(ids), self.max_length) for ids in encoded]
        return lines, [len(ids) >= limit for ids, limit in zip(generated, limits, strict=True)]


def _check_lengths(asked: Sequence[int], encoded: Sequence[Sequence[int]], max_length: int) -> None:
    """Refuses lines that leave no room for a translation, all at once."""
    long = [(i + 1, len(ids)) for i, ids in zip(asked, encoded, strict=True) if len(ids) + 1 >= max_length]
    if long:
        number, tokens = long[0]
        others = ", ".join(str(i) for i, _ in long[1:10]) + (", ..." if len(long) > 10 else "")
        too = f" (and so is line {others})" if others else ""
        raise UserError(
            f"Line {number} has {tokens} tokens, but prompt and translation together may have {max_length}{too}: split "
            "it into sentences."
        )


def load_translator(model_folder: Path) -> tuple[Any, AnyPrompts, tuple[str, ...], ExampleRouting]:
    """The model in a translation run's `checkpoint`, ready for inference, its prompts, directions and routing.

    Raises:
        UserError: the folder is none of a translation run, or is damaged.
    """
    settings = _read_settings(model_folder)
    prompts = _prompts(model_folder, settings)
    return _load(model_folder, settings), prompts, tuple(settings["directions"]), _routing(settings)


def _languages(directions: Sequence[str], source_language: str, target_language: str) -> tuple[str, str]:
    """The codes as the model knows them."""
    known = [direction.split("-") for direction in directions]
    found = []
    for side, typed in enumerate((source_language, target_language)):
        code = find_language(typed, [languages[side] for languages in known])
        if code is None:
            raise UserError(f"'{typed}' is no language code: {code_advice(typed)}.")
        found.append(code)
    return found[0], found[1]


def _untuned_settings(folder: Path, source_language: str, target_language: str) -> Plain | None:
    """What a run would have written for a pretrained encoder-decoder and one direction; None for any other folder."""
    config_file = folder / "config.json"
    if (folder / TRANSLATION_FILE).exists() or not config_file.is_file():
        return None
    if not folder_settings(folder).get("is_encoder_decoder"):
        return None
    config = load_config(AutoConfig, folder)
    prompts = prompts_for(open_tokenizer(folder), config)
    codes = [language_code(typed) or typed for typed in (source_language, target_language)]
    prompts.languages.check(["-".join(codes)])
    return {
        "prompt": prompts.kind,
        **prompts.settings(),
        "directions": ["-".join(codes)],
        "max_length": getattr(config, "max_position_embeddings", None) or MOST_PAIR_TOKENS,
        "experts": None,
        "experts_through": "task_ids",
    }


_WRITTEN = {"prompt": str, "directions": list, "max_length": int, "experts": list | None, "experts_through": str}


def _read_settings(folder: Path) -> Plain:
    check_inside(folder)
    try:
        settings = json.loads((folder / TRANSLATION_FILE).read_text(encoding="utf-8"))
        if all(isinstance(settings[key], kind) for key, kind in _WRITTEN.items()):
            return settings
        problem = None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = error
    raise UserError(
        f"'{folder}' is no translation model (it has no readable {TRANSLATION_FILE}): give the checkpoint folder of a "
        "translation run."
    ) from problem


def _prompts(folder: Path, settings: Plain) -> AnyPrompts:
    tokenizer = open_tokenizer(folder)
    if settings["prompt"] == "encoder_decoder":
        return EncoderDecoderPrompts(tokenizer, settings["scheme"], settings["decoder_start"])
    return Prompts(settings["prompt"], tokenizer)


def _routing(settings: Plain) -> ExampleRouting:
    return ExampleRouting(settings["experts"] and tuple(settings["experts"]), settings["experts_through"])


def _load(folder: Path, settings: Plain) -> Any:
    if not (folder / "adapter_config.json").is_file():
        if settings["prompt"] != "encoder_decoder":
            return load_model(folder)[0]
        return _load_encoder_decoder(folder)
    name = settings["base"]["name"]
    try:
        base, _ = load_base(name, num_layers=settings["base"]["num_layers"])
    except UserError as error:
        raise UserError(
            f"The model '{name}' that the adapter in '{folder}' was trained on cannot be loaded: put it back, or train "
            "again."
        ) from error
    return load_adapter(base, folder).eval()


def _load_encoder_decoder(folder: Path) -> Any:
    config = load_config(AutoConfig, folder)
    if not hasattr(config, FIELD):
        model = load_weights(AutoModelForSeq2SeqLM, folder)
        compute_as_published(model)
        return model.eval()
    model: Any = AutoModelForSeq2SeqLM.from_config(config)
    place_mixtures(model, getattr(config, FIELD))
    saved_weights(model, folder)
    model.generation_config = load_config(GenerationConfig, folder)
    return model.eval()


def diagnose_language_pairs(folder: Path, *, max_tokens: int, command: str) -> Diagnosis | None:
    """The content of diagnosis.json for the `checkpoint` of a translation run; None where it is none.

    Args:
        folder: the model's.
        max_tokens: of each language pair.
        command: the command line, for the record.

    Raises:
        UserError: the model or its run's test sentences cannot be read.
    """
    if not (folder / TRANSLATION_FILE).is_file():
        return None
    model, prompts, directions, routing = load_translator(folder)
    if isinstance(prompts, EncoderDecoderPrompts):
        raise UserError(
            f"'{folder}' is an encoder-decoder, and only decoders are diagnosed: its run's report says how its experts "
            "divide the directions."
        )
    excerpts = _sentences(folder, prompts, directions, max_tokens)
    direction_G = torch.tensor([directions.index(name) for name in excerpts.names])

    by_direction = routing.expert_of_direction is not None

    def before_batch(group_B: Tensor) -> None:
        routing.name_experts(model, direction_G[group_B])

    return diagnose_excerpts(
        model,
        prompts.tokenizer,
        excerpts,
        name=str(folder),
        group_word="language pair",
        command=command,
        before_batch=before_batch if routing.through == "task_ids" and by_direction else None,
    )


def _sentences(model_folder: Path, prompts: Any, directions: Sequence[str], max_tokens: int) -> Excerpts:
    """Prompt and reference of the run's test sentences, by direction: what the model reads when it is trained."""
    path = model_folder.parent / OUTPUTS_FILE
    if not path.is_file():
        raise UserError(
            f"'{model_folder}' is a translation model without its run's {OUTPUTS_FILE} beside it: give texts with "
            "--text NAME=FILE."
        )
    records = read_outputs(path)
    cut = Excerpts([], [], [])
    for direction in directions:
        own = [record for record in records if record.pair == direction]
        if not own:
            continue
        source, target = direction.split("-")
        pairs = [SentencePair(record.source, record.reference, source, target) for record in own]
        ids = prompts.encode(pairs), prompts.encode_targets([pair.target for pair in pairs])
        room = max_tokens
        for prompt, reference in zip(*ids, strict=True):
            if room <= 0:
                break
            cut.ids.append([*prompt, *reference])
            cut.group.append(len(cut.names))
            room -= len(prompt) + len(reference)
        cut.names.append(direction)
    return cut
