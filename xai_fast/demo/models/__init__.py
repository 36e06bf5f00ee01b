"""Real models of the demo, and one that is trained on the spot."""
