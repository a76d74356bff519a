"""The recipe: its schema, its files, and what a paper published."""
