"""The nouns: targets, weight changes, plans, artefacts, errors."""
