"""Sentence pairs as an encoder-decoder takes them: the encoder reads the source, the decoder writes the translation.

What stands in `batches`, `prompts`, `task` and `decoding` for decoders has its counterpart here. A pair's "prompt" is
what the encoder reads. The decoder begins with a prefix: the start token, and in NLLB and M2M100 also the token of the
target language, which `generate` calls the forced first token. The prefix is given, so the loss does not count it, and
it belongs to the example, so a batch may hold several target languages.

Shapes: B batch, S source length, L length of the decoder's input, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from transformers import M2M100Config, PreTrainedTokenizerBase

from mixtura.config import ModelConfig, UserError
from mixtura.config.languages import language_name
from mixtura.data.parallel import SentencePair
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.models.generation import check_logits
from mixtura.models.losses import run_and_sum
from mixtura.results import Facts
from mixtura.tasks.translation.decoding import ExampleRouting, batches_by_length, decode, token_limit
from mixtura.tasks.translation.prompts import LanguageTokens, Prompts, Scheme, read_translations, scheme_of
from mixtura.training.interface import Batch


@final
@dataclass(frozen=True)
class EncoderDecoderPrompts:
    """Sentences to token ids and back, for one base model."""

    tokenizer: Any
    scheme: Scheme
    decoder_start: int
    """The token that the decoder begins with."""
    kind: Literal["encoder_decoder"] = "encoder_decoder"

    @cached_property
    def languages(self) -> LanguageTokens:
        """The languages that the tokenizer knows."""
        return LanguageTokens(self.tokenizer, self.scheme)

    @property
    def eos(self) -> int:
        """The token that ends a sentence."""
        return self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        """The padding token, by which some models count positions; eos in a tokenizer of the user's without one."""
        pad = self.tokenizer.pad_token_id
        return self.eos if pad is None else pad

    def encode(self, pairs: Sequence[SentencePair]) -> list[list[int]]:
        """The ids that the encoder reads, of source and languages alone."""
        if self.scheme == "tokens":
            return Prompts("tokens", self.tokenizer).encode(pairs)
        sources = self._ids([" ".join(pair.source.split()) for pair in pairs])
        around = {
            side: self._around(*side) for side in {(pair.source_language, pair.target_language) for pair in pairs}
        }
        rows = []
        for ids, pair in zip(sources, pairs, strict=True):
            before, after = around[pair.source_language, pair.target_language]
            rows.append([*before, *ids, *after])
        return rows

    def encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        """The ids of every translation, with eos and without what the decoder begins with."""
        return [[*ids, self.eos] for ids in self._ids([" ".join(target.split()) for target in targets], as_target=True)]

    def prefix(self, target_language: str) -> list[int]:
        """What the decoder begins with: its start token, and the target language where that is a token of its own."""
        if self.scheme not in ("nllb", "m2m100"):
            return [self.decoder_start]
        return [self.decoder_start, self.languages.ids[self.languages.own_code(target_language)]]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of generated ids, up to eos."""
        return read_translations(self.tokenizer, ids, eos=self.eos)

    def settings(self) -> Facts:
        """What `translate` needs to make them again."""
        return {"scheme": self.scheme, "decoder_start": self.decoder_start}

    def _around(self, source_language: str, target_language: str) -> tuple[list[int], list[int]]:
        """The ids before and after a source's own."""
        if self.scheme in ("nllb", "m2m100"):
            self.tokenizer.set_src_lang_special_tokens(self.languages.own_code(source_language))
            return self.tokenizer.prefix_tokens, self.tokenizer.suffix_tokens
        if self.scheme == "words":
            names = map(language_name, (source_language, target_language))
            return self._ids(["translate {} to {}:".format(*names)])[0], [self.eos]
        if not self.languages.ids:
            return [], [self.eos]
        # As text, because some tokenizers put a mark of their own before it.
        token = self.languages.token(target_language)
        return self.tokenizer(token, add_special_tokens=False)["input_ids"], [self.eos]

    def _ids(self, texts: list[str], *, as_target: bool = False) -> list[list[int]]:
        """Ids without special tokens; a text that spells one stays plain text."""
        if not texts:
            return []
        # M2M100 looks its target language up in any case, also where its token is not asked for.
        if as_target and hasattr(self.tokenizer, "tgt_lang") and self.tokenizer.tgt_lang is None:
            self.tokenizer.tgt_lang = next(iter(self.languages.ids))
        named: dict[str, Any] = {"text_target" if as_target else "text": texts}
        encoded: Any = self.tokenizer(
            **named, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]


