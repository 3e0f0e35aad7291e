"""Settings of the families that make no sense, each refused with the value and the fix."""


def check_mixture_of_tokens(
    group_size: int, mixtures_per_expert: int, temperature: float, group_over: str, combine: str
) -> None:
    """Raises ValueError for a setting of Mixture of Tokens that makes no sense."""
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group needs at least 2 tokens.")
    if mixtures_per_expert < 1:
        raise ValueError(f"mixtures_per_expert is {mixtures_per_expert}: it must be at least 1.")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be greater than zero.")
    for name, value, known in (
        ("group_over", group_over, ("batch", "sequence")),
        ("combine", combine, ("same", "separate")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it must be {' or '.join(known)}.")


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ValueError unless a token can have that many experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: it must lie between 1 and num_experts, which is {num_experts}.")


def check_token_choice(
    top_k: int,
    num_experts: int,
    capacity_factor: float | None,
    score_function: str,
    expert_bias: bool,
    learned_router: bool,
) -> None:
    """Raises ValueError for a setting of token choice that makes no sense."""
    check_top_k(top_k, num_experts)
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(f"capacity_factor is {capacity_factor}: it must be greater than zero, or None for dropless.")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function is {score_function!r}: it must be softmax or sigmoid.")
    if not learned_router and (top_k != 1 or capacity_factor is not None or expert_bias):
        raise ValueError(
            f"top_k is {top_k}, capacity_factor {capacity_factor} and expert_bias {expert_bias}: without a router "
            "an example has one expert and no token is dropped, so set them to 1, None and False."
        )


def check_expert_groups(top_k: int, num_experts: int, groups: int, groups_per_token: int, learned_router: bool) -> None:
    """Raises ValueError for groups of experts that make no sense."""
    if groups < 1 or num_experts % groups:
        raise ValueError(f"expert_groups is {groups}: {num_experts} experts must divide into groups of one size.")
    if not 1 <= groups_per_token <= groups:
        raise ValueError(f"groups_per_token is {groups_per_token}: it must lie between 1 and expert_groups, {groups}.")
    if top_k > groups_per_token * num_experts // groups:
        raise ValueError(
            f"top_k is {top_k}, but {groups_per_token} of {groups} groups have "
            f"{groups_per_token * num_experts // groups} experts: lower it, or raise groups_per_token."
        )
    if groups > 1 and not learned_router:
        raise ValueError(f"expert_groups is {groups}: without a router nothing chooses among groups, so set it to 1.")


def check_token_choice_options(
    free: tuple[int, int, int], dense: bool, capacity_factor: float | None, groups: int, learned_router: bool
) -> None:
    """Raises ValueError for options of token choice that do not go together.

    Args:
        free: how many zero, copy and constant experts there are.
        dense: whether the router trains as if all experts ran.
        capacity_factor: None where no token is dropped.
        groups: of experts.
        learned_router: whether there is one.
    """
    for name, count in zip(("zero_experts", "copy_experts", "constant_experts"), free, strict=True):
        if count < 0:
            raise ValueError(f"{name} is {count}: it must be zero or more.")
    if dense and (capacity_factor is not None or not learned_router):
        raise ValueError(
            "dense_router_gradient is True: it needs a router and no capacity_factor, since all experts run on all "
            "tokens; set it to False."
        )
    if sum(free) and (capacity_factor is not None or groups > 1 or dense or not learned_router):
        raise ValueError(
            f"zero_experts, copy_experts and constant_experts are {sum(free)} together: they need a router and neither "
            "capacity_factor, expert_groups nor dense_router_gradient, so leave these out."
        )


def check_expert_choice(top_k: int, num_experts: int, group_over: str) -> None:
    """Raises ValueError for a setting of expert choice that makes no sense."""
    check_top_k(top_k, num_experts)
    if group_over not in ("batch", "all"):
        raise ValueError(f"group_over is {group_over!r}: it must be batch or all.")
