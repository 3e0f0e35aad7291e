"""One side of a comparison: the table of its settings, each declared once, and what follows from the table.

A setting of a new family is a field of `ArmConfig`, and an argument of the family's layer. The recipe's reader, the
checks, the model's configuration, the report and docs/settings.md then know it.
"""

import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mixtura.config.families import MIXTURES, Family
from mixtura.config.setting import Setting, mot_setting, read_settings, scale_setting, setting, token_choice_setting

InferenceMode = Literal["group", "alone", "population"]
Placement = Literal["all", "later_half"]
Control = Literal["uniform_router", "random_routing", "shared_width"]
"""What is taken from an arm to see whether its gain comes from that."""

_ALL: tuple[Family, ...] = typing.get_args(Family)
_TOKEN_CHOICE: tuple[Family, ...] = ("token_choice",)
_THRESHOLD: tuple[Family, ...] = ("expert_threshold",)
_REMOE: tuple[Family, ...] = ("remoe",)
_CHOOSING: tuple[Family, ...] = ("token_choice", "expert_choice", "expert_threshold", "remoe")
_MERGED: tuple[Family, ...] = ("merged_experts",)
_ROUTED: tuple[Family, ...] = (*_CHOOSING, *_MERGED, "mixture_of_tokens")
_GROUPED: tuple[Family, ...] = ("expert_choice", "mixture_of_tokens")
_MIXING: tuple[Family, ...] = ("soft", "mixture_of_tokens")
_MOT: tuple[Family, ...] = ("mixture_of_tokens",)


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One side of the comparison: the family of its feed-forward layers and that family's settings."""

    family: Family
    init_from: str | None = setting(
        None,
        says="Checkpoint to start from: a folder of Mixtura's or a dense model. It decides the architecture; the "
        "family may be left out.",
        families=_ALL,
        role="run",
        field=None,
        shown=False,
    )
    learning_rate: float | None = setting(
        None,
        says='Peak learning rate; "none" takes `training.learning_rate`.',
        families=_ALL,
        role="run",
        field=None,
        bounds="positive",
        shown=False,
    )
    feed_forward_scale: float = scale_setting(
        1.0,
        says="Multiplies the initial scales of all feed-forward weights; `search.scales` tries its values.",
        families=_ALL,
    )
    down_scale: float = scale_setting(1.0, says="Multiplies the initial scales of the down-projections.", families=_ALL)
    dense_scale: float | None = scale_setting(
        None,
        says="Initial standard deviation of dense layers and shared experts, over 1 / sqrt(fan-in); "
        '"none" derives it, or takes `model.initializer_range`.',
        families=_ALL,
    )
    expert_scale: float | None = scale_setting(
        None, says="Initial scale of experts, as `dense_scale`.", families=MIXTURES
    )
    router_scale: float | None = scale_setting(
        None, says="Initial scale of routers, as `dense_scale`.", families=_ROUTED
    )
    control: Control | None = setting(
        None,
        says="Makes the arm a control: with routers of zeros, with routers that are not trained, or with dense layers "
        "as wide as the shared experts.",
        families=_ALL,
        role="shape",
    )
    control_of: str | None = setting(
        None,
        says="The arm that this control belongs to, whose settings it takes over where it names none.",
        families=_ALL,
        role="run",
        field=None,
    )
    placement: Placement = setting(
        "later_half",
        says="Which layers are mixtures; the others are dense.",
        families=MIXTURES,
        role="shape",
        field=None,
        shown=False,
    )
    num_experts: int = setting(
        16,
        says="Experts of a layer.",
        families=MIXTURES,
        role="shape",
        layer=True,
        bounds="positive",
        always_shown=MIXTURES,
    )
    moe_intermediate_size: int | None = setting(
        None,
        says='Width of one expert; "none" makes a token cost the FLOPs of the dense arm.',
        families=MIXTURES,
        role="shape",
        layer="intermediate_size",
        bounds="positive",
        shown=False,
    )
    top_k: int = setting(
        1,
        says="Experts a token is sent to; outside token choice, on average.",
        families=_CHOOSING,
        role="function",
        field="num_experts_per_tok",
        layer=True,
        bounds="positive",
        always_shown=_CHOOSING,
        of_router=True,
    )
    route_by: Literal["token", "pair", "source", "target"] = setting(
        "token",
        says="What chooses the expert: a router, or the example's language pair, source or target (translation).",
        families=_TOKEN_CHOICE,
        role="shape",
        layer="learned_router",
        to_layer=lambda value: value == "token",
    )
    score_function: Literal["softmax", "sigmoid"] = token_choice_setting(
        "softmax",
        says="How the router's logits become weights.",
        role="function",
        field="scoring_func",
        layer=True,
        always_shown=_TOKEN_CHOICE,
    )
    normalize_top_k: bool = token_choice_setting(
        False,
        says="Makes a token's weights sum to one. With top_k = 1 the router then gets no gradient.",
        role="function",
        field="norm_topk_prob",
        layer=True,
    )
    capacity_factor: float | None = token_choice_setting(
        None,
        says='Most rows of an expert, as a multiple of an even share; "none" drops none.',
        role="function",
        layer=True,
        bounds="positive",
    )
    expert_groups: int = token_choice_setting(
        1,
        says="Equal groups of experts; a token chooses from its best groups only.",
        role="function",
        field="n_group",
        layer=True,
        bounds="positive",
    )
    groups_per_token: int = token_choice_setting(
        1,
        says="Groups that a token chooses from.",
        role="function",
        field="topk_group",
        layer=True,
        bounds="positive",
    )
    dense_router_gradient: bool = token_choice_setting(
        False,
        says="Runs all experts in training, so that the router learns from each (DenseMixer).",
        role="training",
        layer=True,
    )
    router_aux_loss_coef: float = token_choice_setting(
        0.01,
        says="Weight of the loss that balances the experts' load.",
        role="training",
        bounds="not negative",
        always_shown=_TOKEN_CHOICE,
    )
    router_z_loss_coef: float = token_choice_setting(
        0.0, says="Weight of the loss that keeps the router's logits small.", role="training", bounds="not negative"
    )
    balance_over: Literal["batch", "global", "sequence"] = token_choice_setting(
        "batch",
        says="Where load is counted: in a micro-batch, a step on all ranks, or each sequence.",
        role="training",
        layer="balance_by_sequence",
        to_layer=lambda value: value == "sequence",
    )
    zero_experts: int = token_choice_setting(
        0,
        says="Experts of no cost that give nothing (MoE++), besides `num_experts`; top_k counts them.",
        role="shape",
        layer=True,
        bounds="not negative",
    )
    copy_experts: int = token_choice_setting(
        0, says="Experts of no cost that give back their input.", role="shape", layer=True, bounds="not negative"
    )
    constant_experts: int = token_choice_setting(
        0,
        says="Experts of almost no cost that mix their input with a learned vector.",
        role="shape",
        layer=True,
        bounds="not negative",
    )
    free_expert_balance: float = token_choice_setting(
        0.75,
        says="How much an expert of no cost counts in the load-balancing loss.",
        role="training",
        layer=True,
        bounds="positive",
    )
    latent_size: int | None = token_choice_setting(
        None,
        says="Width that experts work in, behind one projection to it and one back.",
        role="shape",
        layer=True,
        bounds="positive",
    )
    expert_bias_update_rate: float = token_choice_setting(
        0.0,
        says="Loss-free balancing: how far the selection bias moves after a step.",
        role="training",
        layer="expert_bias",
        to_layer=lambda rate: rate > 0,
        bounds="not negative",
    )
    num_shared_experts: int = setting(
        0,
        says="Experts that every token passes through besides the routed ones.",
        families=MIXTURES,
        role="shape",
        layer=True,
        bounds="not negative",
    )
    threshold_rate: float = setting(
        0.2,
        says="Least weight of a step in the moving averages of the thresholds.",
        families=_THRESHOLD,
        role="training",
        bounds="share",
    )
    threshold_warmup: float = setting(
        0.1,
        says="Share of the steps, from the first, in which experts choose over the batch.",
        families=_THRESHOLD,
        role="training",
        bounds="share",
    )
    l1_coef_start: float = setting(
        1e-8,
        says="Initial weight of the penalty that closes gates.",
        families=_REMOE,
        role="training",
        layer=True,
        bounds="positive",
    )
    l1_coef_growth: float = setting(
        0.2,
        says="How much that penalty's weight grows after a step with more than top_k experts a token.",
        families=_REMOE,
        role="training",
        bounds="positive",
    )
    segment_length: int = setting(
        16,
        says="Tokens that share one merged expert.",
        families=_MERGED,
        role="function",
        layer=True,
        bounds="positive",
    )
    merge_by: Literal["segment", "prefix"] = setting(
        "segment",
        says="Whose mean decides: the segment before (Lory), or all before (SMEAR, made causal).",
        families=_MERGED,
        role="function",
        layer=True,
    )
    group_size: int = setting(
        16,
        says="Tokens in a group: they are mixed (mixture of tokens) or compete (expert choice).",
        families=_GROUPED,
        role="function",
        layer=True,
        bounds="positive",
        always_shown=_GROUPED,
    )
    group_over: Literal["batch", "sequence", "all"] = setting(
        "batch",
        says="What forms a group: a position of several examples, positions of one example (mixture of tokens in "
        "encoders), or the whole batch (expert choice, which then sees the future).",
        families=_GROUPED,
        role="function",
        layer=True,
        always_shown=("expert_choice",),
    )
    mixtures_per_expert: int = setting(
        1,
        says="Mixtures (in soft: slots) of an expert in a group.",
        families=_MIXING,
        role="shape",
        layer={"soft": "num_slots", "mixture_of_tokens": "mixtures_per_expert"},
        bounds="positive",
        always_shown=_MIXING,
    )
    temperature: float = mot_setting(
        1.0,
        says="Divides the router's logits.",
        role="function",
        field="router_temperature",
        layer=True,
        bounds="positive",
        always_shown=_MOT,
    )
    first_temperature: float | None = mot_setting(
        None,
        says="The temperature when training begins; it goes evenly, in its logarithm, to `temperature`.",
        role="training",
        bounds="positive",
    )
    combine: Literal["same", "separate"] = mot_setting(
        "same",
        says="Whether outputs are spread with the mixing weights or with a second router's.",
        role="shape",
        layer=True,
        always_shown=_MOT,
    )
    inference_mode: InferenceMode = mot_setting(
        "alone",
        says="How a deployed layer runs.",
        role="function",
        layer=True,
    )
    alone_top_k: int | None = mot_setting(
        2,
        says='Mixtures that a token runs in modes `alone` and `population`; "none" runs all.',
        role="function",
        layer=True,
        bounds="positive",
        always_shown=_MOT,
    )
    zero_fill: float = mot_setting(
        0.0,
        says="Share of the groups whose tokens run in mode `alone` in training.",
        role="training",
        layer=True,
        bounds="share",
    )
    zero_fill_unit: Literal["group", "layer", "step"] = mot_setting(
        "group",
        says="What `zero_fill` is a share of: a layer's groups at every step, each layer's steps, or the model's "
        "steps. The last two take less time.",
        role="training",
    )
    alone_fraction: float = mot_setting(
        0.0,
        says="Share of the steps, at the end, in which all tokens run in mode `alone`.",
        role="training",
        bounds="share",
    )
    transition_to: Literal["token_choice"] | None = mot_setting(
        None,
        says="What the layers become for the last steps, with their parameters.",
        role="training",
    )
    transition_fraction: float = mot_setting(
        0.0,
        says="Share of the steps after the transition; a token then gets `alone_top_k` experts.",
        role="training",
        bounds="share",
    )
    population_rate: float = mot_setting(
        0.0,
        says="Weight of a step in the moving averages for mode `population`; 0 keeps none.",
        role="training",
        bounds="share",
    )


SETTINGS: dict[str, Setting] = read_settings(ArmConfig, typing.get_type_hints(ArmConfig))
"""The table, by name and in the order of `ArmConfig`."""


def has_setting(family: str, name: str) -> bool:
    """Whether a setting changes the layers of a family."""
    return family in SETTINGS[name].families


def model_settings(family: str | None = None) -> Iterable[tuple[Setting, str]]:
    """The settings that a model's configuration holds, of one family or of all, each with its field."""
    return [
        (each, each.field)
        for each in SETTINGS.values()
        if each.field is not None and (family is None or family in each.families)
    ]
