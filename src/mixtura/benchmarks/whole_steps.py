"""Whole training steps of small models with one family in every layer.

Shapes: B batch, L length.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mixtura.benchmarks.contenders import Size
from mixtura.config import Family
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.training.optimization import clip_gradients

Part = Literal["attention", "feed-forward", "head and loss", "rest", "clipping", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Of a training step; the rest is embedding, norms, residuals and setting gradients to none."""


def model_of(family: Family, size: Size, *, layers: int, heads: int, vocab_size: int) -> MixtureForCausalLM:
    """A model in training with that family in every layer, at the FLOPs of the dense one."""
    config = MixtureConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.dense_width,
        moe_intermediate_size=size.expert_width(family, top_k=size.top_k),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_layer_types=[family] * layers,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        group_size=size.group_size,
        hidden_act=size.activation,
        gated=size.gated,
    )
    return MixtureForCausalLM(config).train()


def training_step(
    model: MixtureForCausalLM,
    ids_BL: Tensor,
    *,
    max_grad_norm: float | None = None,
    enter: Callable[[Part], object] = lambda part: None,
) -> Callable[[], None]:
    """A function that takes one step: forward, backward, clipping where a norm is given, and fused AdamW.

    It calls `enter` where clipping, the optimizer and the rest begin.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        enter("rest")
        optimizer.zero_grad()
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        if max_grad_norm is not None:
            enter("clipping")
            clip_gradients(model.parameters(), max_grad_norm)
        enter("optimizer")
        optimizer.step()

    return step


def training_step_by_part(
    model: MixtureForCausalLM, ids_BL: Tensor, *, max_grad_norm: float
) -> Callable[[], dict[Part, float]]:
    """As `training_step`, and the step returns the processor seconds of each part, forward and backward together.

    A part begins where its module is entered or the gradient of its output is there, and ends where its module is left
    or the gradient of its input is there; the loss counts to the head. Only for one thread on the CPU.
    """
    clock = PartClock()
    for layer in model.model.layers:
        clock.follow(layer.get_submodule("self_attn"), "attention")
        clock.follow(layer.get_submodule("mlp"), "feed-forward")
    clock.follow(model.lm_head, "head and loss", until_backward=True)
    step = training_step(model, ids_BL, max_grad_norm=max_grad_norm, enter=clock.enter)

    def timed() -> dict[Part, float]:
        clock.start()
        step()
        return clock.stop()

    return timed


class PartClock:
    """Adds processor time to the part of a step that was entered last."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins a step; all parts have zero time."""
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "rest"
        self._since = time.process_time()

    def enter(self, part: Part) -> None:
        """Charges the time since the last call to the part that ran, and goes on with this one."""
        now = time.process_time()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def stop(self) -> dict[Part, float]:
        """Seconds of every part of the step."""
        self.enter("rest")
        return self._seconds

    def follow(self, module: nn.Module, part: Part, *, until_backward: bool = False) -> None:
        """Enters the part with the module, forward and backward, and the rest after it.

        With `until_backward` what comes between the module's forward and backward pass counts to it.
        """

        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["hidden_states"]
            if x.requires_grad:
                x.register_hook(lambda _: self.enter("rest"))
            self.enter(part)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if until_backward:
                return
            out = output[0] if isinstance(output, tuple) else output
            if out.requires_grad:
                out.register_hook(lambda _: self.enter(part))
            self.enter("rest")

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
