"""Continual learning: task after task, each with its own method and statistics; one adapter for the original base."""
