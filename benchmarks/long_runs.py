"""Trains many small decoders, each family at its best, and records their held-out losses at several budgets.

A bare loop over the library's parts: its model, data, optimizer, evaluation, and what moves with a step's load. A run
is one line of JSON with the fields of `Run` that differ from their defaults; `arm` has the settings of a recipe's arm:

    {"name": "tc", "family": "token_choice", "arm": {"top_k": 2, "normalize_top_k": true}, "branches": [244, 732]}

`train RUNS.jsonl` trains them, the lowest `priority` first, on one thread. It appends a row to FOLDER/results.jsonl for
every run that ends, skips those that have one, and keeps the state of the current run in FOLDER/states, so it may be
killed and started again at any time; several may share a folder. The list is read anew before each run. `store` puts
the rows into benchmarks/results/ with versions and hardware, and `restore` takes them out of there, so that another
machine trains what is missing alone.

With "branches" the schedule has no end of its own: after a warm-up the rate is constant, and for every number of steps
among the branches a copy of the run decays over its last `decay` share, so one run gives the loss at several budgets.
A line with more branches than an earlier one goes on from where that one stopped.
"""

import argparse
import copy
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixtura.benchmarks.measure import store_record
from mixtura.comparison.environment import environment
from mixtura.config import ArmConfig, DataConfig, Family, ModelConfig, Placement, TrainingConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import Activation
from mixtura.data.packing import ScheduledDataset, sequence_index
from mixtura.data.prepare import PreparedData, prepare_data
from mixtura.diagnostics.health import count_spikes
from mixtura.evaluation import evaluate_loss
from mixtura.layers.routing import Router
from mixtura.models import MixtureForCausalLM
from mixtura.models.build import build_model_config, shared_width_config
from mixtura.models.calibration import calibrate
from mixtura.planning import flops_per_token
from mixtura.training import balance
from mixtura.training.optimization import build_optimizer, clip_gradients, learning_rate_factor

