"""One training run: from the model that a caller built to a trained one, resumable at any point.

Under torchrun all processes call `train` alike and share every step's batch, see `ranks`.

A run folder holds `run.json` (what it was started with), `metrics.jsonl`, the last checkpoints `checkpoint-N/` and,
once the run is complete, `checkpoint/`: the trained model as its users load it.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from mixtura.config import TrainingConfig, UserError
from mixtura.models.experts_backends import use_experts_backend
from mixtura.results import Facts
from mixtura.results.run import CurvePoint
from mixtura.training import ranks, sharded_saving, sharding
from mixtura.training import saving as checkpoints
from mixtura.training.interface import TrainingTask
from mixtura.training.metrics import (
    MetricsFile,
    check_trackers,
    evaluation_curve,
    read_metrics,
    start_trackers,
    truncate_metrics,
)
from mixtura.training.optimization import build_optimizer, build_schedule
from mixtura.training.process import StopRequest, keep_freed_memory, slow_memory
from mixtura.training.progress import ProgressReporter, SilentProgress
from mixtura.training.saving import RUN_FILE, check_settings
from mixtura.training.trainer import MixtureTrainer, RunContext

METRICS = "metrics.jsonl"
# Settings that may differ when a run resumes, because they do not affect its numbers.
_FREE_TO_CHANGE = {"save_every", "threads", "trackers", "shards", "expert_ranks"}


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended."""

    steps: int
    """Optimizer steps taken, over all resumptions."""
    train_seconds: float
    """Seconds of optimisation alone, over all resumptions."""
    curve: list[CurvePoint]
    """Evaluations during training."""
    interrupted: bool
    """Stopped by Ctrl-C; everything up to `steps` is saved."""


def train(
    model: nn.Module,
    *,
    task: TrainingTask,
    config: TrainingConfig,
    learning_rate: float,
    seed: int,
    out: Path,
    label: str,
    resume: bool = False,
    reporter: ProgressReporter | None = None,
) -> TrainingOutcome:
    """Trains `model` in place and writes the run folder `out`.

    The order of the data is a function of `seed` and the step alone, so that arms with one seed see the same examples.
    Under torchrun all processes call this alike and share every step's batch, see `mixtura.training.ranks`.
    Only parameters that require a gradient are trained. A run that resumes is, bit for bit, one that never stopped.

    Args:
        model: initialised by the caller, frozen weights included; a resumed run overwrites those weights that `task`
            saves.
        task: the data, the loss and the evaluation.
        config: how to train.
        learning_rate: peak learning rate.
        seed: of the data order.
        out: the run folder, made when missing.
        label: names the run in progress bars and errors, such as "dense, seed 0".
        resume: go on where the run in `out` stopped; a folder without one starts a new run.
        reporter: shown the progress; None shows nothing.

    Raises:
        UserError: `out` holds a run and `resume` is False, or one that cannot be continued as this one; an evaluation
            cannot be run as configured; the folder cannot be written.
        TrainingDiverged: the loss or its gradient is no longer finite.
    """
    _prepare_process(model, config)
    task.check(model, batch_size=config.batch_size)
    layout = sharding.check_layout(model, config, ranks.world_size())
    arguments = training_arguments(model, config, seed=seed, out=out)
    trained = task.settings(model)
    if arguments.should_save:
        settings = _settings(trained, config, learning_rate=learning_rate, seed=seed, world_size=arguments.world_size)
        _prepare_folder(out, settings, resume=resume)
    ranks.wait_for_all()
    use_experts_backend(model, config.experts_backend, device=arguments.device, dtype=config.dtype)
    if (out / checkpoints.FINAL).exists():
        checkpoints.check_checkpoint(out / checkpoints.FINAL, trained)
        task.load(model.to(arguments.device), out / checkpoints.FINAL)
        return _outcome(out, interrupted=False)
    checkpoint = checkpoints.newest_checkpoint(out)
    step = checkpoints.check_checkpoint(checkpoint, trained) if checkpoint else 0
    seconds = _rewind_metrics(out, step) if arguments.should_save else 0.0
    reporter = reporter if reporter is not None and arguments.should_save else SilentProgress()
    with StopRequest() as stop, _metrics_file(out, arguments, trackers=config.trackers, step=step) as metrics:
        run = RunContext(
            task=task,
            settings=trained,
            label=label,
            out=out,
            config=config,
            layout=layout,
            learning_rate=learning_rate,
            tokens_per_step=sequences_per_step(config) * task.tokens_per_example,
            shares_micro_batches=arguments.per_device_train_batch_size < config.batch_size,
            seconds_before=seconds,
            metrics=metrics,
            reporter=reporter,
            stop=stop,
        )
        reporter.start_run(label, step=step, steps=config.steps)
        try:
            _run_steps(run, model, arguments, checkpoint=checkpoint, step=step)
        finally:
            reporter.end_run()
    model.to(arguments.device)  # of a run in shards only now, when their memory is free
    outcome = _outcome(out, interrupted=ranks.any_rank(stop.requested))
    if outcome.steps == config.steps and arguments.should_save:
        _save_finished(model, task, out / checkpoints.FINAL, step=config.steps, settings=trained)
    ranks.wait_for_all()
    return outcome


def _save_finished(model: nn.Module, task: TrainingTask, path: Path, *, step: int, settings: Facts) -> None:
    with checkpoints.new_folder(path, step=step, settings=settings) as folder:
        task.save_for_use(model, folder)


