"""Hugging Face's Trainer with router losses that count once, balancing over whole steps, and complete records.

The stock Trainer adds up the losses of the micro-batches of a step. That is right for the task's loss, which the model
divides by the targets of the whole step (`num_items_in_batch`). A router loss is a mean over its own micro-batch, so
the sum would multiply it by accumulation steps times ranks. Here both are formed separately: the task's loss is the
mean over all targets of the step, a router loss the mean over the micro-batches.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixtura.config import TrainingConfig, UserError
from mixtura.models import MixtureForCausalLM
from mixtura.models.calibration import collect_population, observe_population, update_population
from mixtura.models.transition import change_to_token_choice, transition_due
from mixtura.results import Facts
from mixtura.training import balance, ranks, sharded_saving, sharding
from mixtura.training import saving as checkpoints
from mixtura.training.interface import Batch, StepLosses, TrainingTask
from mixtura.training.metrics import MetricsFile
from mixtura.training.optimization import clip_gradients, set_schedule
from mixtura.training.process import StopRequest
from mixtura.training.progress import ProgressReporter

_LOAD_FILE = "load.safetensors"


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer finite; `step` is the first step where that was so."""

    def __init__(self, message: str, *, step: int) -> None:
        """`step` is the optimizer step that gave it, from 1."""
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run needs besides the model and its training data."""

    task: TrainingTask
    settings: Facts
    """`task.settings` of the model, stored with every checkpoint."""
    label: str
    out: Path
    config: TrainingConfig
    layout: sharding.Layout | None
    """How the processes hold the model together; None where each has a whole one."""
    learning_rate: float
    tokens_per_step: float
    shares_micro_batches: bool
    """Whether every rank has a part of each micro-batch, and not micro-batches of its own."""
    seconds_before: float
    """Optimisation seconds of the run before it was resumed."""
    metrics: MetricsFile | None
    """None on every rank but the first."""
    reporter: ProgressReporter
    stop: StopRequest


class MixtureTrainer(Trainer):
    """Trains one model; see the module's docstring for what differs from its base class."""

    def __init__(self, run: RunContext, **kwargs: Any) -> None:
        """`kwargs` are for the base class."""
        super().__init__(**kwargs)
        self.run = run
        # The loss is normalised by the step's token count, whatever the signature of the model's forward.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepEnd(self))
        self._global_load: balance.Load | None = None
        self._step_totals: balance.StepTotals | None = None
        self._step_population: list[Any] = []
        self._load_totals: balance.StepTotals | None = None
        self._load_steps = 0
        self._routed_layers: list[int] = []
        self._seconds = run.seconds_before
        self._first_step = 0
        self._mark = time.perf_counter()
        self.saver = sharded_saving.ShardSaver()

    def begin(self) -> None:
        """Starts the clock and the observation of groups; called just before the first step."""
        self._first_step = self.state.global_step
        if self.args.process_index:
            # The first rank draws what one process would; a resumed rank takes up its own state after this.
            torch.manual_seed(self.args.seed + self.args.process_index)
        if self._mixture is not None:
            observe_population(self._mixture, self._mixture.config.population_rate > 0)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last step, such as an evaluation, from the run's seconds."""
        self._mark = time.perf_counter()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast for bfloat16.

        It covers training only. The Trainer's own `bf16` would replace the model's forward, so that evaluations would
        be rounded too.
        """
        stack = super().compute_loss_context_manager()
        if self.run.config.dtype == "bfloat16":
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The step's micro-batches on this rank, and the number of targets of the step on all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self._prepare_step(batches)
        targets = torch.stack([self.run.task.count_targets(batch) for batch in batches]).sum()
        return batches, self._sum_over_ranks(targets.to(device))

    def _prepare_step(self, batches: list[Batch]) -> None:
        step, steps = self.state.global_step, self.run.config.steps
        if self._mixture is None:
            return
        if self.run.layout is not None:
            sharding.check_batches(self._mixture, self.run.layout, batches, self.args.device)
        if transition_due(self._mixture, step, steps=steps):
            ids = [batch["input_ids"] for batch in batches]
            change_to_token_choice(self._mixture, ids, add_up=self._sum_over_ranks)
        self._mixture.prepare_step(step, steps=steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss, to be summed over micro-batches and averaged over ranks."""
        assert num_items_in_batch is not None
        task = self.run.task
        losses = task.losses(model, inputs, num_targets=num_items_in_batch)
        aux_loss, z_loss = self._router_losses(losses)
        loss = losses.task_loss * self.args.world_size
        router_losses = zip(task.router_loss_weights(self.model), (aux_loss, z_loss), strict=True)  # pyright: ignore
        weighted = [weight * value for weight, value in router_losses if value is not None]
        if weighted:
            loss = loss + sum(weighted) / self.current_gradient_accumulation_steps
        routing = losses.routing or ()
        self._routed_layers = [depth for depth, stats in enumerate(routing) if stats is not None]
        share = 1.0 / (self.current_gradient_accumulation_steps * self.args.world_size)
        totals = balance.micro_batch_totals(losses.task_loss, aux_loss, z_loss, routing, share=share)
        self._step_totals = balance.add_totals(self._step_totals, totals)
        if self._mixture is not None and self._mixture.config.population_rate > 0:
            self._step_population = collect_population(self._mixture, self._step_population, share=share)
        return (loss, losses) if return_outputs else loss

    def finish_step(self, control: TrainerControl) -> None:
        """Balances the experts with the step's load, and decides whether to evaluate, to save and to continue."""
        assert self._step_totals is not None
        totals = balance.reduce_totals(self._step_totals, self._sum_over_ranks)
        self._step_totals, self._global_load = totals, None
        if self._mixture is not None:
            self._update_routers(self._mixture, totals)
        self._load_totals = balance.add_totals(self._load_totals, totals)
        self._load_steps += 1
        step, config = self.state.global_step, self.run.config
        last = step >= config.steps
        if last and self._mixture is not None:
            self._mixture.prepare_step(step, steps=step)  # as the finished model is, when it is loaded
        control.should_evaluate = last or step % config.eval_every == 0
        control.should_save = step % config.save_every == 0
        if self._stop_requested():
            control.should_save = control.should_training_stop = True

    def _update_routers(self, mixture: MixtureForCausalLM, totals: balance.StepTotals) -> None:
        """Moves what follows from a step's tokens in place of a gradient."""
        layers, config = mixture.mixture_layers(), mixture.config
        if config.expert_bias_update_rate > 0:
            balance.update_expert_bias(layers, totals.tokens_per_expert_ME, rate=config.expert_bias_update_rate)
        balance.update_gates(layers, totals, growth=config.l1_coef_growth)
        balance.update_thresholds(layers, rate=config.threshold_rate, reduce=self._sum_over_ranks)
        seen, self._step_population = self._step_population, []
        if config.population_rate > 0:
            reading = partial(sharding.reading, mixture)
            update_population(
                mixture, rate=config.population_rate, step=seen, average=self._sum_over_ranks, reading=reading
            )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        alone_on_cpu = self.args.device.type == "cpu" and self.accelerator.distributed_type == DistributedType.NO
        if self.run.layout is None and not alone_on_cpu:
            return super()._clip_grad_norm(model)
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Records a step; the base class calls this after each step, and at the end with a summary that is ignored.

        Raises:
            TrainingDiverged: the loss or its gradient is not finite; nothing is saved after that.
        """
        if "grad_norm" not in logs:
            return
        assert self._step_totals is not None
        totals, self._step_totals = self._step_totals, None
        losses = torch.stack([totals.task_loss, totals.aux_loss, totals.z_loss]).tolist()
        grad_norm, step = float(logs["grad_norm"]), self.state.global_step
        self._check_finite(step, loss=losses[0], grad_norm=grad_norm)
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._write(
            {
                "step": step,
                **dict(zip(("loss", "aux_loss", "z_loss"), losses, strict=True)),
                "grad_norm": grad_norm,
                "learning_rate": logs["learning_rate"],
                "seconds": self._seconds,
                "tokens": step * self.run.tokens_per_step,
            }
        )
        seconds = max(self._seconds - self.run.seconds_before, 1e-9)
        tokens = (step - self._first_step) * self.run.tokens_per_step
        self.run.reporter.advance(step, loss=losses[0], tokens_per_second=tokens / seconds)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures held-out examples on the first rank, as the task does during training; records finite values.

        Of a model in shards every rank has a part, so all measure, the same examples at the same time.
        """
        step, first = self.state.global_step, self.is_world_process_zero()
        measures = first or self.run.layout is not None
        measured = self.run.task.evaluate(self.model, final=False) if measures else {}  # pyright: ignore
        losses = [measures["loss"] for measures in measured.values()]
        self._check_finite(step, loss=ranks.of_first(sum(losses)), grad_norm=0.0)
        if first:
            kept = {
                mode: {key: value for key, value in measures.items() if math.isfinite(value)}
                for mode, measures in measured.items()
            }
            tokens = step * self.run.tokens_per_step
            self._write({"step": step, "tokens": tokens, "seconds": self._seconds, "eval": kept, **self._load_report()})
        self._load_totals, self._load_steps = None, 0
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        self.restart_clock()
        return {}

    def floating_point_ops(self, inputs: Batch) -> int:
        """0: the base class would walk over all parameters at every micro-batch; FLOPs are planned, not measured."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves everything that a resumed run needs to continue bit for bit as if it had never stopped."""
        step = self.state.global_step
        folder = checkpoints.numbered(self.run.out, step)
        first = self.is_world_process_zero()
        self.saver.wait()
        with ranks.together(), contextlib.ExitStack() as stack:
            with ranks.together():
                if first:
                    stack.callback(checkpoints.drop_old_checkpoints, self.run.out, keep=checkpoints.KEPT)
                new = checkpoints.new_folder(folder, step=step, settings=self.run.settings, first=first)
                unfinished = stack.enter_context(new)
            with ranks.together():
                checkpoints.save_tensors(checkpoints.random_state(), unfinished / self._random_state_file())
                if first and self.run.metrics is not None:
                    self.run.metrics.sync()
                if first:
                    self.state.save_to_json(str(unfinished / "trainer_state.json"))
                    self._save_load(unfinished / _LOAD_FILE)
            if sharding.in_shards(self.run.config):
                self.saver.start(self.model, self.optimizer, unfinished, stack.pop_all())  # pyright: ignore
            elif first:
                self.run.task.save(self.model, unfinished)  # pyright: ignore[reportArgumentType]
                for name, part in self._optimization.items():
                    checkpoints.save_tensors(part.state_dict(), unfinished / f"{name}.pt")
        self.restart_clock()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if sharding.in_shards(self.run.config):
            sharded_saving.load_model(self.model, folder)  # pyright: ignore[reportArgumentType]
        else:
            self.run.task.load(self.model, folder)  # pyright: ignore[reportArgumentType]
        load = {name: value.to(self.args.device) for name, value in load_file(folder / _LOAD_FILE).items()}
        self._load_steps = int(load.pop("steps"))
        if self._load_steps:
            self._load_totals = balance.StepTotals(**load)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if sharding.in_shards(self.run.config):
            folder = Path(checkpoint)
            sharded_saving.load_optimizer(self.model, self.optimizer, folder)  # pyright: ignore[reportArgumentType]
            set_schedule(self.optimizer, self.lr_scheduler, checkpoints.step_of(folder))  # pyright: ignore
        else:
            for name, part in self._optimization.items():
                part.load_state_dict(checkpoints.load_tensors(Path(checkpoint) / f"{name}.pt"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        state = None if checkpoint is None else Path(checkpoint) / self._random_state_file()
        # A run in shards may go on with more processes than it had; new ones draw what `begin` has seeded.
        if state is not None and (state.exists() or not sharding.in_shards(self.run.config)):
            checkpoints.set_random_state(checkpoints.load_tensors(state))

    def _save_load(self, path: Path) -> None:
        totals = self._load_totals._asdict() if self._load_totals is not None else {}
        save_file({"steps": torch.tensor(self._load_steps), **totals}, path)

    def _random_state_file(self) -> str:
        return f"rng_state_{self.args.process_index}.pt"

    @property
    def _mixture(self) -> MixtureForCausalLM | None:
        """The model if it is one of ours, whose configuration says how experts are balanced over whole steps."""
        return self.model if isinstance(self.model, MixtureForCausalLM) else None

    @property
    def _optimization(self) -> Mapping[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.lr_scheduler}

    def _router_losses(self, losses: StepLosses) -> tuple[Tensor | None, Tensor | None]:
        """Unweighted load-balancing and z-loss of this micro-batch.

        With `balance_over = "global"` the experts' shares are those of all micro-batches of the step so far, on all
        ranks (arXiv 2501.11873): a micro-batch may then use experts as unevenly as its text suggests, as long as the
        whole step is balanced. Where every rank has a part of each micro-batch, the shares are those of the whole one,
        and a part counts by its tokens.
        """
        mixture, parts = self._mixture, self.run.shares_micro_batches
        over_the_step = mixture is not None and mixture.config.balance_over == "global"
        if mixture is None or losses.aux_loss is None or losses.routing is None or not (over_the_step or parts):
            return losses.aux_loss, losses.z_loss
        own = balance.load_of(losses.routing)
        load = all_ranks = balance.Load(*map(self._sum_over_ranks, own))
        if over_the_step:
            load = self._global_load = balance.add_loads(self._global_load, load)
        aux_loss, z_loss = mixture.router_losses(tuple(balance.with_load(losses.routing, load)))
        if not parts or aux_loss is None or z_loss is None:
            return aux_loss, z_loss
        weight = own.routed_M[0] * self.args.world_size / all_ranks.routed_M[0].clamp_min(1.0)
        return aux_loss * weight, z_loss * weight

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value  # pyright: ignore

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop, or cannot write: all ranks have to leave the loop at the same step."""
        return ranks.any_rank(self.run.stop.requested or self.saver.failed)

    def _load_report(self) -> Facts:
        if self._load_totals is None:
            return {}
        return balance.load_report(self._load_totals, steps=self._load_steps, layers=self._routed_layers)

    def _write(self, record: Facts) -> None:
        if self.run.metrics is not None:
            with checkpoints.writing(self.run.out):
                self.run.metrics.write(record)

    def _check_finite(self, step: int, *, loss: float, grad_norm: float) -> None:
        for name, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                self.saver.settle()
                newest = checkpoints.newest_checkpoint(self.run.out)
                kept = f"the last good checkpoint is '{newest}'" if newest else "there is no checkpoint yet"
                raise TrainingDiverged(
                    f"{self.run.label} diverged: its {name} became {value} at step {step}; lower its learning rate, "
                    f"which is {self.run.learning_rate:g} ({kept}).",
                    step=step,
                )


class _StepEnd(TrainerCallback):
    """Calls methods of the trainer at moments for which the base class has no method to override."""

    def __init__(self, trainer: MixtureTrainer) -> None:
        """`trainer` is the trainer whose methods are called."""
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step is next."""
        self.trainer.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped; the base class logs, evaluates and saves after this."""
        self.trainer.finish_step(control)