RESULTS = Path(__file__).parent / "results"
LIST = Path(__file__).with_name("long_runs.jsonl")
SAVE_SECONDS = 120
NOT_SETTINGS = ("name", "priority", "branches", "all_mixtures")
NOT_STORED = ("key", "priority", "training_curve", "branches", "all_mixtures", "steps")
STUDIED = {"expert_rate": 1, "last_temperature": 1, "neighbours": 1, "dense_steps": 0, "router_dtype": "float32"}
"""Settings that came later, which leave the keys of runs without them as they were."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one run; those that the library's recipes have too mean what they mean there."""

    name: str = ""
    priority: int = 0
    family: Family = "dense"
    placement: Placement = "all"
    width: int = 64
    layers: int = 4
    heads: int = 4
    vocabulary: int = 512
    context: int = 64
    max_bytes: int = 64_000_000
    activation: Activation = "silu"
    gated: bool = True
    intermediate: int | None = None
    """Width of dense layers; None is 8/3 of the hidden size if gated, else 4 times, to a multiple of 8."""
    arm: dict[str, Any] = field(default_factory=dict)
    """Settings of a recipe's arm besides family, placement and rate; scales are derived where it names none."""
    rate: float = 3e-3
    steps: int = 600
    batch: int = 64
    """Sequences of a step."""
    seed: int = 0
    branches: tuple[int, ...] = ()
    """Numbers of steps at which a decayed branch ends; `steps` is then unused."""
    warmup: int = 50
    """Steps of warm-up of a run with branches; the others warm up over a twentieth of their steps."""
    decay: float = 0.2
    held_out: int = 1024
    """Held-out sequences, the same for all runs."""
    all_mixtures: bool = False
    """Measure mixtures of tokens with all their mixtures too, which takes long, besides the best two of a token."""
    calibration: int = 32
    """Batches of 16 training sequences, or of a group if that is larger, for the averages of `population`."""
    expert_rate: float = 1.0
    """Rate of the experts as a multiple of all others' (mixing divides the gradient that an expert gets)."""
    last_temperature: float = 1.0
    """Temperature of mixtures of tokens at the end of the run; it falls or rises to it evenly in its logarithm."""
    neighbours: int = 1
    """Consecutive windows of the text that follow each other in the order of training, so that a group is of similar
    examples; 1 is the library's order."""

    dense_steps: int = 0
    """First steps in which the model is dense; then experts start as copies of its feed-forward layers, as wide as
    equal FLOPs allow, beside routers as drawn for a new model."""
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the routers' products and logits; the library keeps them in float32."""

    @property
    def key(self) -> str:
        """A name that follows from the settings."""
        settings = {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}
        settings = {name: value for name, value in settings.items() if value != STUDIED.get(name, ...)}
        if self.branches:
            # What sharpens to the end has no trunk that branches of several ends share.
            settings["steps"] = self.ends if self.last_temperature != 1 else None
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def ends(self) -> tuple[int, ...]:
        """The numbers of steps at which the run has results."""
        return tuple(sorted(self.branches)) or (self.steps,)

    @property
    def dense_width(self) -> int:
        """Width of a dense feed-forward layer, which sets the FLOPs of every mixture."""
        wide = self.width * (8 / 3 if self.gated else 4)
        return self.intermediate or 8 * round(wide / 8)

    def model(self, *, dense: bool = False) -> MixtureForCausalLM:
        """The model as training starts with it; `dense` is that of the first `dense_steps`."""
        torch.manual_seed(self.seed)
        model = ModelConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.dense_width,
            activation=self.activation,
            gated=self.gated,
        )
        arm = ArmConfig(family=self.family, placement=self.placement, **self.arm)
        if dense:
            arm = ArmConfig(family="dense", dense_scale=arm.dense_scale)
        config = build_model_config(model, arm, vocab_size=self.vocabulary, max_position_embeddings=self.context)
        return MixtureForCausalLM(shared_width_config(config) if arm.control == "shared_width" else config)

    def rate_factor(self, step: int, end: int, *, decaying: bool) -> float:
        """Share of the peak rate at `step`, counted from 0, of a run or branch of `end` steps."""
        if not self.branches:
            return learning_rate_factor(step, steps=end, warmup_steps=round(0.05 * end), minimum=0.1)
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.decay_start(end)
        return warm * (1 - math.sqrt((step + 1 - start) / (end - start + 1))) if decaying else warm

    def decay_start(self, end: int) -> int:
        """The first step of the decay of a branch of `end` steps."""
        return end - round(end * self.decay)


