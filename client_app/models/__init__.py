"""The models a client can train: one file per family; `registry` maps names to them."""
