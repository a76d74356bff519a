"""Repair of finished adapters, after training."""
