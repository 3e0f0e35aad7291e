"""Mixtura trains dense, mixture-of-experts and mixture-of-tokens language models side by side and compares them fairly.

Every verb that trains, measures or converts is a function of the same name here. Each is imported when it is first
asked for, so that `import mixtura` is quick and the layers need torch alone. `import mixtura.models` teaches
transformers' Auto classes the model type `mixtura`.
"""

from typing import TYPE_CHECKING, Any

from mixtura.errors import Interrupted as Interrupted
from mixtura.errors import UserError as UserError
from mixtura.errors import need

if TYPE_CHECKING:
    from mixtura.comparison.advising import advise as advise
    from mixtura.comparison.runner import compare as compare
    from mixtura.comparison.verbs import finetune as finetune
    from mixtura.comparison.verbs import train as train
    from mixtura.config import load_recipe as load_recipe
    from mixtura.evaluation import evaluate as evaluate
    from mixtura.exporting.serving import calibrate as calibrate
    from mixtura.exporting.serving import transition as transition
    from mixtura.exporting.stock_folder import export as export
    from mixtura.exporting.verification import verify as verify
    from mixtura.tasks.inspection import diagnose as diagnose
    from mixtura.upcycling.mixture_folder import upcycle as upcycle

__version__ = "0.1.0"

__all__ = [
    "Interrupted",
    "UserError",
    "advise",
    "calibrate",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "finetune",
    "load_recipe",
    "train",
    "transition",
    "upcycle",
    "verify",
]

_MODULES = {
    "advise": "mixtura.comparison.advising",
    "calibrate": "mixtura.exporting.serving",
    "compare": "mixtura.comparison.runner",
    "diagnose": "mixtura.tasks.inspection",
    "evaluate": "mixtura.evaluation",
    "export": "mixtura.exporting.stock_folder",
    "finetune": "mixtura.comparison.verbs",
    "load_recipe": "mixtura.config",
    "train": "mixtura.comparison.verbs",
    "transition": "mixtura.exporting.serving",
    "upcycle": "mixtura.upcycling.mixture_folder",
    "verify": "mixtura.exporting.verification",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for by name: most verbs bring torch, transformers and their data libraries along."""
    if name in _MODULES:
        return getattr(need(_MODULES[name]), name)
    raise AttributeError(f"module 'mixtura' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
