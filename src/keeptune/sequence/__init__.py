"""Continual learning: task after task from one recipe, everything scored after each."""
