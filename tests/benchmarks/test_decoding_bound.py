"""The bound on decoding counts the weights of the models that are timed."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from mixtura.benchmarks.decoding_bound import FORMS, bound, expected_experts, step_bytes

SIZES = {"hidden": 64, "experts": 4, "layers": 2}


def test_a_batch_runs_as_many_different_experts_as_random_choices_do():
    drawn = torch.stack([torch.rand(5, 8).topk(2).indices.unique().bincount(minlength=8).sum() for _ in range(3000)])
    assert expected_experts(8, 2, 5) == pytest.approx(float(drawn.float().mean()), rel=0.01)
    assert expected_experts(8, 2, 1) == pytest.approx(2) and expected_experts(8, None, 1) == 8


def test_a_large_batch_reads_every_weight_of_the_models_that_are_timed():
    script = Path(__file__).parents[2] / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("decode_script", script)
    decode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decode)
    built = decode.models(Namespace(**SIZES))
    for name, form in FORMS.items():
        weights = sum(value.nbytes for value in built[name].parameters() if value.dim() > 1)
        averages = 4 * 2 * 2 * 4 * 64 if form.population else 0  # two layers, two averages of four mixtures
        assert step_bytes(form, batch=1000, **SIZES) == pytest.approx(weights + averages, rel=1e-3), name


def test_one_sequence_is_bound_by_the_router_alone_and_many_by_all_experts():
    top_1 = "token choice, top 1"
    assert 0.99 < bound(top_1, batch=1, **SIZES) < 1 < 1.01 * bound("dense", batch=64, **SIZES)
    assert bound(top_1, batch=64, **SIZES) < 0.6
