"""What every training stage shares: ranks, schedules, checkpoints, strategies, watchdog, the stages' base."""