def _in_bfloat16(router: Router, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    """A forward hook that gives what the router would in bfloat16, in the dtype that the layer works in."""
    (x,) = inputs
    return torch.nn.functional.linear(x.bfloat16(), router.weight.bfloat16()).to(x.dtype)


class Training:
    """A run under way."""

    def __init__(self, run: Run, data: PreparedData) -> None:
        """Builds the model and the optimizer."""
        self.run, self.data = run, data
        self._start(run.model(dense=run.dense_steps > 0))
        self.rows = ScheduledDataset(data.train, length=max(run.ends) * run.batch, seed=run.seed)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.follows_load = facts_of(run.family).follows_load

    def _start(self, model: MixtureForCausalLM) -> None:
        self.model = model.train()
        self.optimizer = build_optimizer(self.model, TrainingConfig(), learning_rate=self.run.rate)
        if self.run.expert_rate != 1:
            self._part_experts()
        if self.run.router_dtype == "bfloat16":
            for layer in model.mixture_layers():
                assert isinstance(layer.gate, Router), "a family without a router"
                layer.gate.register_forward_hook(_in_bfloat16)

    @torch.no_grad()
    def _upcycle(self) -> None:
        """Turns the dense model into the mixture; weights that both have keep their state in the optimizer."""
        dense, moments = dict(self.model.named_parameters()), self.optimizer.state
        self._start(self.run.model())
        for name, weight in self.model.named_parameters():
            if name in dense:
                weight.copy_(dense[name])
                self.optimizer.state[weight] = moments[dense[name]]
                continue
            layer, _, part = name.partition(".mlp.")
            if part == "experts.down_proj":
                weight.copy_(dense[f"{layer}.mlp.down_proj.weight"][:, : weight.shape[-1]])
            elif part.startswith("experts."):
                names = ("gate_proj", "up_proj") if self.run.gated else ("up_proj",)
                rows = weight.shape[1] // len(names)
                weight.copy_(torch.cat([dense[f"{layer}.mlp.{name}.weight"][:rows] for name in names]))

    def advance(self, end: int, *, decaying: bool) -> None:
        """Takes one step."""
        started = time.process_time()
        if 0 < self.run.dense_steps == self.step:
            self._upcycle()
        for group in self.optimizer.param_groups:
            factor = group.get("factor", 1.0) * self.run.rate_factor(self.step, end, decaying=decaying)
            group["lr"] = self.run.rate * factor
        # A run with branches has no length; its warm-up then counts as a tenth of it. No step may lie behind the last
        # one, where mixtures of tokens would run alone.
        steps = max(10 * self.run.warmup, self.step + 1) if self.run.branches else end
        self.model.prepare_step(self.step, steps=steps)
        if self.run.last_temperature != 1:
            for layer in self.model.mixture_of_tokens_layers():
                layer.temperature = self.run.last_temperature ** (self.step / end)
        ids_BL = self._rows(self.step * self.run.batch, self.run.batch)
        output = self.model(input_ids=ids_BL, labels=ids_BL, use_cache=False, output_routing=self.follows_load)
        assert output.loss is not None and output.language_loss is not None, "labels were given"
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.follows_load:
            self._follow_load(output)
        self.step += 1
        self.losses.append(round(output.language_loss.item(), 5))
        self.seconds += time.process_time() - started

    def _follow_load(self, output: Any) -> None:
        """Moves what routers learn from a step's load, as the library's trainer does."""
        layers, config = self.model.mixture_layers(), self.model.config
        totals = balance.micro_batch_totals(output.language_loss, None, None, output.routing, share=1.0)
        balance.update_gates(layers, totals, growth=config.l1_coef_growth)
        balance.update_thresholds(layers, rate=config.threshold_rate, reduce=lambda seen: seen)

    def _part_experts(self) -> None:
        """Gives the experts' weights parameter groups of their own, with a factor on the rate."""
        experts = {id(weight) for name, weight in self.model.named_parameters() if ".mlp.experts." in name}
        groups = list(self.optimizer.param_groups)
        self.optimizer.param_groups.clear()
        for group in groups:
            for theirs, factor in ((False, 1.0), (True, self.run.expert_rate)):
                chosen = [weight for weight in group["params"] if (id(weight) in experts) == theirs]
                if chosen:
                    self.optimizer.add_param_group({**group, "params": chosen, "factor": factor})

    def _rows(self, first: int, count: int) -> Tensor:
        return torch.stack([self._row(position) for position in range(first, first + count)])

    def _row(self, position: int) -> Tensor:
        if self.run.neighbours == 1:
            return self.rows[position]["input_ids"]
        sequences_NL, block = self.data.train.sequences_NL, self.run.neighbours
        chosen = sequence_index(position // block, num_sequences=len(sequences_NL) // block, seed=self.run.seed)
        return torch.from_numpy(sequences_NL[chosen * block + position % block].astype("int64"))

    def measure(self) -> dict[str, float]:
        """Held-out loss by mode; mixture of tokens has three to five, its `population` calibrated on training text."""
        held_out: dict[str, Any] = {"num_sequences": self.run.held_out, "batch_size": 64}
        # A copy, as calibration leaves averages in the layers.
        model, validation = copy.deepcopy(self.model), self.data.validation
        if not self.model.mixture_of_tokens_layers():
            return {mode: found["loss"] for mode, found in evaluate_loss(model, validation, **held_out).items()}
        size = max(16, self.model.config.group_size)
        calibrate(model, (self._rows(size * k, size) for k in range(self.run.calibration)))
        losses = {}
        for name, top_k in (("top2", 2), ("all", None)) if self.run.all_mixtures else (("top2", 2),):
            model.set_inference_mode("alone", top_k=top_k)
            modes = ("group", "alone", "population") if top_k == 2 else ("alone", "population")
            for mode, found in evaluate_loss(model, validation, modes=modes, **held_out).items():
                losses[mode if mode == "group" else f"{mode}_{name}"] = found["loss"]
        return losses

    @torch.no_grad()
    def load(self) -> dict[str, float]:
        """Of mixtures whose tokens choose, on 64 held-out sequences, means over layers: the busiest expert's load as a
        multiple of an even share, the share of experts with less than a tenth of it, and experts a token runs."""
        if facts_of(self.run.family).routing != "tokens choose" or not self.model.mixture_layers():
            return {}
        rows = self.data.validation.sequences_NL[:64].astype("int64")
        self.model.eval()
        routing = self.model(input_ids=torch.from_numpy(rows), use_cache=False, output_routing=True).routing
        self.model.train()
        rows_ME = torch.stack([stats.tokens_per_expert_E for stats in routing if stats is not None])
        share_ME = rows_ME / rows_ME.mean(-1, keepdim=True)
        found = {
            "busiest": share_ME.max(-1).values,
            "idle": (share_ME < 0.1).float(),
            "active": rows_ME.sum(-1) / rows.size,
        }
        return {name: round(value.mean().item(), 4) for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        modules = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**modules, "step": self.step, "seconds": self.seconds, "losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        if self.run.dense_steps:
            self._start(self.run.model(dense=state["step"] <= self.run.dense_steps))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], list(state["losses"])

    def row(self, end: int) -> dict[str, Any]:
        """What is recorded at an end; a run that stopped earlier, at a loss that is no number, has fewer steps."""
        size = max(1, len(self.losses) // 30)
        curve = [sum(self.losses[k : k + size]) / size for k in range(0, len(self.losses) - size + 1, size)]
        return {
            **asdict(self.run),
            "branches": list(self.run.branches),
            "key": self.run.key,
            "end": end,
            "steps_taken": self.step,
            "tokens": self.step * self.run.batch * self.run.context,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "flops_per_token": flops_per_token(self.model.config, sequence_length=self.run.context),
            "expert_width": self.model.config.moe_intermediate_size if self.run.family != "dense" else None,
            "losses": {mode: round(loss, 5) for mode, loss in self.measure().items()},
            "load": self.load(),
            "spikes": count_spikes(self.losses),
            "training_curve": [round(loss, 3) for loss in curve],
            "cpu_seconds": round(self.seconds, 1),
            "processor": environment()["processor"],
        }


class Folder:
    """Where results and states are, shared by any number of processes."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if it is missing."""
        self.path = path
        for name in ("states", "locks"):
            (path / name).mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        return lines(self.path / "results.jsonl")

    def add(self, row: dict[str, Any]) -> None:
        """Appends a result."""
        with (self.path / "results.jsonl").open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row) + "\n")

    def ends(self, run: Run) -> set[int]:
        """The ends of a run that have results."""
        return {row["end"] for row in self.rows() if row["key"] == run.key}

    def state(self, run: Run) -> Path:
        """Where the state of a run is kept."""
        return self.path / "states" / f"{run.key}.pt"

    def save(self, training: Training) -> None:
        """Keeps the state of a run, in place of an earlier one."""
        path = self.state(training.run)
        torch.save(training.state(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether the run is this process's alone, until the block or the process ends."""
        with (self.path / "locks" / run.key).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prepared(run: Run, folder: Folder) -> PreparedData:
    """The text of a run, which all runs of a folder share."""
    data = DataConfig(max_bytes=run.max_bytes, vocab_size=run.vocabulary, sequence_length=run.context)
    return prepare_data(data, cache_dir=folder.path / "data")


def train(run: Run, folder: Folder) -> None:
    """Trains one run, from its last state if there is one, and records every end that has no result."""
    training = Training(run, prepared(run, folder))
    done = folder.ends(run)
    first = min(run.decay_start(end) if run.branches else end for end in run.ends if end not in done)
    if folder.state(run).exists() and (state := torch.load(folder.state(run), weights_only=True))["step"] <= first:
        training.restore(state)
    for end in run.ends:
        if not run.branches:
            advance_to(training, end, end, folder)
            folder.add(training.row(end))
            folder.state(run).unlink(missing_ok=True)
            return
        if end in done:
            continue
        advance_to(training, run.decay_start(end), end, folder)
        folder.save(training)
        trunk = copy.deepcopy(training.state())
        advance_to(training, end, end, None)
        folder.add(training.row(end))
        training.restore(trunk)


def advance_to(training: Training, step: int, end: int, folder: Folder | None) -> None:
    """Trains up to `step`, saving to the folder now and then; without a folder it is the decay of a branch.

    A run whose loss is no longer a number stops where it is.
    """
    saved = time.monotonic()
    while training.step < step and all(map(math.isfinite, training.losses[-1:])):
        training.advance(end, decaying=folder is None)
        if folder is not None and time.monotonic() - saved > SAVE_SECONDS:
            folder.save(training)
            saved = time.monotonic()


def train_next(runs: list[Run], folder: Folder) -> bool:
    """Trains the first run that is neither done nor another process's; false if there is none."""
    for run in sorted(runs, key=lambda run: run.priority):
        if set(run.ends) <= folder.ends(run):
            continue
        with folder.claim(run) as mine:
            if mine and not set(run.ends) <= folder.ends(run):
                print(time.strftime("%H:%M:%S"), run.key, run.name, flush=True)
                train(run, folder)
                return True
    return False


def read_runs(path: Path) -> list[Run]:
    """The runs of a list."""
    return [Run(**{**line, "branches": tuple(line.get("branches", ()))}) for line in lines(path)]


def store(folder: Folder, runs: list[Run], *, name: str) -> Path:
    """Stores the results: the defaults once, and for every row only what differs from them, without its curve.

    A row has the name that its run has in the list now; those that the list no longer has keep theirs.
    """
    names = {run.key: run.name for run in runs}
    defaults: dict[str, Any] = _stored(Run()) | {"processor": environment()["processor"]}
    rows = [
        {name: value for name, value in row.items() if name not in NOT_STORED and value != defaults.get(name, ...)}
        for row in sorted(
            (row | {"name": names.get(row["key"], row["name"])} for row in folder.rows()),
            key=lambda row: (row["name"], row["width"], row["seed"], row["end"]),
        )
    ]
    return store_record(RESULTS, name, settings=defaults, rows=rows)


def restore(folder: Folder, runs: list[Run], *, name: str) -> int:
    """Gives an empty folder the rows of the stored record, so that another machine trains what is missing alone.

    Returns how many rows it has now.
    """
    if folder.rows():
        raise SystemExit(f"'{folder.path}' has results: restore into an empty folder.")
    (path,) = RESULTS.glob(f"{name}-*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    defaults: dict[str, Any] = _stored(Run()) | {"processor": record["environment"]["processor"]}
    for row in (defaults | row for row in record["rows"]):
        run = next((run for run in runs if row["end"] in run.ends and _same(_stored(run), row)), None)
        if run is None:
            settings = {key: value for key, value in row.items() if key in asdict(Run())}
            run = Run(**settings, branches=(row["end"],))
        folder.add(row | {"key": run.key})
    return len(folder.rows())


def _stored(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run).items() if name not in NOT_STORED}


def _same(settings: dict[str, Any], row: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in settings.items() if name != "name")


def main() -> None:
    """Trains a list of runs, or stores their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, says in (
        ("train", "train what has no result yet"),
        ("store", "store the results with versions"),
        ("restore", "give an empty folder the stored results"),
    ):
        command = verbs.add_parser(verb, help=says)
        command.add_argument("runs", type=Path, nargs="?", default=LIST, help="a file of JSON lines")
        command.add_argument("--folder", type=Path, default=Path("runs/long"), help="results and states")
        if verb != "train":
            command.add_argument("--name", default="long-runs", help="of the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(options.folder)
    if options.verb == "train":
        while train_next(read_runs(options.runs), folder):
            pass
    elif options.verb == "restore":
        print(f"{restore(folder, read_runs(options.runs), name=options.name)} results in {options.folder}")
    else:
        print(f"Stored in {store(folder, read_runs(options.runs), name=options.name)}")


if __name__ == "__main__":
    main()
