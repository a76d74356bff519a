"""Probes that look into a model: attribution of nodes and causal tracing."""
