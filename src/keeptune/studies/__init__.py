"""Studies: what runs have in common and apart, and what training did inside a model. One command, one file."""
