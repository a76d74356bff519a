"""The model and the slices of data that come with the repository (assets/SOURCE.md)."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
DATA = ASSETS / "data"
STORIES = ASSETS / "models" / "stories260K"
