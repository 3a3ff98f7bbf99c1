"""Lightning callbacks of the stages: schedules, the final mask, checkpoints, figures, a clean stop."""

from src.callbacks.anneal import PruningCurriculum, TemperatureAnnealing
from src.callbacks.averaged import AveragedWeights
from src.callbacks.harden import HardenMask
from src.callbacks.last import LastCheckpoint
from src.callbacks.monitor import SearchMonitor, Throughput
from src.callbacks.progress import ProgressBar, ProgressLines
from src.callbacks.recompute import CheckpointActivations
from src.callbacks.record import StageRecord
from src.callbacks.router import KeepRouter
from src.callbacks.sparsify import Sparsify
from src.callbacks.stop import StopOnSignal

__all__ = [
    "AveragedWeights",
    "CheckpointActivations",
    "HardenMask",
    "KeepRouter",
    "LastCheckpoint",
    "ProgressBar",
    "ProgressLines",
    "PruningCurriculum",
    "SearchMonitor",
    "Sparsify",
    "StageRecord",
    "StopOnSignal",
    "TemperatureAnnealing",
    "Throughput",
]
