"""What every training stage shares: base, trainer, checkpoints, resume, strategies, schedules, stopping."""
