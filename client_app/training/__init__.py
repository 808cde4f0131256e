"""Local training and evaluation: of one client, or of several in one batched call."""
