"""The flow of a run, from a recipe to an adapter and its report."""
