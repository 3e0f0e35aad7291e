"""Text from a trained model, one token after the other."""

from pathlib import Path

import torch

from mixtura.config import UserError
from mixtura.config.families import never_served
from mixtura.models.loading import load_model


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
