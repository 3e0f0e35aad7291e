"""The arms of a comparison: each one's model configuration and what it costs."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from mixtura.config import ArmConfig, Recipe
from mixtura.data.prepare import PreparedData
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.evaluation import evaluation_modes
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.build import build_model_config
from mixtura.planning import active_parameters, flops_per_token, flops_ratio, model_parameters

_SETTINGS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "token_choice": ("num_experts", "top_k", "score_function", "capacity_factor", "router_aux_loss_coef"),
    "expert_choice": ("num_experts", "top_k", "group_size", "group_over"),
    "soft": ("num_experts", "mixtures_per_expert"),
    "mixture_of_tokens": ("num_experts", "group_size", "mixtures_per_expert", "temperature", "combine", "alone_top_k"),
}


@dataclass(frozen=True)
class Arm:
    """One side of the comparison, ready to be built."""

    name: str
    config: ArmConfig
    model_config: MixtureConfig

    @property
    def deployed_mode(self) -> str | None:
        """The inference mode in which the arm answers one request alone; None if it has none."""
        if self.config.family == "mixture_of_tokens":
            # Running in groups needs other people's text in the batch: no answer to one request.
            return "alone" if self.config.inference_mode == "alone" else None
        return None if self.config.family in ("expert_choice", "soft") else "causal"

    @property
    def training_mode(self) -> str:
        """The inference mode that computes what training computes."""
        return evaluation_modes(self.model_config)[0]

    def learning_rate(self, recipe: Recipe) -> float:
        """The peak rate the recipe gives this arm."""
        return self.config.learning_rate or recipe.training.learning_rate

    def build(self, seed: int) -> MixtureForCausalLM:
        """A freshly initialised model; the same rule and seed for every arm."""
        torch.manual_seed(seed)
        # A copy: a model writes its inference mode into its configuration.
        return MixtureForCausalLM(copy.deepcopy(self.model_config))


def make_arms(recipe: Recipe, data: PreparedData) -> dict[str, Arm]:
    """The recipe's arms, with the vocabulary of the data."""
    tokenizer: Any = data.tokenizer
    return {
        name: Arm(
            name,
            arm,
            build_model_config(
                recipe.model,
                arm,
                vocab_size=data.summary["vocab_size"],
                max_position_embeddings=recipe.data.sequence_length,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
        )
        for name, arm in recipe.arms.items()
    }


def describe_arm(arm: Arm, baseline: Arm, sequence_length: int) -> dict[str, Any]:
    """What an arm is and costs before it runs, as results.json has it."""
    shape: Any = arm.model_config
    settings = {key: getattr(arm.config, key) for key in _SETTINGS[arm.config.family]}
    if arm.config.family != "dense":
        settings |= {"expert_width": shape.moe_intermediate_size, "placement": arm.config.placement}
    return {
        "family": arm.config.family,
        "label": arm.config.family if arm.name == arm.config.family else arm.name,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "parameters_total": model_parameters(shape),
        "parameters_active": active_parameters(shape, sequence_length=sequence_length),
        "flops_per_token": flops_per_token(shape, sequence_length=sequence_length),
        "flops_ratio": flops_ratio(shape, baseline=baseline.model_config, sequence_length=sequence_length),
        "training_mode": arm.training_mode,
        "deployed_mode": arm.deployed_mode,
    }


def probe_arm(arm: Arm) -> dict[str, bool]:
    """Whether information leaks from the future or from other examples, measured on the arm's untrained model."""
    model = arm.build(seed=0).eval()
    deployed = _probe(arm, model) if arm.deployed_mode else None
    if arm.config.family == "mixture_of_tokens":
        model.set_inference_mode("group")
    trained = _probe(arm, model)
    leaks = {"future": trained.future, "batch": trained.batch}
    return leaks if deployed is None else {**leaks, "batch_deployed": deployed.batch}


def _probe(arm: Arm, model: MixtureForCausalLM) -> LeakReport:
    config = arm.model_config
    batch = config.group_size if arm.training_mode == "group" and config.group_over == "batch" else 4
    length = config.group_size if config.group_over == "sequence" else 8
    return probe_causal_lm(model, vocab_size=config.vocab_size, batch=batch, length=length)


def leak_warning(arm: Arm, leaks: dict[str, bool]) -> str | None:
    """What to say aloud before an arm that leaks is trained."""
    if leaks["future"]:
        return (
            f"'{arm.name}' ({arm.config.family}) sees the future of a sequence: its loss as a causal language model "
            "means nothing, and it cannot generate."
        )
    if leaks["batch"] and leaks.get("batch_deployed", True):
        return f"'{arm.name}' ({arm.config.family}) lets examples of a batch see each other, also when deployed."
    if leaks["batch"]:
        return (
            f"'{arm.name}' ({arm.config.family}) lets examples of a batch see each other in training; deployed "
            f"in mode '{arm.deployed_mode}' it does not."
        )
    return None
