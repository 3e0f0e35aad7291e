"""Training of one model at a time, on transformers' Trainer and accelerate."""

from mixtura.training.interface import LOSS, Measure, StepLosses, TrainingTask
from mixtura.training.loop import METRICS, TrainingOutcome, sequences_per_step, train
from mixtura.training.metrics import load_imbalance, read_metrics, summarize_metrics
from mixtura.training.progress import LineProgress, ProgressReporter, RichProgress, SilentProgress
from mixtura.training.trainer import TrainingDiverged

__all__ = [
    "LOSS",
    "METRICS",
    "LineProgress",
    "Measure",
    "ProgressReporter",
    "RichProgress",
    "SilentProgress",
    "StepLosses",
    "TrainingDiverged",
    "TrainingOutcome",
    "TrainingTask",
    "load_imbalance",
    "read_metrics",
    "sequences_per_step",
    "summarize_metrics",
    "train",
]
