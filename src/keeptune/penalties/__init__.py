"""Penalties: terms of the loss that hold trained factors back, with closed-form values and gradients."""
