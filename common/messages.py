"""The kinds of messages, the names in them, and what the settings of each kind of reply say.

`common.records` has their form. A message to train brings the keys of the run config's training
section, to distil those of the distill section too; its vectors are the method's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import NamedTuple, Self

from common.config.section import Scalar
from common.errors import WireError
from common.files import is_shown_as_is
from common.records import Header, Received

REGISTER = "query.register"
TRAIN = "train.personal"
EVALUATE = "evaluate.personal"
FINISH = "query.finish"
REFUSED = "query.refused"

THETA, GLOBAL_THETA, DELTA, GLOBAL_DELTA = "theta", "global-theta", "delta", "global-delta"
HEAD, MEANS = "head", "means"
EVALUATE_FIRST, TRAIN_GLOBAL, DISTIL = "evaluate", "train-global", "distil"
LOCATION, PAUSED = "location", "paused"
"""Of `FINISH`: where a model is; or, in place of an end, that the run has stopped and may go on."""
REASON, FINAL = "reason", "final"
"""Of a refusal: what to mend, and whether waiting is of no use."""
ALONE = "alone"
"""The predictor that any method may report: the same model, trained without the federation."""
SMALLEST_REPLY, LARGEST_REPLY = 2**20, 2**29
"""Bytes that any reply may have, whatever its client registered, and that none may exceed."""
MOST_EXAMPLES = 2**24
"""That a participant may claim; float32 counts so far exactly."""
MOST_LOSS = MOST_SECONDS = 1e6
"""Of what a client measures; a loss is not negative."""
MOST_EPSILON = 1e6
"""As which "no bound at all" travels, too."""
MOST_WEIGHT, MOST_TESTED = 3, 10
"""Of one participant in a mean of models, and in an accuracy, as multiples of the median."""


def bounded_counts(counts: Sequence[int], times: int) -> list[float]:
    """Return counts of examples, of which nobody's is more than so many times the lower median.

    How many examples a participant has is its own claim.

    >>> bounded_counts([100, 120, 1000], 3)
    [100.0, 120.0, 360.0]
    """
    most = times * median_low(counts)
    return [float(min(count, most)) for count in counts]


def weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    """Return sum(w x) / sum(w) over (w, x) pairs; NaN when there is no weight."""
    pairs = list(pairs)
    total = math.fsum(w for w, _ in pairs)
    return math.fsum(w * x for w, x in pairs) / total if total else math.nan


def micro_accuracy(counts: Sequence[tuple[int, float]]) -> float:
    """Return correct over tested of all (tested, correct), nobody's above ten medians of tested."""
    weights = bounded_counts([tested for tested, _ in counts], MOST_TESTED)
    right = (w * correct / tested for w, (tested, correct) in zip(weights, counts, strict=True))
    return sum(right) / sum(weights)


class Recipient(NamedTuple):
    """Who a message goes to, and how many bytes of arrays the reply may bring."""

    client_id: str
    node_id: int
    most_bytes: int = SMALLEST_REPLY


@dataclass(frozen=True)
class Pending:
    """What the server remembers of one message in flight.

    `version` is the number of server steps taken when its arrays were made; `sent_at` is the
    clock's. The reply is waited for `patience_s`, the transport's time to live if that is shorter,
    and may bring `most_bytes` of arrays.
    """

    client_id: str
    node_id: int
    message_type: str
    header: Header
    version: int = 0
    sent_at: float = 0.0
    patience_s: float = math.inf
    most_bytes: int = SMALLEST_REPLY

    @property
    def group_id(self) -> str:
        """What its message says of itself on the way (`inflation.most_bytes_of` reads it)."""
        return f"{self.header.server_round}, reply up to {self.most_bytes} bytes"

    @property
    def source(self) -> str:
        """Words that start an error message about the reply."""
        number = self.header.server_round
        return f"{self.message_type} reply of client {self.client_id} in round {number}"


@dataclass(frozen=True)
class Registration:
    """Reply to `query.register`: who a client is and how large. Nothing else about its model.

    The last four are declared where the method needs them (`common.methods`), else 0 or empty:
    the size of the shared model as this client builds it; an opaque tag, equal in one
    architecture, or declared (head-sharing = "tag"); the head maps features (feature_dim,) to
    logits (num_classes,).
    """

    client_id: str
    num_parameters: int
    num_examples: int
    num_global_parameters: int = 0
    group: str = ""
    num_classes: int = 0
    feature_dim: int = 0

    @property
    def most_bytes(self) -> int:
        """How many bytes of arrays a training reply may have: all vectors, and positions."""
        means = self.num_classes * (self.feature_dim + 1 + self.num_classes)
        vectors = self.num_parameters + self.num_global_parameters + means
        return min(SMALLEST_REPLY + 6 * vectors, LARGEST_REPLY)

    def settings(self) -> dict[str, Scalar]:
        """Return the keys that stand for it; what is 0 or empty is not sent."""
        return {key.replace("_", "-"): value for key, value in vars(self).items() if value}

    @classmethod
    def read(cls, reply: Received) -> Self:
        """Read and check a registration."""
        client_id = reply.value("client-id", str)
        if not 1 <= len(client_id) <= 200 or not is_shown_as_is(client_id):
            raise WireError(f"client-id {client_id!r:.80}: 1 to 200 characters, and no formula.")
        group = reply.value("group", str) if reply.has_setting("group") else ""
        if len(group) > 64 or not set(group) <= set("0123456789abcdef"):
            raise WireError(f"group = {group!r:.80}; expected up to 64 hex digits.")
        extra = ("num-global-parameters", "num-classes", "feature-dim")
        sizes = {k: reply.count(k, least=1) for k in extra if reply.has_setting(k)}
        return cls(
            client_id=client_id,
            num_parameters=reply.count("num-parameters", least=1),
            num_examples=reply.count("num-examples", least=1, most=MOST_EXAMPLES),
            group=group,
            **{key.replace("-", "_"): size for key, size in sizes.items()},
        )


