"""What a comparison ran on, what its arms write, and what the report shows run by run.

Data, budget, versions and hardware as (term, value) pairs; on which held-out data curves and final values are measured,
in words; and the same beginnings of held-out texts, continued by each arm; scores of runs, pairs of arms, expert load
and the time of a step.
"""

from dataclasses import dataclass

from mixtura.report.tables import Cell, difference_cell
from mixtura.report.wording import NONE, capital, compact, duration, number, percent, seconds_per_step, yardstick_of
from mixtura.results import ArmResult, ArmSummary, Facts, Measure, Results, Summary
from mixtura.results.run import LoadHistory, PretrainingDetails


def data_facts(results: Results, summary: Summary) -> list[tuple[str, str]]:
    """What the arms were trained on and for how long, as (term, value)."""
    data, budget = results.data, summary.budget
    seeds = sorted({seed for arm in summary.arms.values() for seed in arm.seeds})
    run = f"{budget.steps:,} steps of {budget.tokens_per_step:,} tokens, {compact(budget.tokens)} tokens in all"
    return [
        ("Text", data.description),
        *(_text_facts(data.facts) if results.task == "pretraining" else _counts(data.facts)),
        ("Budget of a run", f"{run}, {number(data.epochs, 2)} passes over the text"),
        ("Seeds", ", ".join(map(str, seeds))),
    ]


def _text_facts(facts: Facts) -> list[tuple[str, str]]:
    size, per_token = number(_amount(facts, "vocab_size"), 0), number(_amount(facts, "bytes_per_token"), 2)
    return [
        ("Training text", _amounts(facts, "train")),
        ("Held-out text", _amounts(facts, "validation")),
        ("Vocabulary", f"{size}, {per_token} bytes a token"),
        ("Tokenizer", str(facts.get("tokenizer", NONE))),
        ("Sequence length", f"{number(_amount(facts, 'sequence_length'), 0)} tokens"),
    ]


