"""How the layers of an upcycled model start: the rows of their routers, and factors on their experts' weights.

Three steps. The dense model is run layer by layer over some text, to see what every router will read; the rows of a
router are drawn, or set to cluster centres or means of texts, and scaled to a chosen spread of the logits; and the
experts' weights get the factors at which the mixture computes what the dense layer did.

Logits are centred: the mean of all inputs says nothing about which expert to choose, and a router has no bias that
could remove it, so no row keeps a part along that mean.

Token choice: experts of weight w, of which a token runs T copies, give the dense output where their second projection
is multiplied by 1 / (T w). Renormalised gates make that exact for any router.

Mixture of tokens, alone: a token gets the sum of m f(m x) over T copies, m = sigmoid(l - ln(G - 1)). With the first
projections times 1 / m0 and the second times 1 / (T m0), f(m x) m is f((m / m0) x) (m / m0) / T: the dense output where
every chosen m is m0. That is so where the router is undecided, with m0 = 1 / G; with logits of some spread, m0 is the
mean weight of the mixtures that are chosen.

Shapes: N sequences, L tokens of each, T = N*L tokens, D hidden, C copies of the layer (a router row each), K copies
that a token runs.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mixtura.checkpoints.source import DenseSource
from mixtura.config import DataConfig, UserError
from mixtura.data.packing import pack
from mixtura.data.prepare import load_tokenizer
from mixtura.data.sources import read_documents
from mixtura.layers import FeedForward
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.models.decoder_layer import causal_masks
from mixtura.models.modeling_mixture import MixtureDecoderLayer
from mixtura.upcycling.request import UpcycleSettings, chosen_layers


class GatedWeights(NamedTuple):
    """The matrices of one gated feed-forward layer, or of one expert."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def channels(self, index: Tensor) -> "GatedWeights":
        """The layer of some of the intermediate channels; the layers of a partition add up to the whole."""
        return GatedWeights(self.gate_FD[index], self.up_FD[index], self.down_DF[:, index])

    def scaled(self, first: float, second: float) -> "GatedWeights":
        """Gate and up times `first`, down times `second`, each in its own dtype."""
        return GatedWeights(*_multiplied((*self,), (first, first, second)))


