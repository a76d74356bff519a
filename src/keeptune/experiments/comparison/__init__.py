"""keeptune compare: methods, rates, strengths and seeds as one grid of runs, their trade-off, and the choice."""
