"""What every training stage shares: ranks, schedules, checkpoints, strategies, refusals, watchdog."""