AnyPrompts = Prompts | EncoderDecoderPrompts


def own_encoder_decoder(prompts: Prompts) -> EncoderDecoderPrompts:
    """How an encoder-decoder from scratch takes the pairs that were encoded for a decoder from scratch.

    Its encoder reads the decoder's prompt, so all arms have the same tokens; its decoder begins with eos.
    """
    return EncoderDecoderPrompts(prompts.tokenizer, "tokens", prompts.eos)


def new_encoder_decoder(model: ModelConfig, prompts: EncoderDecoderPrompts, *, vocab_size: int) -> M2M100Config:
    """The configuration of an encoder-decoder from scratch that costs what the dense decoder costs.

    The layers are those of M2M100 and NLLB (Vaswani et al. 2017, arXiv 1706.03762, with norms before each part),
    without dropout. Encoder and decoder are each as deep as the decoder, so that a token of either side passes as many
    layers. Attention to the source costs two products of D x D for a token of each side. The feed-forward layers have
    no gate, and are narrower by as much.
    """
    hidden = model.hidden_size
    columns = model.intermediate_size * (1.5 if model.gated else 1.0) - hidden
    return M2M100Config(
        vocab_size=vocab_size,
        d_model=hidden,
        encoder_layers=model.num_hidden_layers,
        decoder_layers=model.num_hidden_layers,
        encoder_attention_heads=model.num_attention_heads,
        decoder_attention_heads=model.num_attention_heads,
        encoder_ffn_dim=max(8, 8 * round(columns / 8)),
        decoder_ffn_dim=max(8, 8 * round(columns / 8)),
        activation_function=model.activation,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        # Embeddings, which are multiplied by the root of the width, are then as large as positions.
        init_std=hidden**-0.5,
        pad_token_id=prompts.pad,
        bos_token_id=prompts.eos,
        eos_token_id=prompts.eos,
        decoder_start_token_id=prompts.decoder_start,
    )


