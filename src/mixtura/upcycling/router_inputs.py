"""What the routers of a mixture will see: the inputs of a dense model's feed-forward layers, one layer in memory.

Shapes: N sequences, L tokens of each, T = N*L, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mixtura.config import DataConfig, UserError
from mixtura.data.packing import pack
from mixtura.data.sources import read_documents
from mixtura.data.tokenizer import load_tokenizer
from mixtura.layers import FeedForward
from mixtura.models.attention import causal_masks
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.modeling_mixture import MixtureDecoderLayer

_SEQUENCE_LENGTH = 128
_BATCH = 8


def read_sequences(texts: Sequence[Path], tokenizer_folder: Path, *, max_tokens: int) -> list[Tensor]:
    """Token ids (N, L) of each text, from its start.

    Raises:
        UserError: a text cannot be read or is shorter than one sequence, or there is no tokenizer.
    """
    tokenizer = load_tokenizer(str(tokenizer_folder))
    sequences = []
    for text in texts:
        documents = read_documents(DataConfig(source="local", path=str(text), max_bytes=max_tokens * 16))
        packed = pack(documents, tokenizer, sequence_length=_SEQUENCE_LENGTH, name=f"text '{text}'")
        rows = packed.sequences_NL[: max(1, max_tokens // len(texts) // _SEQUENCE_LENGTH)]
        sequences.append(torch.from_numpy(rows.astype("int64")))
    return sequences


@torch.no_grad()
def feed_forward_inputs(
    config: MixtureConfig, tensor: Callable[[str], Tensor], ids_NL: Tensor
) -> Iterator[tuple[int, Tensor, FeedForward]]:
    """Depth, inputs (T, D) and the layer itself of every feed-forward layer, in float32, from the first to the last.

    Args:
        config: a dense decoder's.
        tensor: gives a weight by its name; each is asked for once.
        ids_NL: token ids.

    Raises:
        UserError: the text's tokens are none of the model's.
    """
    if int(ids_NL.max()) >= config.vocab_size:
        raise UserError(
            f"The tokenizer gives token {int(ids_NL.max())}, but the model has {config.vocab_size}: they do not belong "
            "together."
        )
    config._attn_implementation = "sdpa"
    states_NLD = tensor("model.embed_tokens.weight")[ids_NL].float()
    position_ids = torch.arange(ids_NL.size(1)).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(config=config)  # pyright: ignore[reportArgumentType]
    positions = {
        "position_ids": position_ids,
        "position_embeddings": rotary(states_NLD, position_ids=position_ids),
    }
    for depth, kind in enumerate(config.attention_kinds()):
        layer = _layer(config, depth, tensor)
        seen: list[Tensor] = []
        layer.mlp.register_forward_pre_hook(partial(_note, seen))
        for start in range(0, len(states_NLD), _BATCH):
            part = states_NLD[start : start + _BATCH]
            masks = causal_masks(config, None, inputs_embeds=part, past_key_values=None, position_ids=position_ids)
            states_NLD[start : start + _BATCH] = layer(part, attention_mask=masks[kind], **positions)
        yield depth, torch.cat(seen), layer.mlp


def _note(seen: list[Tensor], _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0].flatten(0, 1))


def _layer(config: MixtureConfig, depth: int, tensor: Callable[[str], Tensor]) -> MixtureDecoderLayer:
    with torch.device("meta"):
        layer = MixtureDecoderLayer(config, depth)
    names = layer.state_dict().keys()
    weights = {name: tensor(f"model.layers.{depth}.{name}").float() for name in names}
    layer.load_state_dict(weights, assign=True)
    return layer.eval()
