"""The hypernetwork: embeddings, trunk and head groups. Torch only; knows no update rule."""
