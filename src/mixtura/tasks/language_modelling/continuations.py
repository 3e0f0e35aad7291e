"""A short sample of what a trained model writes: the beginnings of held-out texts, continued greedily.

Nothing is drawn at random, so a run's numbers and its random state are the same with and without a sample.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mixtura.config.families import never_served
from mixtura.data.packing import PackedTokens
from mixtura.models.inference import grouped_layers, running_in
from mixtura.results.run import Continuation

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 2, 16, 40


@torch.no_grad()
def continue_held_out(model: Any, held_out: PackedTokens, tokenizer: PreTrainedTokenizerBase) -> list[Continuation]:
    """The continuations of a few held-out sequences, as deployed, one at a time; the model is left as it was found.

    Args:
        model: a causal language model with `generate`.
        held_out: sequences of token ids; the beginning of each is the prompt.
        tokenizer: the one that made them.

    Returns:
        Empty where the model cannot generate, since a token's output depends on tokens to come.
    """
    if never_served(getattr(model.config, "mlp_layer_types", None) or []):
        return []
    length = held_out.sequence_length
    prompt_tokens = min(PROMPT_TOKENS, length // 2)
    # The first sequences are often of one text; these come from different ones.
    places = dict.fromkeys(held_out.num_sequences * part // TEXTS for part in range(TEXTS))
    was_training = model.training
    model.eval()
    try:
        with running_in(grouped_layers(model), "alone"):  # one text has no group
            rows = [held_out.sequences_NL[place].astype("int64") for place in places]
            return [_continue(model, row_L, prompt_tokens, tokenizer) for row_L in rows]
    finally:
        model.train(was_training)


def _continue(model: Any, row_L: Any, prompt_tokens: int, tokenizer: Any) -> Continuation:
    prompt_L, next_L = row_L[:prompt_tokens], row_L[prompt_tokens : prompt_tokens + NEW_TOKENS]
    ids_BL = torch.from_numpy(prompt_L)[None].to(model.device)
    room = getattr(model.config, "max_position_embeddings", prompt_tokens + NEW_TOKENS) - prompt_tokens
    output_BL = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=False,
        max_new_tokens=max(1, min(NEW_TOKENS, room)),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    parts = (prompt_L, next_L, output_BL[0, prompt_tokens:].tolist())
    prompt, reference, output = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return Continuation(prompt=prompt, reference=reference, output=output)
