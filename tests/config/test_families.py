"""The table of families: whole, and what README says."""

import pkgutil
import typing
from pathlib import Path

import pytest

from mixtura.config.describe import families_table
from mixtura.config.families import FAMILIES, Family, never_served
from mixtura.layers import FeedForward

ROOT = Path(__file__).parents[2]


def test_every_family_has_an_entry():
    assert tuple(FAMILIES) == typing.get_args(Family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_layer(family):
    assert issubclass(pkgutil.resolve_name(FAMILIES[family].layer), FeedForward)


def test_names_and_colours_tell_families_apart():
    for what in ("words", "colours", "routes"):
        assert len({getattr(facts, what) for facts in FAMILIES.values()}) == len(FAMILIES)


def test_families_that_see_tokens_to_come_are_never_served():
    assert never_served(["soft", "mixture_of_tokens", "expert_choice", "another library's"]) == [
        "expert_choice",
        "soft",
    ]


def test_readme_has_the_table_of_families():
    assert families_table() in (ROOT / "README.md").read_text(encoding="utf-8")