@dataclass(frozen=True)
class Evaluation:
    """Test counts of one client: weights exactly as received, its own BatchNorm statistics.

    Of several labels an example, a correct one is a share of an example; of numbers R^2 says which
    share of all is correct, 0 at least. `num_correct` over `num_test` is called accuracy.
    `others` are the counts of correct examples of further predictors that a method reports beside
    its own, by name (FedProto: its head), and of the model trained alone; rounds are chosen by the
    counts of validation examples, which may be none.
    """

    num_test: int
    num_correct: float
    test_loss: float
    seconds: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    num_validation: int = 0
    num_validated: float = 0

    def settings(self) -> dict[str, Scalar]:
        """Return the keys that stand for it."""
        return {
            "num-test": self.num_test,
            "num-correct": self.num_correct,
            "test-loss": self.test_loss,
            "seconds-evaluation": self.seconds,
            "num-validation": self.num_validation,
            "num-validated": self.num_validated,
            **{f"num-correct-{name}": count for name, count in self.others.items()},
        }

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy of every predictor, and what is gained over training alone."""
        found = {"accuracy": self.num_correct / self.num_test}
        found |= {f"accuracy_{name}": n / self.num_test for name, n in self.others.items()}
        if ALONE in self.others:
            found["gain"] = (self.num_correct - self.others[ALONE]) / self.num_test
        return found

    def __str__(self) -> str:
        """Write the accuracies as a line.

        >>> print(Evaluation(10, 8, 0.5, others={ALONE: 7}))
        accuracy 0.800, accuracy_alone 0.700, gain 0.100
        """
        return ", ".join(f"{name} {value:.3f}" for name, value in self.accuracies().items())

    @classmethod
    def read_if_told(cls, reply: Received, others: Iterable[str] = ()) -> Self | None:
        """Read test counts; None of who trains privately, and keeps them to itself."""
        told = (reply.has_setting(key) for key in ("num-test", "num-correct", "test-loss"))
        return cls.read(reply, others) if any(told) else None

    @classmethod
    def read(cls, reply: Received, others: Iterable[str] = ()) -> Self:
        """Read and check test counts: 0 <= num_correct <= num_test, also of other predictors."""
        num_test = reply.count("num-test", least=1, most=MOST_EXAMPLES)
        if reply.has_setting(f"num-correct-{ALONE}"):
            others = (*others, ALONE)
        validation = reply.count("num-validation", most=MOST_EXAMPLES)
        return cls(
            num_test=num_test,
            num_correct=reply.share("num-correct", of=num_test),
            test_loss=reply.number("test-loss", most=MOST_LOSS),
            seconds=reply.number("seconds-evaluation", most=MOST_SECONDS),
            others={name: reply.share(f"num-correct-{name}", of=num_test) for name in others},
            num_validation=validation,
            num_validated=reply.share("num-validated", of=validation),
        )


@dataclass(frozen=True)
class Gain:
    """What joining is worth: accuracy with the federation minus that of the same model alone.

    Of participants that measured both; `micro` is over all their test examples alike, a fraction.
    """

    micro: float
    num_gaining: int
    num_measured: int

    @classmethod
    def of(cls, participants: Iterable[tuple[int, float]]) -> Self | None:
        """Sum up (test examples, gain) of each; None where nobody trained alone."""
        found = list(participants)
        if not found:
            return None
        weights = bounded_counts([n for n, _ in found], MOST_TESTED)
        micro = sum(w * gain for w, (_, gain) in zip(weights, found, strict=True)) / sum(weights)
        return cls(micro, sum(gain > 0 for _, gain in found), len(found))

    def __str__(self) -> str:
        """Write it as a line.

        >>> print(Gain.of([(30, 0.1), (10, -0.1)]))
        gain over training alone: +5.0 points, 1 of 2 participants gain
        """
        return (
            f"gain over training alone: {100 * self.micro:+.1f} points, "
            f"{self.num_gaining} of {self.num_measured} participants gain"
        )


@dataclass(frozen=True)
class TrainReply:
    """What a client measured while it trained; its vectors travel beside it.

    Who trains privately sends neither loss nor test counts, but the `epsilon` spent.
    """

    num_examples: int
    train_loss: float | None
    seconds: float
    evaluation: Evaluation | None = None
    epsilon: float | None = None

    def settings(self) -> dict[str, Scalar]:
        """Return the keys that stand for it."""
        tested = self.evaluation.settings() if self.evaluation else {}
        spent = None if self.epsilon is None else min(self.epsilon, MOST_EPSILON)
        measured = {"train-loss": self.train_loss, "epsilon": spent}
        return {
            **tested,
            "num-examples": self.num_examples,
            "seconds": self.seconds,
            **{key: value for key, value in measured.items() if value is not None},
        }

    @classmethod
    def read(cls, reply: Received, *, most: int, others: Iterable[str] = ()) -> Self:
        """Read and check; nobody trains on more than the `most` examples that it registered."""
        private = reply.has_setting("epsilon")
        return cls(
            num_examples=reply.count("num-examples", least=1, most=most),
            train_loss=None if private else reply.number("train-loss", most=MOST_LOSS),
            seconds=reply.number("seconds", most=MOST_SECONDS),
            evaluation=Evaluation.read_if_told(reply, others),
            epsilon=reply.number("epsilon", most=MOST_EPSILON) if private else None,
        )
