"""How numbers and names are written."""

import pytest

from mixtura.report import wording

SPACE = wording.NBSP


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.number(-0.0512), "\N{MINUS SIGN}0.051"),
        (wording.number(-0.0001), "0.000"),
        (wording.number(None), "\N{EN DASH}"),
        (wording.signed(0.05), "+0.050"),
        (wording.signed(-0.05), "\N{MINUS SIGN}0.050"),
        (wording.signed(0.00004), "0.000"),
        (wording.quantity(1_024_000), f"1.02{SPACE}million"),
        (wording.quantity(2_048), "2,048"),
        (wording.quantity(327_680_000), f"328{SPACE}million"),
        (wording.compact(918_528), f"919{SPACE}k"),
        (wording.compact(999_900), f"1.00{SPACE}M"),
        (wording.compact(5_505_024, "FLOP"), f"5.51{SPACE}MFLOP"),
        (wording.memory(612 * 2**20), f"612{SPACE}MiB"),
        (wording.duration(80.06), f"80.1{SPACE}s"),
        (wording.duration(2412), f"40.2{SPACE}min"),
        (wording.percent(0.031), f"3.1{SPACE}%"),
        (wording.times(1.306), "1.31\N{MULTIPLICATION SIGN}"),
        (wording.rate(0.0015), "0.0015"),
        (wording.count(1, "seed"), f"1{SPACE}seed"),
        (wording.listing(["a", "b", "c"]), "a, b and c"),
        (wording.listing(["a", "b"], "or"), "a or b"),
        (wording.listing([]), ""),
        (wording.capital("token-choice MoE wins"), "Token-choice MoE wins"),
        (wording.capital("moe_k2 wins"), "moe_k2 wins"),
    ],
)
def test_value_is_written_as(text: str, expected: str) -> None:
    assert text == expected


def test_small_differences_keep_a_digit() -> None:
    assert wording.digits_for(0.05, -0.0002) == 4
    assert wording.digits_for(0.05, 0.0, None) == 3
