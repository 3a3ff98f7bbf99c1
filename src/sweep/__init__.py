"""Sweep over settings of ``fit`` with Optuna; the verb is ``sweep``."""
