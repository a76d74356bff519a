"""The studies are tested on the runs of the pipeline's tests."""

from tests.pipeline.conftest import data, finished, recipe_values, store

__all__ = ["data", "finished", "recipe_values", "store"]
