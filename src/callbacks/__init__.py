"""Schedules and side effects of the stages."""

from src.callbacks.anneal import PruningCurriculum, TemperatureAnnealing
from src.callbacks.harden import HardenMask
from src.callbacks.monitor import SearchMonitor, Throughput
from src.callbacks.record import StageRecord

__all__ = [
    "HardenMask",
    "PruningCurriculum",
    "SearchMonitor",
    "StageRecord",
    "TemperatureAnnealing",
    "Throughput",
]
