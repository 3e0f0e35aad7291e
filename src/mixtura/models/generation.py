"""Text from a trained model, one token after the other."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.config import UserError


def load_model(folder: Path) -> tuple:
    """The causal language model and tokenizer in a folder, ready for inference.

    Raises:
        UserError: the folder is missing, is no model's, or its files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is no model folder (it has no config.json): give one such as .../checkpoint.")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, safetensors and json each have their own errors for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The model in '{folder}' cannot be loaded ({reason}): train or export it again.") from error
    return model.eval(), tokenizer


def generate_text(model_folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation; greedy at temperature 0.

    Raises:
        UserError: the model cannot be loaded, cannot answer one request alone, or the prompt is empty.
    """
    model, tokenizer = load_model(model_folder)
    families = set(getattr(model.config, "mlp_layer_types", None) or [])
    for family in families & {"expert_choice", "soft"}:
        raise UserError(
            f"A model with {family} layers cannot generate: a token's output depends on other tokens to come."
        )
    if not prompt:
        raise UserError("The prompt is empty: give some text to go on from.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    return tokenizer.decode(output[0], skip_special_tokens=True)