def training_arguments(model: nn.Module, config: TrainingConfig, *, seed: int, out: Path) -> TrainingArguments:
    """The Trainer's arguments for this process's share of the steps; `MixtureTrainer` decides on evaluating and saving.

    Raises:
        UserError: the processes cannot share the steps.
    """
    share = ranks.share_of_step(model, config, ranks.world_size())
    ranks.join()
    cpu = not torch.cuda.is_available()
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # transformers renamed it within version 5.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=share.batch_size,
        gradient_accumulation_steps=share.micro_batches,
        max_grad_norm=config.max_grad_norm,
        seed=seed,
        data_seed=seed,
        use_cpu=cpu,
        bf16=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **{checkpointing: config.activation_checkpointing},  # pyright: ignore[reportArgumentType]
    )
    if arguments.n_gpu > 1:
        # Without torchrun, several GPUs would mean nn.DataParallel, which splits a batch and with it the groups.
        arguments._n_gpu = 1
    return arguments


def sequences_per_step(config: TrainingConfig) -> int:
    """Sequences, or other examples, in one optimizer step on all ranks together."""
    return config.batch_size * config.gradient_accumulation_steps


def _prepare_process(model: nn.Module, config: TrainingConfig) -> None:
    """Sets the number of threads, and refuses what the model or the installed packages cannot do."""
    if config.threads:
        torch.set_num_threads(config.threads)
    check_trackers(config.trackers)
    known = any(hasattr(model, f"{name}_checkpointing_enable") for name in ("activation", "gradient"))
    if config.activation_checkpointing and not known:
        raise UserError(
            f"A {type(model).__name__} cannot recompute its activations: set 'training.activation_checkpointing' to "
            "false."
        )


def _settings(
    trained: Facts,
    config: TrainingConfig,
    *,
    learning_rate: float,
    seed: int,
    world_size: int,
) -> Facts:
    """All settings that affect the run's numbers."""
    training = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE_TO_CHANGE}
    if config.experts_backend == "auto":
        del training["experts_backend"]  # runs from before there was a choice go on
    if not config.compile:
        del training["compile"]
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "world_size": "any, in shards" if sharding.in_shards(config) else world_size,
        "training": training,
        **trained,
    }


def _prepare_folder(out: Path, settings: Facts, *, resume: bool) -> None:
    with checkpoints.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        used = (out / RUN_FILE).exists() or (out / METRICS).exists() or checkpoints.newest_checkpoint(out) is not None
        if used and not resume:
            raise UserError(f"'{out}' already holds a run: continue it with --resume, or choose another output folder.")
        if used and not (out / RUN_FILE).exists():
            raise UserError(
                f"'{out}' holds a run without {RUN_FILE}, not of this library: choose another output folder."
            )
        check_settings(out, settings)
        checkpoints.drop_partial_folders(out)


def _rewind_metrics(out: Path, step: int) -> float:
    """Cuts the metrics back to the checkpoint's step; returns the seconds of optimisation so far."""
    with checkpoints.writing(out):
        kept = [record for record in truncate_metrics(out / METRICS, step=step) if "loss" in record]
    last = kept[-1] if kept else {"step": 0, "seconds": 0.0}
    if last["step"] != step or len(kept) != step:
        raise UserError(
            f"'{out / METRICS}' has {len(kept)} steps but the checkpoint was made after {step}: restore the file, or "
            "start again in another output folder."
        )
    return last["seconds"]


def _metrics_file(out: Path, arguments: TrainingArguments, *, trackers: Sequence[str], step: int) -> Any:
    if not arguments.should_save:
        return nullcontext()
    with checkpoints.writing(out):
        return MetricsFile(out / METRICS, start_trackers(trackers, out=out, step=step))


def _run_steps(
    run: RunContext,
    model: nn.Module,
    arguments: TrainingArguments,
    *,
    checkpoint: Path | None,
    step: int,
) -> None:
    if checkpoint is not None and step >= run.config.steps:
        # Nothing is left to do, but the stock Trainer would take one more step.
        if sharding.in_shards(run.config):
            sharded_saving.load_model(model, checkpoint, alone=True)
        else:
            run.task.load(model, checkpoint)
        return
    length = run.config.steps * sequences_per_step(run.config)
    keep_freed_memory()
    if (warning := slow_memory(model, run.label)) is not None:
        run.reporter.note(warning)
    device = arguments.device
    trained = model.to(device) if run.layout is None else sharding.divide(model, run.layout, device)
    optimizer = build_optimizer(trained, run.config, learning_rate=run.learning_rate)
    trainer = MixtureTrainer(
        run,
        model=trained,
        args=arguments,
        data_collator=run.task.collate,
        train_dataset=run.task.dataset(length=length, seed=arguments.seed),
        optimizers=(optimizer, build_schedule(optimizer, run.config)),
    )
    if run.config.compile:
        trained.compile()
    with trainer.saver:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained._compiled_call_impl = None  # what is measured and saved next has other shapes, once each
    trained.zero_grad(set_to_none=True)
    if trained is not model:
        sharding.gather(trained, model)


def _outcome(out: Path, *, interrupted: bool) -> TrainingOutcome:
    records = read_metrics(out / METRICS)
    steps = [record for record in records if "loss" in record]
    last = steps[-1] if steps else {"step": 0, "seconds": 0.0}
    return TrainingOutcome(last["step"], last["seconds"], evaluation_curve(records), interrupted)