def _multiplied(weights: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    return [weight if factor == 1 else weight * factor for weight, factor in zip(weights, factors, strict=True)]


def generator_for(*names: object) -> torch.Generator:
    """Random numbers that depend on names alone, so that nothing depends on the order in which layers are written."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def redraw_channels(weights: GatedWeights, share: float, generator: torch.Generator) -> GatedWeights:
    """Draws a share of the intermediate channels anew, the same channels in all three matrices.

    Drop-Upcycling (arXiv 2502.19261): rows of gate and up and columns of down come from a normal
    distribution with mean and standard deviation of the values they replace, in each matrix its own.
    """
    width = weights.gate_FD.size(0)
    index = torch.randperm(width, generator=generator)[: int(share * width)]
    if not len(index):
        return weights
    drawn = []
    for weight, dim in zip(weights, (0, 0, 1), strict=True):
        old = weight.index_select(dim, index).float()
        new = torch.randn(old.shape, generator=generator) * old.std(correction=0) + old.mean()
        drawn.append(weight.index_copy(dim, index, new.to(weight.dtype)))
    return GatedWeights(*drawn)


def add_noise(weights: GatedWeights, relative_std: float, generator: torch.Generator) -> GatedWeights:
    """Adds normal noise of `relative_std` times each matrix's own standard deviation."""
    if not relative_std:
        return weights
    noisy = []
    for weight in weights:
        exact = weight.float()
        noise = torch.randn(exact.shape, generator=generator) * (relative_std * exact.std(correction=0))
        noisy.append((exact + noise).to(weight.dtype))
    return GatedWeights(*noisy)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in float32, in the dtype of the first; one tensor is returned as it is."""
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return (total / len(tensors)).to(tensors[0].dtype)


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


# If one logit is this far from a token's mean, the other experts get almost no weight, whatever the mean spread is.
_LARGEST_LOGIT = 8.0
_ITERATIONS = 20


@dataclass(frozen=True)
class RouterStart:
    """The rows of one layer's router, and what they do at the start."""

    rows_CD: Tensor
    spread: float | None
    """Standard deviation of a token's logits over the copies, mean over tokens; None where no text was read."""
    load_C: list[float] | None
    """Share of the tokens whose first choice is each copy."""


def uncalibrated_rows(norm_D: Tensor, *, copies: int, spread: float, generator: torch.Generator) -> RouterStart:
    """Random rows (C, D) for inputs that are not known but for the weight of the norm before the router.

    A normed input has components of mean square norm_d^2, so rows with standard deviation s give logits with
    s * |norm|.
    """
    rows_CD = torch.randn(copies, norm_D.numel(), generator=generator)
    return RouterStart(rows_CD * (spread / float(norm_D.float().norm().clamp_min(1e-12))), None, None)


def calibrated_rows(
    x_KTD: Sequence[Tensor], *, kind: str, copies: int, spread: float, generator: torch.Generator
) -> RouterStart:
    """Rows (C, D) from the router's real inputs.

    Args:
        x_KTD: inputs (T, D) of each text; "texts" needs as many as copies, the others take all together.
        kind: "random", "clusters" (k-means on the directions of the centred inputs), or "texts" (their means).
        copies: C.
        spread: standard deviation of a token's logits over the copies, mean over the tokens. Where single logits would
            then lie far out, it becomes smaller.
        generator: for random rows and the first centres.
    """
    x_TD = torch.cat(list(x_KTD)).float()
    if kind == "texts":
        rows_CD = torch.stack([x.float().mean(0) for x in x_KTD])
        rows_CD = rows_CD - rows_CD.mean(0)
    elif kind == "clusters":
        rows_CD = _centres(x_TD, copies, generator)
    else:
        rows_CD = torch.randn(copies, x_TD.size(1), generator=generator)
    mean_D = x_TD.mean(0)
    along_C1 = (rows_CD @ mean_D).unsqueeze(1) / mean_D.square().sum().clamp_min(1e-12)
    rows_CD = rows_CD - along_C1 * mean_D
    rows_CD = rows_CD / rows_CD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return _brought_to(rows_CD, x_TD, spread)


def _centres(x_TD: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    centred_TD = x_TD - x_TD.mean(0)
    directions_TD = centred_TD / centred_TD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    first = _spread_out(directions_TD, copies, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a centre without a nearest token stays where it was, which scipy warns of
        centres, _ = kmeans2(directions_TD.numpy(), first.numpy(), iter=_ITERATIONS, minit="matrix", missing="warn")
    return torch.from_numpy(centres).float()


def _spread_out(x_TD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows to start clusters from: a random one, then always the one that is farthest from those chosen."""
    chosen = [int(torch.randint(len(x_TD), (), generator=generator))]
    distance_T = torch.full((len(x_TD),), torch.inf)
    for _ in range(count - 1):
        distance_T = torch.minimum(distance_T, (x_TD - x_TD[chosen[-1]]).square().sum(1))
        chosen.append(int(distance_T.argmax()))
    return x_TD[chosen]


def _brought_to(rows_CD: Tensor, x_TD: Tensor, spread: float) -> RouterStart:
    logits_TC = x_TD @ rows_CD.T
    centred_TC = logits_TC - logits_TC.mean(1, keepdim=True)
    now = float(centred_TC.std(1, correction=0).mean())
    far = float(centred_TC.abs().flatten().kthvalue(max(1, round(0.999 * centred_TC.numel()))).values)
    factor = min(spread / max(now, 1e-12), _LARGEST_LOGIT / max(far, 1e-12))
    first_T = logits_TC.argmax(1)
    load_C = torch.bincount(first_T, minlength=len(rows_CD)).double() / len(x_TD)
    return RouterStart(rows_CD * factor, now * factor, [round(share, 4) for share in load_C.tolist()])


_DRAWS = 4096


@dataclass(frozen=True)
class LayerStart:
    """One mixture layer before any training."""

    router: RouterStart
    """A row for each copy of the dense layer."""
    first_factor: float
    """What the experts' gate and up projections are multiplied by."""
    second_factor: float
    """What the down projections are multiplied by."""


def layer_starts(
    settings: UpcycleSettings, sources: Sequence[DenseSource], texts: Sequence[Path], *, max_tokens: int
) -> dict[int, LayerStart]:
    """The start of every chosen layer, by depth; with texts the dense model is run on them, a layer at a time.

    Raises:
        UserError: a layer does not exist, or a text cannot be used.
    """
    config = sources[0].config
    chosen = chosen_layers(settings.layers, config.num_hidden_layers)

    def averaged(name: str) -> Tensor:
        return mean_of([source.weights.read(name) for source in sources])

    starts: dict[int, LayerStart] = {}
    if not texts:
        for depth in chosen:
            norm_D = averaged(f"model.layers.{depth}.post_attention_layernorm.weight")
            generator = generator_for(settings.seed, depth, "router")
            router = uncalibrated_rows(
                norm_D, copies=settings.copies, spread=settings.router_spread, generator=generator
            )
            starts[depth] = layer_start(settings, router, None)
        return starts
    sequences = read_sequences(texts, sources[0].folder, max_tokens=max_tokens)
    rows_of_text = [ids_NL.numel() for ids_NL in sequences]
    for depth, x_TD, _ in feed_forward_inputs(config, averaged, torch.cat(sequences)):
        if depth not in chosen:
            continue
        router = calibrated_rows(
            x_TD.split(rows_of_text),
            kind=settings.router,
            copies=settings.copies,
            spread=settings.router_spread,
            generator=generator_for(settings.seed, depth, "router"),
        )
        starts[depth] = layer_start(settings, router, x_TD)
    return starts


def layer_start(settings: UpcycleSettings, router: RouterStart, x_TD: Tensor | None) -> LayerStart:
    """The factors of a layer's experts for rows of its router, and for its inputs (T, D) where a text gave some."""
    if settings.family == "token_choice":
        return LayerStart(router, 1.0, 1 / (settings.active_copies * settings.undecided_weight))
    logits_TC = _drawn_logits(settings) if x_TD is None else x_TD @ router.rows_CD.T
    chosen_TK = logits_TC.topk(settings.active_copies, dim=-1).values
    weight = float(torch.sigmoid(chosen_TK - math.log(settings.tokens_of_group - 1)).mean())
    return LayerStart(router, 1 / weight, 1 / (settings.active_copies * weight))


def _drawn_logits(settings: UpcycleSettings) -> Tensor:
    """Logits (T, C) as random rows give them, where no text says what they are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_DRAWS, settings.copies, generator=generator) * settings.router_spread
