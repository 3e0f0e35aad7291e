"""Training of one model at a time, on transformers' Trainer and accelerate."""

from mixtura.training.metrics import load_imbalance, read_metrics, summarize_metrics
from mixtura.training.progress import LineProgress, ProgressReporter, RichProgress, SilentProgress
from mixtura.training.run import METRICS, TrainingOutcome, sequences_per_step, train
from mixtura.training.trainer import TrainingDiverged

__all__ = [
    "METRICS",
    "LineProgress",
    "ProgressReporter",
    "RichProgress",
    "SilentProgress",
    "TrainingDiverged",
    "TrainingOutcome",
    "load_imbalance",
    "read_metrics",
    "sequences_per_step",
    "summarize_metrics",
    "train",
]
