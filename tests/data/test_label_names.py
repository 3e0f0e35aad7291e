"""Names of labels: one for what tables write in several ways."""

from decimal import Decimal

from mixtura.data.formats.rows import WrittenNumber
from mixtura.data.label_names import label_name

NAMES = {
    "1.0": "1",
    "1": "1",
    "01": "01",
    "1.50": "1.50",
    Decimal("1.50"): "1.50",
    Decimal("0.00000001"): "0.00000001",
    WrittenNumber("1e5"): "1e5",
    WrittenNumber("-0.0"): "0",
    "-0": "0",
    "-0.0": "0",
    "-01": "-01",
    "1.0.3": "1.0.3",
    "TRUE": "true",
    "cafe\u0301": "caf\u00e9",
    " a \n b ": "a b",
    "None": "None",
    "nan": "nan",
    float("nan"): None,
    float("inf"): "inf",
    None: None,
    "": None,
    " ": None,
    "half \ud800": None,
    ("a",): None,
}


def test_a_label_has_one_name():
    assert {value: label_name(value) for value in NAMES} == NAMES
    # They are one key of a dictionary.
    assert [label_name(value) for value in (1, 1.0, True, False, 0.0, -0.0)] == ["1", "1", "true", "false", "0", "0"]
