"""Losses: the teacher's signal, divergences from it, weights of tokens, and terms of a recovery's loss."""

from src.losses.cross_entropy import CrossEntropy
from src.losses.density import Density
from src.losses.distill import Distillation
from src.losses.hidden_states import HiddenStates
from src.losses.objective import Objective, Weighted
from src.losses.terms import Step, Term

__all__ = ["CrossEntropy", "Density", "Distillation", "HiddenStates", "Objective", "Step", "Term", "Weighted"]
