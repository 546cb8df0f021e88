"""Training: one loop for every task, with its schedules, checkpoints, journal and signs of life."""
