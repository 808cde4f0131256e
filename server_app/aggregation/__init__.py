"""Rules that move the hypernetwork along the updates of its clients.

A new rule: a class with the methods of `Rule`, a line in `RULES`, its name in `server-rule`.
"""

from __future__ import annotations

from common.config import UpdateSection
from server_app.aggregation.adam import AdamRule
from server_app.aggregation.base import Rule
from server_app.aggregation.least_squares import LeastSquaresRule
from server_app.hypernet.network import Hypernetwork

RULES = {"adam": AdamRule, "least-squares": LeastSquaresRule}


def make_rule(hypernet: Hypernetwork, section: UpdateSection, *, total_rounds: float) -> Rule:
    """Make the rule that `server-rule` names, for one hypernetwork."""
    return RULES[section.server_rule](hypernet, section, total_rounds=total_rounds)
