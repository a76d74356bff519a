"""What a run would fetch, train and score, and what it would take: estimated from shapes, nothing is fetched."""
