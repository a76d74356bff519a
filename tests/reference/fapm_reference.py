"""FAPM as its authors' code has it, number by number: the share that is kept is that with the largest scores."""

from __future__ import annotations


def kept(W: list[float], change: list[float], number: int) -> list[float]:
    """The change with the given number of largest ``|d| - mean|W| |d| / |w|``."""
    mean = sum(map(abs, W)) / len(W)
    scores = [abs(d) - mean * (abs(d) / abs(w)) for w, d in zip(W, change, strict=True)]
    chosen = sorted(range(len(W)), key=scores.__getitem__, reverse=True)[:number]
    return [d if at in chosen else 0.0 for at, d in enumerate(change)]
