"""Controls: arms that lack one thing of another arm, to see whether its gain comes from that thing."""

from mixtura.config.arm import ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import Recipe, TomlTable
from mixtura.errors import UserError

_ROUTINGS = {"uniform_router": ("mixing",), "random_routing": ("tokens choose", "experts choose", "mixing")}
"""The kinds of routing that a control makes sense for: with a router of zeros, all tokens would choose alike."""


def fill_controls(table: TomlTable) -> None:
    """Writes into a recipe's table what its controls have of the arms they belong to: all that they do not name.

    Raises:
        UserError: the arm does not exist, or is a control itself.
    """
    arms = table.get("arms")
    if not isinstance(arms, dict):
        return  # building the recipe refuses it
    for name, arm in arms.items():
        if not isinstance(arm, dict) or "control_of" not in arm:
            continue
        of = arms.get(arm["control_of"]) if isinstance(arm["control_of"], str) else None
        if not isinstance(of, dict) or "control_of" in of:
            others = ", ".join(
                key for key, other in arms.items() if isinstance(other, dict) and "control_of" not in other
            )
            raise UserError(f"'arms.{name}.control_of' is {arm['control_of']!r}: name one of the arms {others}.")
        if arm.get("control") == "shared_width":
            arm.setdefault("family", "dense")
        if arm.get("control") == "uniform_router":
            # All mixtures have the same weight, so there is no best to choose: deployed, it runs all, as in groups.
            arm.setdefault("alone_top_k", "none")
        for key, value in of.items():
            arm.setdefault(key, value)


def check_controls(recipe: Recipe) -> None:
    """Refuses controls that would not control anything.

    Raises:
        UserError: names the key, the value and the fix.
    """
    for name, arm in recipe.arms.items():
        where = f"arms.{name}"
        if (arm.control is None) != (arm.control_of is None):
            raise UserError(
                f"'{where}.control' is '{arm.control or 'none'}' and '{where}.control_of' is "
                f"'{arm.control_of or 'none'}': say both what is taken away and of which arm, or neither."
            )
        if arm.control == "shared_width":
            _check_shared_width(where, arm, recipe.arms[str(arm.control_of)])
        elif arm.control is not None:
            _check_routing(where, arm)


def refuse_control(where: str, arm: ArmConfig) -> None:
    """Refuses a control in a recipe for fine-tuning.

    Raises:
        UserError: names the key and the fix.
    """
    if arm.control is not None or arm.control_of is not None:
        raise UserError(f"'{where}' has a control, which only recipes for language models have: leave it out.")


def _check_routing(where: str, arm: ArmConfig) -> None:
    known = _ROUTINGS[str(arm.control)]
    if arm.control == "uniform_router" and arm.transition_to is not None:
        raise UserError(
            f"'{where}.transition_to' is '{arm.transition_to}', which a router of zeros cannot become: set "
            f"'{where}.transition_to' to \"none\" and its fraction to 0."
        )
    if facts_of(arm.family).routing not in known or arm.family == "soft" or arm.route_by != "token":
        raise UserError(
            f"'{where}.control' is '{arm.control}', which is no control of {arm.family}: use uniform_router for "
            "mixtures of tokens, random_routing where a router is learnt, shared_width for arms with shared experts."
        )


def _check_shared_width(where: str, arm: ArmConfig, of: ArmConfig) -> None:
    if arm.family != "dense" or of.num_shared_experts == 0:
        raise UserError(
            f"'{where}.control' is 'shared_width', but 'arms.{arm.control_of}' has {of.num_shared_experts} shared "
            f"experts and '{where}' is {arm.family}: give that arm shared experts, and leave the control's family out."
        )
