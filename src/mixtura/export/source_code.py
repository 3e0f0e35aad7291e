"""The Python files that a folder with remote code carries: ours, which stand alone but for one import each."""

import inspect

from mixtura.config import UserError
from mixtura.config.model_settings import written_out
from mixtura.models import MixtureConfig, configuration_mixture, standalone

CONFIG_MODULE, MODEL_MODULE = "configuration_mixture", "modeling_mixtura"


def remote_code() -> dict[str, str]:
    """The files by name; they import torch and transformers alone."""
    table = "from mixtura.config.model_settings import CHOICES, FAMILY_NAMES, ModelSettings"
    ours, theirs = "from mixtura.models.configuration_mixture import", f"from .{CONFIG_MODULE} import"
    return {
        f"{CONFIG_MODULE}.py": _replace_import(inspect.getsource(configuration_mixture), table, written_out()),
        f"{MODEL_MODULE}.py": _replace_import(inspect.getsource(standalone), ours, theirs),
    }


def check_standalone(config: MixtureConfig) -> None:
    """Raises UserError where the standalone file lacks a family of the model."""
    for family in set(config.mlp_layer_types or []) - {"dense", *standalone.MIXTURES}:
        raise UserError(
            f"A model with {family} layers cannot be exported: no architecture of transformers has them, and "
            "mixtura.models.standalone does not either; serve it with Mixtura."
        )


def _replace_import(source: str, ours: str, theirs: str) -> str:
    assert source.count("from mixtura.") == 1 and ours in source, "the file must import nothing else of ours"
    return source.replace(ours, theirs)
