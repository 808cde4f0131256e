"""Local: one's own model, trained on one's own data; nothing travels."""

from __future__ import annotations

from client_app.methods.base import Trainer


class Local(Trainer):
    """Everything as the base has it."""
