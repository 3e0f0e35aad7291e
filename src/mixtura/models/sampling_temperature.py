"""Keeps the temperature of routers out of the settings of `generate`.

transformers fills a model's generation settings from its configuration, and takes whatever is called `temperature`
there for that of sampling. A mixture of tokens with routers at 0.25 would so sample at 0.25, and say so in the
`generation_config.json` of its folder, which servers read.
"""

from typing import Any

from transformers import GenerationConfig


def generation_settings(config: Any) -> GenerationConfig:
    """The generation settings that follow from a model's configuration."""
    return _without_routers(GenerationConfig.from_model_config(config), config)


def _without_routers(settings: Any, config: Any) -> Any:
    """The settings without a temperature that is that of the routers; one that a user has set stays."""
    routers = getattr(config, "temperature", None)
    if routers is not None and settings.temperature == routers and getattr(settings, "_from_model_config", False):
        settings.temperature = GenerationConfig().temperature
    return settings


class SamplesAtItsOwnTemperature:
    """A model with `generate`, whose settings are corrected where transformers makes them and where it reads them."""

    generation_config: Any
    config: Any

    def post_init(self) -> None:
        """The base class calls this when the model is built."""
        super().post_init()  # pyright: ignore[reportAttributeAccessIssue]
        _without_routers(self.generation_config, self.config)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """The base class calls this when the model has been loaded; folders of earlier releases say it wrong."""
        super().adjust_generation_fn(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        _without_routers(self.generation_config, self.config)
