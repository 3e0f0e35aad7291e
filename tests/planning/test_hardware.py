"""Machines by name and from files."""

import pytest

from mixtura.config import UserError
from mixtura.planning.hardware import read_hardware

OWN = """
devices = 16
devices_per_node = 4
memory_gb = 96
bfloat16_tflops = 500
float32_tflops = 50
memory_gb_per_s = 2500
node_gb_per_s = 200
network_gb_per_s = 12.5
price_per_hour = 1.25
"""


def test_a_name_says_how_many_devices_of_which_kind():
    found = read_hardware("64xH200")
    assert (found.devices, found.memory_gb, found.devices_per_node) == (64, 141, 8)
    assert found.peak("bfloat16") == 989e12 and found.peak("float32") == 67e12
    assert read_hardware("h100").devices == 1


def test_a_group_within_a_node_has_the_quicker_link():
    found = read_hardware("16xH100")
    assert found.link(8) == 450e9 and found.link(9) == 50e9


def test_a_cluster_of_ones_own_is_read_from_a_file(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(OWN, encoding="utf-8")
    found = read_hardware(str(path))
    assert (found.name, found.devices, found.price_per_hour) == ("lab", 16, 1.25)


@pytest.mark.parametrize("spec", ["8xABC", "xH100", "0xH100", "-1xH100", "1.5xH100", ""])
def test_unknown_hardware_is_refused_with_what_is_known(spec):
    with pytest.raises(UserError, match=r"write a number, an x and one of A100, .*such as 64xH200, or the path of"):
        read_hardware(spec)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("devices = ", "is no TOML"),
        ("devices = 2", "lacks memory_gb, bfloat16_tflops"),
        (OWN + "colour = 1", "has 'colour': it may have name, devices"),
        (OWN.replace("= 16", "= 1.5"), "devices = 1.5: it must be a whole number"),
        (OWN.replace("= 96", "= -1"), "memory_gb = -1: it must be a number, greater than zero"),
        (OWN.replace("= 96", "= inf"), r"memory_gb = inf: it must be a number, .*from 1e-06 to 1e\+12"),
        (OWN.replace("= 96", "= 1e300"), r"memory_gb = 1e\+300: it must be a number, .*from 1e-06 to 1e\+12"),
        (OWN.replace("= 96", "= true"), "memory_gb = True: it must be a number"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, told):
    path = tmp_path / "lab.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_hardware(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_hardware(str(tmp_path / "none.toml"))
