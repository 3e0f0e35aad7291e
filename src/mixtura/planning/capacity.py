"""How many rows an expert takes: the one capacity formula of the project.

GShard (Lepikhin et al., 2020, section 2.2) and Switch Transformer (Fedus et al., 2021, section 2.2) for token choice;
Expert Choice (Zhou et al., 2022, section 3.2) uses the same number as the rows an expert picks.
"""

import math
from typing import Any


def capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float = 1.0) -> int:
    """Rows one expert takes: ceil(capacity_factor * tokens * top_k / num_experts), at least 1 and at most `tokens`.

    Rounded up, where several codebases truncate with int(): with factor 1.0 and tokens that the experts do not divide,
    truncation drops tokens even under perfect balance, and with few tokens it leaves experts no row at all. The upper
    bound holds because an expert has a token at most once.

    Args:
        tokens: Tokens routed together.
        top_k: Experts a token has on average.
        num_experts: Experts that share the rows.
        capacity_factor: Rows as a multiple of an even share.
    """
    rows = math.ceil(even_rows(tokens, top_k, num_experts, capacity_factor))
    return max(1, min(rows, tokens))


def even_rows(tokens: Any, top_k: int, num_experts: int, capacity_factor: float) -> Any:
    """As `capacity`, before it is rounded up and bounded: of a number, or of a tensor of float64."""
    even_share = capacity_factor * tokens * top_k / num_experts
    # 1.1 * 10 is 11.000000000000002 in binary: without the guard that would be a capacity of 12.
    return even_share - 1e-9 * even_share
