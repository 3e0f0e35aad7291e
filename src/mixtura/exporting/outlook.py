"""What a model that is yet to be trained can be exported to, so that nobody learns it after the training."""

from mixtura.checkpoints.source import expected_shapes
from mixtura.config import UserError
from mixtura.exporting.containers import CONTAINERS, check_standalone, missing_traits
from mixtura.exporting.fields import check_deployable, check_stock, traits_of
from mixtura.models import MixtureConfig


def stock_containers(config: MixtureConfig) -> list[str]:
    """The stock architectures that hold a model with this configuration exactly; nothing where none does."""
    try:
        check_stock(config)
    except UserError:
        return []
    traits = traits_of(config, expected_shapes(config))
    return [name for name in CONTAINERS if not missing_traits(name, traits)]


def export_outlook(config: MixtureConfig) -> str:
    """A sentence on where a model with this configuration can go once it is trained, without its subject."""
    try:
        check_deployable(config)
        if found := stock_containers(config):
            return f"can be exported to {found[0]}, which other engines serve"
        check_standalone(config)
    except UserError as error:
        return f"cannot be exported as it is: {error}"
    try:
        check_stock(config)
    except UserError as error:
        why = str(error).partition(": ")[0]
        return f"can be exported with its own code only (--to remote_code): {why[0].lower()}{why[1:]}"
    return "can be exported with its own code only (--to remote_code): no stock architecture has all its traits"
