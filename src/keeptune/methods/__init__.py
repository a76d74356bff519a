"""Methods: one paper, one file. A new file here is found by the registry, the recipe and the contract tests."""
