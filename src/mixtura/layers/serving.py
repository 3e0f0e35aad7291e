"""How a trained Mixture of Tokens is served: its mode, the averages that stand for neighbours, and training for it.

Shapes: S mixtures, D hidden.
"""

from typing import Literal

from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.neighbours import Observation, Population
from mixtura.layers.routing import Router


class ServedTokenByToken(FeedForward):
    """The state of a layer that is trained in groups and may be served without them; families inherit it."""

    gate: Router
    group_size: int
    population: Population | None
    observing: bool
    """Whether passes in groups leave what they saw in `observed`, the latest in place of any before."""
    observed: Observation | None

    def start_serving(
        self,
        num_mixtures: int,
        hidden_size: int,
        mode: Literal["group", "alone", "population"],
        top_k: int | None,
        zero_fill: float,
        population: bool,
    ) -> None:
        """Called once, by the constructor; the arguments are those of `MixtureOfTokens`."""
        self._num_mixtures = num_mixtures
        self.population = None
        if population:
            self.population = Population(num_mixtures, hidden_size, group_size=self.group_size)
        self.observing, self.observed = False, None
        self.set_inference_mode(mode, top_k=top_k)
        self.set_zero_fill(zero_fill)

    def keep_population(self) -> Population:
        """The averages that the layer keeps, from now on if it kept none, then at first those of zeros."""
        if self.population is None:
            population = Population(*self.gate.weight.shape, group_size=self.group_size)
            self.population = population.to(self.gate.weight)
        return self.population

    def set_inference_mode(self, mode: Literal["group", "alone", "population"], *, top_k: int | None = None) -> None:
        """Sets how eval() runs; `top_k` limits the mixtures that run for a token without a group."""
        if mode not in ("group", "alone", "population"):
            raise ValueError(f"inference_mode is {mode!r}: it must be group, alone or population.")
        if mode == "population" and self.population is None:
            raise ValueError(
                "inference_mode is 'population' but the layer keeps no population's averages: calibrate it."
            )
        if top_k is not None and not 1 <= top_k <= self._num_mixtures:
            raise ValueError(
                f"alone_top_k is {top_k}: it must lie between 1 and {self._num_mixtures}, "
                "the number of mixtures, or be None for all."
            )
        self.inference_mode, self.alone_top_k = mode, top_k

    def set_zero_fill(self, share: float) -> None:
        """Sets the share of the groups that training leaves otherwise empty."""
        if not 0 <= share <= 1:
            raise ValueError(f"zero_fill is {share}: it is a share of the groups and must lie between 0 and 1.")
        self.zero_fill = share
