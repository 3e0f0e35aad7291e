"""The Python files that a folder with remote code carries: ours, which stand alone but for one import."""

import inspect

from mixtura.models import configuration_mixture, standalone

CONFIG_MODULE, MODEL_MODULE = "configuration_mixture", "modeling_mixtura"


def remote_code() -> dict[str, str]:
    """The files by name; they import torch and transformers alone."""
    ours, theirs = "from mixtura.models.configuration_mixture import", f"from .{CONFIG_MODULE} import"
    model = inspect.getsource(standalone)
    assert model.count("from mixtura.") == 1 and ours in model, "the model's file must import nothing else of ours"
    return {
        f"{CONFIG_MODULE}.py": inspect.getsource(configuration_mixture),
        f"{MODEL_MODULE}.py": model.replace(ours, theirs),
    }
