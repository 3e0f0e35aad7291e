"""Continued pretraining: arms that start from checkpoints, each with its own architecture, on one tokenizer."""

import copy
import dataclasses
from typing import Any

from mixtura.checkpoints.decoder import decoder_config
from mixtura.checkpoints.pretrained import resolve_base
from mixtura.config import ArmConfig, DataConfig, Recipe, UserError
from mixtura.config.arms import model_settings
from mixtura.config.checks import batch_sizes, check_feed_forward
from mixtura.config.from_checkpoint import SHAPE_KEYS, TRAINED_KEYS
from mixtura.data.tokenizer import load_tokenizer
from mixtura.models import MixtureConfig


def with_checkpoints_tokenizer(recipe: Recipe) -> DataConfig:
    """The recipe's `[data]`, read with the tokenizer of the baseline's checkpoint, which all arms must share.

    Raises:
        UserError: a checkpoint has no tokenizer, or another one.
    """
    for arm in recipe.arms.values():
        decoder_config(str(arm.init_from))  # says best what is wrong with a checkpoint
    folders = {name: resolve_base(str(arm.init_from)) for name, arm in recipe.arms.items()}
    own = load_tokenizer(folders[recipe.baseline])
    for name, folder in folders.items():
        if name != recipe.baseline and load_tokenizer(folder).get_vocab() != own.get_vocab():
            raise UserError(
                f"'arms.{name}.init_from' has another tokenizer than 'arms.{recipe.baseline}.init_from': losses a "
                "token could not be compared; start both from one model."
            )
    return dataclasses.replace(recipe.data, tokenizer=folders[recipe.baseline])


def continued_arm(recipe: Recipe, name: str, *, vocab_size: int) -> tuple[ArmConfig, MixtureConfig]:
    """An arm with the settings of its checkpoint filled in, and the configuration of its model.

    Args:
        recipe: all of whose arms start from checkpoints.
        name: of the arm.
        vocab_size: of the tokenizer.

    Raises:
        UserError: the checkpoint cannot be used, or does not fit the recipe's batches and sequences.
    """
    arm = recipe.arms[name]
    config: Any = copy.deepcopy(decoder_config(str(arm.init_from)))
    if config.expert_bias_update_rate > 0 and arm.expert_bias_update_rate == 0 and arm.family == "token_choice":
        raise UserError(
            f"'arms.{name}.expert_bias_update_rate' is 0, but the experts of 'arms.{name}.init_from' are chosen with a "
            "bias, which would be lost: leave it out, or make it very small."
        )
    for key in TRAINED_KEYS:
        setattr(config, key, getattr(arm, key))
    config.population = config.population or arm.population_rate > 0
    decided = {each.name: getattr(config, field) for each, field in model_settings() if each.name in SHAPE_KEYS}
    filled = dataclasses.replace(arm, **decided)
    if vocab_size > config.vocab_size:
        raise UserError(
            f"'arms.{name}.init_from' has {config.vocab_size} embeddings for {vocab_size} tokens: give a whole model."
        )
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise UserError(
            f"'data.sequence_length' is {length}, but 'arms.{name}.init_from' has {config.max_position_embeddings} "
            "positions: lower it."
        )
    kept = filled if filled.inference_mode != "population" else dataclasses.replace(filled, population_rate=1.0)
    check_feed_forward(f"arms.{name}", kept, batch_sizes=batch_sizes(recipe), sequence_length=length)
    return filled, config
