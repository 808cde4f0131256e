"""The Flower ServerApp: hypernetwork, schedule and strategy. Knows counts and vectors, no model."""
