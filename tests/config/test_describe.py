"""The list of keys: all there are, each with what it is, and defaults that a recipe may write."""

import tomllib

import pytest

from mixtura.config.arm import ArmConfig
from mixtura.config.describe import SECTIONS, keys_of, lines_of, written
from mixtura.config.schema import TrainingConfig


def test_a_key_has_its_type_its_default_and_a_line():
    keys = {key.name: key for key in keys_of(TrainingConfig)}
    assert keys["batch_size"] == ("batch_size", "whole number", "16", "Sequences in one micro-batch.")
    assert keys["optimizer"].values == "adamw, adamw_8bit, adafactor, muon" and keys["optimizer"].default == '"adamw"'
    arm = {key.name: key for key in keys_of(ArmConfig)}
    assert arm["family"].default == "required" and arm["alone_top_k"].values == 'whole number, "none"'
    assert arm["top_k"].says.startswith("Experts a token is sent to")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda each: f"{each.name}-{each.kind}")
def test_every_default_is_toml_and_every_section_can_be_read(section):
    for key in keys_of(section.holds):
        if key.default != "required":
            tomllib.loads(f"value = {key.default}")
    lines = list(lines_of(section, width=120))
    assert all(len(line) <= 200 for line in lines) and len(lines) <= 5 * len(keys_of(section.holds))


@pytest.mark.parametrize("value", [None, True, 3, 2e-3, 'a "b" \\ c', ["x", "y"], [1, 2], ()])
def test_a_value_is_written_as_toml_reads_it(value):
    read = tomllib.loads(f"value = {written(value)}")["value"]
    assert read == ("none" if value is None else list(value) if isinstance(value, tuple) else value)