def prompts_for(tokenizer: PreTrainedTokenizerBase, config: Any) -> EncoderDecoderPrompts:
    """The prompts of a base model.

    Raises:
        UserError: how it is told languages is not known, or it lacks a token that it cannot do without.
    """
    for name, token in (("end-of-sentence", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if not isinstance(token, int):
            raise UserError(f"The base model's tokenizer has no {name} token: choose another base.")
    start: Any = getattr(config, "decoder_start_token_id", None)
    padding: Any = tokenizer.pad_token_id
    # T5 leaves it out of older configurations, and begins with padding.
    return EncoderDecoderPrompts(
        tokenizer, scheme_of(tokenizer, config.model_type), padding if start is None else start
    )


def collate_pairs(items: list[Batch], prompts: EncoderDecoderPrompts, directions: Sequence[str]) -> dict[str, Tensor]:
    """One batch, padded on the right.

    `input_ids` and `attention_mask` (B, S), `decoder_input_ids`, `decoder_attention_mask` and `labels` (B, L), and
    `directions` (B,). Labels are -100 on padding, and where the next token is one of the prefix.
    """
    sources = [item["tokens"][: item["prompt"]] for item in items]
    targets = [item["tokens"][item["prompt"] :] for item in items]
    begins = [torch.tensor(prompts.prefix(name.split("-")[1])) for name in directions]
    prefixes = [begins[int(item["direction"])] for item in items]
    written = [torch.cat([before, target[:-1]]) for before, target in zip(prefixes, targets, strict=True)]
    labels = [
        torch.cat([torch.full((len(before) - 1,), -100), target])
        for before, target in zip(prefixes, targets, strict=True)
    ]
    input_ids, attention_mask = _padded(sources, prompts.pad)
    decoder_input_ids, decoder_attention_mask = _padded(written, prompts.pad)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": decoder_attention_mask,
        "labels": _padded(labels, -100)[0],
        "directions": torch.tensor([item["direction"] for item in items]),
    }


def _padded(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Rows (B, longest) filled up on the right, and a mask of what they had."""
    filled = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return filled, (torch.arange(filled.size(1)) < lengths.unsqueeze(1)).long()


def forward_pairs(model: Any, batch: Batch, named: Batch) -> tuple[Any, Tensor]:
    """The model's output, and the summed cross-entropy of the translations; `named` are further arguments."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "directions")}
    return run_and_sum(model, lambda: model(**inputs, use_cache=False, **named), batch["labels"])


def probe_pairs(model: nn.Module, routing: ExampleRouting, *, batch: int) -> LeakReport:
    """Whether the decoder sees its own future, or either side other examples; all are in the first direction.

    A translation may depend on every token of its own source, so a later token of the source is no future.
    """
    shape = {"batch": batch, "length": 8, "num_probes": 12}
    written, read = (
        probe_causal_lm(side, vocab_size=side.vocab_size, **shape)
        for side in (_OneSide(model, routing, "decoder_input_ids"), _OneSide(model, routing, "input_ids"))
    )
    return written._replace(
        batch=written.batch or read.batch,
        largest_batch_change=max(written.largest_batch_change, read.largest_batch_change),
    )


@final
class _OneSide(nn.Module):
    """A model as a leak probe calls it, with token ids alone: those of one side, while the other stays as it is."""

    def __init__(self, model: Any, routing: ExampleRouting, side: str) -> None:
        super().__init__()
        self.model, self.routing, self.side = model, routing, side
        self.vocab_size = model.get_input_embeddings().num_embeddings

    def forward(self, ids_BL: Tensor) -> Any:
        fixed_BL = torch.arange(ids_BL.numel(), device=ids_BL.device).view(ids_BL.shape) % self.vocab_size
        named = self.routing.name_experts(self.model, ids_BL.new_zeros(len(ids_BL)))
        inputs = {"input_ids": fixed_BL, "decoder_input_ids": fixed_BL, self.side: ids_BL}
        return self.model(**inputs, use_cache=False, **named)


def decode_prompts(
    model: Any,
    sources: Sequence[Sequence[int]],
    *,
    prompts: AnyPrompts,
    directions: Sequence[int],
    names: Sequence[str],
    routing: ExampleRouting,
    max_length: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """New tokens of every prompt, up to eos and without it, by whichever kind of model the prompts are for.

    See `decode_pairs`.
    """
    common: Batch = {"routing": routing, "max_length": max_length, "num_beams": num_beams, "directions": directions}
    if isinstance(prompts, EncoderDecoderPrompts):
        return decode_pairs(model, sources, prompts=prompts, names=names, **common)
    return decode(model, sources, pad=prompts.pad, eos=prompts.eos, **common)


def decode_pairs(
    model: Any,
    sources: Sequence[Sequence[int]],
    *,
    prompts: EncoderDecoderPrompts,
    directions: Sequence[int],
    names: Sequence[str],
    routing: ExampleRouting,
    max_length: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """New tokens for every source, up to eos and without it, in the order of the sources; see `decoding.decode`.

    Args:
        model: an encoder-decoder in the mode in which it is to decode.
        sources: what the encoder reads.
        prompts: of the model.
        directions: the direction of each source, an index into `names`.
        names: directions, such as "en-de".
        routing: how the model gets the experts of an example.
        max_length: tokens of source and translation together.
        num_beams: 1 is greedy; otherwise beam search with the base model's own settings.
    """
    outputs: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: (len(sources[i]), i))
    limits = [token_limit(len(source), max_length) for source in sources]
    prefixes = [torch.tensor(prompts.prefix(name.split("-")[1])) for name in names]
    for batch in batches_by_length(order, [len(source) for source in sources], num_beams=num_beams):
        ids_BS, mask_BS = _padded([torch.tensor(sources[i]) for i in batch], prompts.pad)
        place_B = torch.tensor([directions[i] for i in batch], device=model.device)
        start_BP = torch.stack([prefixes[directions[i]] for i in batch])
        generated = model.generate(
            input_ids=ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            decoder_input_ids=start_BP.to(model.device),
            logits_processor=[check_logits],
            **_search(prompts, max(limits[i] for i in batch), num_beams),
            **routing.name_experts(model, place_B),
        )
        for i, row in zip(batch, generated[:, start_BP.size(1) :].tolist(), strict=True):
            end = row.index(prompts.eos) if prompts.eos in row else len(row)
            outputs[i] = row[: min(end, limits[i])]
    return outputs


def _search(prompts: EncoderDecoderPrompts, max_new_tokens: int, num_beams: int) -> Batch:
    """What differs from the base model's own way to decode, which for one bans Marian's padding token.

    Arguments of `generate`, and not a `GenerationConfig`, in which None would stand for the base model's value.
    """
    return {
        "max_new_tokens": max_new_tokens,
        "max_length": None,
        "min_length": None,
        "do_sample": False,
        "num_beams": num_beams,
        "num_return_sequences": 1,
        "pad_token_id": prompts.pad,
        "eos_token_id": prompts.eos,
        "decoder_start_token_id": prompts.decoder_start,
        # The first token is in each example's prefix, and a translation that is too long is counted, not closed.
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
