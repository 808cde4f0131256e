"""The project's logger: a child of Flower's, so that its lines appear where Flower's do."""

from __future__ import annotations

import logging

logger = logging.getLogger("flwr.mh-pfedhn")
