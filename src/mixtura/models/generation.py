"""Text from a trained model, one token after the other."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtura.config import UserError
from mixtura.config.families import never_served


def load_model(folder: Path) -> tuple:
    """The causal language model and tokenizer in a folder, ready for inference.

    Raises:
        UserError: the folder is missing, is no model's, or its files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is no model folder (it has no config.json): give one such as .../checkpoint.")
    try:
        # transformers fills what is missing or does not fit with random numbers, so ask what that was.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, found = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, safetensors and json each have their own errors for a broken file
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"The model in '{folder}' cannot be loaded ({reason}): train or export it again.") from error
    for name in sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]):
        raise UserError(
            f"The model in '{folder}' is damaged: {name} is missing or does not fit its config.json; train or export "
            "it again."
        )
    return model.eval(), tokenizer


def generate_text(model_folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation; greedy at temperature 0.

    Raises:
        UserError: the model cannot be loaded or cannot answer one request alone, or the prompt or temperature cannot
            be used.
    """
    model, tokenizer = load_model(model_folder)
    for family in never_served(getattr(model.config, "mlp_layer_types", None) or []):
        raise UserError(
            f"A model with {family} layers cannot generate: a token's output depends on other tokens to come."
        )
    if not prompt:
        raise UserError("The prompt is empty: give some text to go on from.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("The prompt is not UTF-8 text: set the terminal's encoding to UTF-8, or retype it.") from None
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise UserError(
            f"The temperature is {temperature:g}: give 0 for the likeliest token each time, or 0.001 to 1000."
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    return tokenizer.decode(output[0], skip_special_tokens=True)