def _counts(facts: Facts) -> list[tuple[str, str]]:
    """A task's own facts on its data, each under its key; a table or list in one line."""
    return [(capital(key.replace("_", " ")), _fact(value)) for key, value in facts.items()]


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_fact(of)}" for key, of in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or NONE
    if value is None or isinstance(value, bool):
        return {None: NONE, True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else number(value, 2)
    return str(value)


def _amount(facts: Facts, key: str) -> float | None:
    value = facts.get(key)
    return value if isinstance(value, int | float) else None


def _amounts(facts: Facts, part: str) -> str:
    documents, size, tokens = (_amount(facts, f"{what}_{part}") for what in ("documents", "bytes", "tokens"))
    return (
        f"{compact(size, 'B')} in {NONE if documents is None else f'{documents:,}'} documents, {compact(tokens)} tokens"
    )


def environment_facts(results: Results) -> list[tuple[str, str]]:
    """Versions and hardware, as (term, value)."""
    named = {"cpu_count": "CPU cores", "threads": "threads", "device": "device"}
    facts = [(str(named.get(key, key)), str(value)) for key, value in results.environment.items() if value is not None]
    return [*facts, ("whole comparison", duration(results.total_seconds))]


@dataclass(frozen=True)
class HeldOut:
    """What was evaluated, each to stand after "on"."""

    curve: str
    """On the way of a run."""
    final: str
    """At its end: what the tables have."""

    @property
    def note(self) -> str:
        """Why a curve does not end at its final value."""
        if self.curve == self.final:
            return f"Lines and rings: the loss on {self.curve}; a ring is the final value, as in the table."
        return f"Lines: the loss on {self.curve}. Rings: the final loss, as in the table, on {self.final}."


def held_out(results: Results) -> HeldOut:
    """The held-out data of a comparison, with counts where the results have them."""
    if results.task == "pretraining":
        return _sequences(results)
    if results.task == "translation":
        curve = _count(results, "eval_sequences", "sentences_validation")
        return HeldOut(
            f"{curve}validation sentences", f"{_count(results, 'final_eval_sequences', 'sentences_test')}test sentences"
        )
    if results.task == "chat":
        held = [_number(results.data.facts.get(f"chats_{side}")) for side in ("validation", "test")]
        return HeldOut(f"answers of up to {held[0]}validation chats", f"answers of up to {held[1]}test chats")
    curve = _count(results, "eval_sequences", "examples_validation")
    return HeldOut(f"{curve}validation texts", f"{_number(results.data.facts.get('examples_test'))}test texts")


def _sequences(results: Results) -> HeldOut:
    facts, training = results.data.facts, _training(results)
    values = [facts.get("tokens_validation"), facts.get("sequence_length")]
    values += [training.get(key) for key in ("final_eval_sequences", "eval_sequences", "batch_size")]
    known = [value for value in values if isinstance(value, int) and value]
    if len(known) < len(values):
        return HeldOut("some of the held-out sequences", "more of the held-out sequences")
    tokens, length, wanted, first, batch = known
    # The final evaluation takes whole batches, so that every group is full.
    final = max(1, min(wanted, tokens // length) // batch) * batch
    return HeldOut(f"the first {first:,} held-out sequences", f"the first {final:,} held-out sequences")


def _training(results: Results) -> dict[str, object]:
    table = results.recipe.get("training")
    return table if isinstance(table, dict) else {}


def _count(results: Results, limit: str, amount: str) -> str:
    """The smaller of a limit in the recipe and an amount of data, with a space behind it; nothing if one is unknown."""
    most, there = _training(results).get(limit), results.data.facts.get(amount)
    return _number(min(most, there)) if isinstance(most, int) and isinstance(there, int) else ""


def _number(value: object) -> str:
    return f"{value:,} " if isinstance(value, int) else ""


@dataclass(frozen=True)
class ShownContinuation:
    """The beginning of a held-out text, how the text goes on, and how each arm goes on: (arm, text)."""

    prompt: str
    reference: str
    outputs: list[tuple[str, str]]


def continuations_section(results: Results) -> list[ShownContinuation]:
    """The continuations of each arm's first run; empty where none were stored."""
    shown: dict[str, ShownContinuation] = {}
    for name, arm in results.arms.items():
        details = arm.runs[0].details if arm.runs else None
        for sample in details.continuations if isinstance(details, PretrainingDetails) else ():
            place = shown.setdefault(sample.prompt, ShownContinuation(sample.prompt, sample.reference, []))
            place.outputs.append((name, sample.output))
    return list(shown.values())


@dataclass(frozen=True)
class SeedTable:
    """The final measure of every run: a column for each arm and mode, the deployed mode first."""

    columns: list[tuple[str, str]]
    """Name of the arm, and words for the mode."""
    rows: list[tuple[int, list[str]]]
    """Seed, and a cell for each column."""
    mean: list[str]


def seed_table(results: Results, summary: Summary) -> SeedTable:
    """The final measure of every run."""
    measure = yardstick_of(results).measure
    columns = [
        (name, mode)
        for name, arm in summary.arms.items()
        for mode in _ordered_modes(arm)
        if measure.key in arm.modes[mode]
    ]
    seeds = sorted({seed for arm in summary.arms.values() for seed in arm.seeds})
    return SeedTable(
        columns=[(name, _mode_words(summary.arms[name], mode)) for name, mode in columns],
        rows=[
            (seed, [_run_score(summary.arms[name], mode, seed, measure) for name, mode in columns]) for seed in seeds
        ],
        mean=[_mean_score(summary.arms[name], mode, measure) for name, mode in columns],
    )


def _ordered_modes(arm: ArmSummary) -> list[str]:
    return sorted(arm.modes, key=lambda mode: (mode != arm.deployed_mode, mode != arm.training_mode))


def _mode_words(arm: ArmSummary, mode: str) -> str:
    named = (("deployed", arm.deployed_mode), ("trained", arm.training_mode))
    roles = [word for word, own in named if own == mode]
    words = "alone, all experts" if mode == "alone_all" else mode
    return words if len(roles) != 1 else f"{words}, as {roles[0]}"


def _run_score(arm: ArmSummary, mode: str, seed: int, measure: Measure) -> str:
    if seed not in arm.seeds:
        return NONE
    value = arm.modes[mode][measure.key].values[arm.seeds.index(seed)]
    return "diverged" if value is None else number(value, measure.digits + 1)


def _mean_score(arm: ArmSummary, mode: str, measure: Measure) -> str:
    # The mean of the runs that did not diverge would flatter the arm.
    score = arm.modes[mode][measure.key]
    return NONE if None in score.values else number(score.mean, measure.digits + 1)


@dataclass(frozen=True)
class PairRow:
    """Two arms of the verdict, and their difference."""

    first: str
    second: str
    outcome: str
    """What stands between their names."""
    cell: Cell


def pair_table(results: Results, summary: Summary) -> list[PairRow]:
    """Every pair of arms in the verdict."""
    digits = yardstick_of(results).measure.digits
    words = {"beats": "beats", "loses": "loses to", "draw": "draws with", "one_seed": "against"}
    return [
        PairRow(pair.arm, pair.against, words.get(pair.outcome, NONE), difference_cell(pair.difference, digits=digits))
        for pair in summary.pairs
    ]


_EVEN = 1e-3


@dataclass(frozen=True)
class LoadMap:
    """The load of one layer's experts over training, 1 being an even share."""

    arm: str
    label: str
    layer: int
    steps: list[int]
    experts: int
    seeds: dict[str, list[list[float]]]
    """For each seed (experts, steps). Experts have no identity across seeds, so a page shows one seed at a time."""


def load_maps(results: Results, summary: Summary) -> list[LoadMap]:
    """A heat map for each arm and mixture layer; arms whose load is even throughout have none (see `is_even`)."""
    maps = []
    for name, arm in results.arms.items():
        loads = {} if is_even(arm) else _loads(arm)
        first = next(iter(loads.values()), None)
        for position, layer in enumerate(first.layers if first else []):
            seeds = {str(seed): _load_matrix(load, position) for seed, load in loads.items()}
            experts = len(next(iter(seeds.values())))
            maps.append(LoadMap(name, summary.arms[name].label, layer, first.steps if first else [], experts, seeds))
    return maps


def is_even(arm: ArmResult) -> bool:
    """Whether every expert had an even share at every evaluation, as Mixture of Tokens forces."""
    shares = [share * len(row) for load in _loads(arm).values() for step in load.share for row in step for share in row]
    return bool(shares) and max(abs(share - 1) for share in shares) < _EVEN


def _loads(arm: ArmResult) -> dict[int, LoadHistory]:
    """By seed, of the runs that have one."""
    return {run.seed: run.load for run in arm.runs if run.load is not None and run.load.steps}


def _load_matrix(load: LoadHistory, position: int) -> list[list[float]]:
    """(experts, steps): share of the load times the number of experts."""
    rows = [[share * len(step[position]) for share in step[position]] for step in load.share]
    return [[round(value, 4) for value in column] for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class TimeBar:
    """The step of one arm as a bar: its parts are (name, words, per cent of the longest step)."""

    arm: str
    text: str
    parts: list[tuple[str, str, float]]


def time_bars(results: Results) -> list[TimeBar]:
    """A bar for each arm whose step was timed in parts."""
    baseline = results.arms[results.baseline]
    seconds = {name: seconds_per_step(arm, baseline) for name, arm in results.arms.items()}
    longest = max((value for value in seconds.values() if value), default=0.0)
    bars = []
    for name, arm in results.arms.items():
        parts, own = arm.step_parts, seconds[name]
        if parts is None or own is None:
            continue
        shares = {"forward": parts.forward, "backward": parts.backward, "optimizer": parts.optimizer}
        bars.append(
            TimeBar(
                arm=name,
                text=duration(own),
                parts=[
                    (key, percent(share, 0), round(100 * share * own / longest, 2)) for key, share in shares.items()
                ],
            )
        )
    return bars
