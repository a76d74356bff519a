"""How atlas, the embedded base model, was made: its language, its facts, its training and its tasks."""
