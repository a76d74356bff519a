"""Losses of a task's tokens, a file per paper: `task.loss`."""
