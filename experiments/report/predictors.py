"""What each method's accuracy is of: which model is tested, and which further ones beside it."""

from __future__ import annotations

from experiments.report.groups import Group, Study
from experiments.report.settings import complete_settings
from server_app.output.figures import METHODS

SENT = "the model that the server sends, before local training"
OWN = "the client's own model, after local training"
HEAD = "own features after local training, under the head that the server sends"
PROTOTYPES = "own features after local training, by the nearest prototype that the server sends"
TESTED = {
    "mh-pfedhn": SENT, "mh-pfedhn-gd": SENT, "fedavg": SENT, "fedprox": SENT, "pfedhn": SENT,
    "fedavg-ft": "the model that the server sends, after one more local epoch",
    "local": OWN, "fd": OWN, "fml": OWN, "lg-fedavg": HEAD, "fedgh": HEAD,
    "fedproto": PROTOTYPES, "fedtgp": PROTOTYPES,
}  # fmt: skip
"""As docs/baselines.md has it."""
PREFIX = "accuracy_micro_"


def what_is_tested(study: Study) -> str:
    """Say of the methods in a study what their accuracy is of."""
    found: dict[str, list[str]] = {}
    for method in dict.fromkeys(group.method for group in study.groups):
        words = TESTED.get(method, "what this version does not know")
        found.setdefault(words, []).append(METHODS.get(method, method))
    said = "; ".join(f"{words} ({', '.join(names)})" for words, names in found.items())
    configs = [complete_settings(member.run.config) for member in study.members]
    fused = any(config["evaluation"] == "fused" for config in configs)
    late = (
        ' Runs with evaluation = "fused" are tested when a round begins, so local training is '
        "that of the rounds before."
        if fused
        else ""
    )
    return f"Tested is {said}.{late}"


def other_names(group: Group) -> list[str]:
    """Return the names of the further predictors that a group's runs record."""
    lasts = [member.run.summary.get("last") or {} for member in group.counted]
    keys = {key for last in lasts for key in last if key.startswith(PREFIX)}
    return sorted(key.removeprefix(PREFIX) for key in keys)
