"""The benchmark's contenders are what they are said to be, and its record and plot are written."""

import json

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mixtura import cli
from mixtura.benchmarks import speed_table as layers
from mixtura.benchmarks.contenders import PlainMixtureOfTokens, Size, limit, own_layers, peers
from mixtura.benchmarks.speed_table import PARTS, PartClock, model_of, training_step, training_step_by_part
from mixtura.planning import flops_ratio

TINY = Size(tokens=64, hidden=24, experts=4, top_k=2)


@pytest.mark.parametrize("size", [TINY, Size(tokens=64, hidden=32, experts=4, top_k=2, gated=False)], ids=str)
def test_batched_families_and_the_limit_cost_what_the_dense_layer_costs(size):
    x_BLD = size.inputs()
    counted = {}
    for name in ("dense", "mixture of tokens", "soft"):
        with FlopCounterMode(display=False) as counter:
            own_layers(size)[name](x_BLD)
        counted[name] = counter.get_total_flops()
    assert counted["dense"] == size.flops(backward=False)
    assert counted["mixture of tokens"] == pytest.approx(counted["dense"], rel=0.1)
    with FlopCounterMode(display=False) as counter:
        limit(size, backward=True)()
    assert counter.get_total_flops() == pytest.approx(size.flops(backward=True), rel=0.01)


def test_the_plain_mixture_of_tokens_computes_what_ours_does():
    own = own_layers(TINY)["mixture of tokens"]
    plain = PlainMixtureOfTokens(TINY)
    with torch.no_grad():
        plain.router.copy_(own.gate.weight.T)
        up_EHD, down_EDF = own.experts.weights
        plain.up.copy_(up_EHD.transpose(1, 2))
        plain.down.copy_(down_EDF.transpose(1, 2))
        x_BLD = TINY.inputs()
        assert_close(plain(x_BLD), own(x_BLD), rtol=1e-4, atol=1e-6)


def test_transformers_implementations_compute_the_same():
    found, _ = peers(TINY)
    blocks = {name: layer for name, layer in found.items() if "Mixtral" in name}
    assert len(blocks) == 3
    first, *others = blocks.values()
    x_BLD = TINY.inputs()
    with torch.no_grad():
        expected_BLD = first(x_BLD)
        for other in others:
            other.load_state_dict(first.state_dict())
            assert_close(other(x_BLD), expected_BLD, rtol=1e-4, atol=1e-6)


def test_weights_that_would_fill_the_memory_are_not_copied():
    found, left_out = peers(Size(tokens=8192, hidden=256, experts=8, top_k=2))
    assert "transformers Mixtral, batched_mm" not in found
    assert "GiB" in left_out["transformers Mixtral, batched_mm"]


def test_skew_sends_most_tokens_to_few_experts():
    even, skewed = TINY, Size(tokens=64, hidden=24, experts=4, top_k=2, skew=4.0)
    busiest = []
    for size in (even, skewed):
        torch.manual_seed(0)
        _, stats = own_layers(size)["token choice"](size.inputs(), return_stats=True)
        busiest.append(stats.tokens_per_expert_E.max().item())
    assert busiest[1] > 1.3 * busiest[0]


def test_the_verb_prints_stores_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(layers.SETS, "quick", (TINY,))
    arguments = ["bench", "--sizes", "quick", "--only", "mixture of tokens", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["mixtura", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "mixture of tokens" in capsys.readouterr().out
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert {"created", "environment", "settings", "sizes"} <= set(record)
    rows = record["sizes"][0]["rows"]
    assert {row["contender"] for row in rows} >= {"dense", "mixture of tokens", layers.LIMIT}
    assert all(row["milliseconds"] > 0 and row["utilisation"] > 0 for row in rows)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("option", [["--sizes", "huge"], ["--pass", "sideways"]], ids=["sizes", "pass"])
def test_a_word_that_is_not_known_is_refused_by_name(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["mixtura", "bench", *option])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and option[1] in capsys.readouterr().err


SIZE = Size(tokens=64, hidden=32, experts=4, top_k=2)
FAMILIES = ("dense", "token_choice", "mixture_of_tokens")


def model(family):
    torch.manual_seed(0)
    return model_of(family, SIZE, layers=2, heads=2, vocab_size=64)


def ids():
    return torch.randint(64, (SIZE.batch, SIZE.length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_cost_what_the_dense_one_costs(family):
    ratio = flops_ratio(model(family).config, baseline=model("dense").config, sequence_length=SIZE.length)
    assert ratio == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_timing_the_parts_changes_no_number(family):
    plain, timed = model(family), model(family)
    step, step_by_part = (
        training_step(plain, ids(), max_grad_norm=1.0),
        training_step_by_part(timed, ids(), max_grad_norm=1.0),
    )
    for _ in range(3):
        step()
        step_by_part()
    for ours, theirs in zip(timed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_entered_forward_and_backward(family, monkeypatch):
    entered = []
    enter = PartClock.enter
    monkeypatch.setattr(PartClock, "enter", lambda self, part: entered.append(part) or enter(self, part))
    seconds = training_step_by_part(model(family), ids(), max_grad_norm=1.0)()
    layer = ["attention", "rest", "feed-forward", "rest"]
    head = ["head and loss", "rest"]
    backward = ["feed-forward", "rest", "attention", "rest"]
    assert entered == ["rest", *2 * layer, *head, *2 * backward, "clipping", "optimizer", "rest"]
    assert set(seconds) == set(PARTS)


def test_time_is_charged_to_the_part_that_runs(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("time.process_time", lambda: next(times))
    clock = PartClock()
    clock.start()
    clock.enter("attention")
    clock.enter("optimizer")
    assert clock.stop() == dict.fromkeys(PARTS, 0.0) | {"rest": 2.0, "attention": 3.0, "optimizer": 4.0}
