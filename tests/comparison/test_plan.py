"""What a run would take: planned without writing, and refused where no machine could hold it."""

import dataclasses
import json

import pytest

from mixtura.comparison import plan as plan_module
from mixtura.comparison.plan import check_memory, in_words, machine_bytes, plan
from mixtura.comparison.runner import compare
from mixtura.config import UserError
from mixtura.training import SilentProgress, saving


def test_a_plan_writes_nothing_and_tells_all(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(seeds=(0, 1), batch_size=8, eval_sequences=4000), tmp_path / "out"
    planned = plan(recipe, out=out, reporter=SilentProgress())
    assert not list(tmp_path.iterdir())
    assert (planned.steps, planned.tokens_per_step, planned.runs_of_arm) == (4, 8 * 16, 2)
    assert [arm.name for arm in planned.arms] == ["dense", "mixture_of_tokens"]
    assert all(arm.peak_bytes > 16 * arm.trained > 0 and arm.minutes > 0 < arm.flops for arm in planned.arms)
    assert all(arm.planned_bytes == pytest.approx(arm.peak_bytes, rel=0.1) for arm in planned.arms)
    assert planned.minutes == pytest.approx(2 * sum(arm.minutes for arm in planned.arms))
    said = "\n".join(planned.lines())
    for part in ("nothing was written", "training.eval_sequences", "4 runs of 4 steps, 128 tokens", str(out)):
        assert part in said
    assert not planned.begun


def test_a_plan_says_what_becomes_of_the_runs_that_a_folder_holds(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    assert not any("that it holds already" in line for line in plan(recipe, out=out, reporter=SilentProgress()).lines())
    compare(recipe, out=out)
    for resume, fate in ((True, "kept"), (False, "removed")):
        lines = plan(recipe, out=out, resume=resume, reporter=SilentProgress()).lines()
        assert any(f"the runs that it holds already are {fate}." in line for line in lines)


def test_what_takes_seconds_does_not_take_no_time(tiny_recipe, tmp_path):
    lines = plan(tiny_recipe(steps=1), out=tmp_path / "out", reporter=SilentProgress()).lines()
    assert any("All together <0.1 minutes" in line for line in lines)


def test_a_probe_takes_as_many_steps_as_it_is_told_and_has_no_folder(tiny_recipe, monkeypatch):
    asked = []
    time_arms = plan_module.time_arms

    def watched(*args, **options):
        asked.append(options["rounds"])
        return time_arms(*args, **options)

    monkeypatch.setattr(plan_module, "time_arms", watched)
    planned = plan(tiny_recipe(), reporter=SilentProgress(), rounds=5)
    assert asked == [5] and not planned.begun
    said = planned.lines()
    assert "from 5 steps of every arm on this machine" in said[0] and not any("To be written" in line for line in said)
    told = json.loads(json.dumps(planned.plain_form()))
    assert told["arms"][0]["seconds"] == planned.arms[0].seconds > 0 and told["minutes"] == planned.minutes


def test_the_planned_checkpoints_are_those_of_a_run(tiny_recipe, tmp_path, keep_checkpoints):
    recipe = tiny_recipe(save_every=1)
    planned = plan(recipe, out=tmp_path / "out", reporter=SilentProgress())
    compare(recipe, out=tmp_path / "out")
    for arm in planned.arms:
        kept = list((tmp_path / f"out/arms/{arm.name}/seed0").glob("checkpoint-*"))
        parts = [path for folder in kept for path in (folder / "model.safetensors", folder / "optimizer.pt")]
        each = sum(path.stat().st_size for path in parts) / len(kept)
        assert len(kept) == saving.KEPT and arm.checkpoint_bytes == pytest.approx(3 * each, rel=0.2)
    assert "more for its checkpoints" in planned.lines()[-1]
    none = plan(tiny_recipe(save_every=100), out=tmp_path / "new", reporter=SilentProgress())
    assert none.arms[0].checkpoint_bytes == 0 and "To be written" in none.lines()[-1]


def test_an_arm_that_the_recipe_lacks_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="has no arm 'moe': choose one of dense, mixture_of_tokens"):
        plan(tiny_recipe(), reporter=SilentProgress(), arm="moe")


def test_one_arm_is_planned_alone(tiny_recipe, tmp_path):
    planned = plan(tiny_recipe(), out=tmp_path, reporter=SilentProgress(), arm="mixture_of_tokens", seeds=(3,))
    assert [arm.name for arm in planned.arms] == ["mixture_of_tokens"] and planned.runs_of_arm == 1


def test_an_impossible_size_is_refused_before_anything_is_written(tiny_recipe, tmp_path):
    recipe = tiny_recipe()
    wide = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, hidden_size=10**6))
    for attempt in (
        lambda: compare(wide, out=tmp_path / "out"),
        lambda: plan(wide, out=tmp_path / "out", reporter=SilentProgress()),
    ):
        with pytest.raises(UserError, match=r"Arm 'dense' needs 128\.\d TB .* has [\d.]+ [GT]B: lower"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_memory_is_compared_with_what_this_machine_has(tiny_recipe, monkeypatch):
    check_memory(tiny_recipe())
    assert machine_bytes() > 10**8
    monkeypatch.setattr("mixtura.comparison.plan.machine_bytes", lambda: 100_000)
    with pytest.raises(UserError, match=r"has 100\.0 kB"):
        check_memory(tiny_recipe())


def test_bytes_are_said_in_words():
    assert [in_words(number) for number in (12, 1_500, 2.5e9, 3e15)] == ["12 bytes", "1.5 kB", "2.5 GB", "3,000.0 TB"]
