"""Who owns which examples: index arrays from labels, numpy alone.

Shapes: M examples, N clients, C classes. Every function is a pure function of its arguments; all
randomness comes from the generator it is given. Index arrays are int64 and ascending.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.source import PARTS, Division
from common.errors import DataError

Indices = NDArray[np.int64]

SHARE_RANGE = (0.4, 0.6)
"""Interval of the weights by which a held class is divided (method.md, "pathological")."""
MAX_DIRICHLET_DRAWS = 10_000
"""Bound of the redraws; a draw takes 0.03 to 1.5 ms."""


def strata(labels: NDArray[Any]) -> Indices:
    """Return what a draw keeps in proportion (M,): classes; of other labels all alike."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)


def numbered_anew(classes: Indices) -> Indices:
    """Number classes (M,) in the order in which they come: whoever numbers them, a draw is one.

    >>> numbered_anew(np.array([7, 2, 2, 7])).tolist()
    [0, 1, 1, 0]
    """
    _, firsts, which = np.unique(classes, return_index=True, return_inverse=True)
    found: Indices = np.argsort(np.argsort(firsts))[which]
    return found


def split_pathological(
    labels: Indices, *, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> list[Indices]:
    """Draw the published pathological partition (method.md, "Data and evaluation").

    Every client draws `classes_per_client` different classes, independently of the others; each
    class is divided among those that hold it in proportion to U(0.4, 0.6) weights. A class that
    nobody drew is not used. Returns one disjoint index array (M_i,) for each client.

    Raises DataError where a client is to draw more classes than there are.
    """
    classes = np.unique(labels)
    if classes_per_client > len(classes):
        raise DataError(
            f"classes-per-client = {classes_per_client}, but the data has {len(classes)} classes. "
            "Set it to 0 for the published value or to a smaller number."
        )
    holds = np.zeros((num_clients, len(classes)), dtype=bool)
    for client in range(num_clients):
        holds[client, rng.choice(len(classes), classes_per_client, replace=False)] = True
    weights = np.where(holds, rng.uniform(*SHARE_RANGE, size=holds.shape), 0.0)
    used = weights.sum(0) > 0
    return _divide(labels, classes[used], weights[:, used], rng)


def split_dirichlet(
    labels: Indices, *, num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[Indices]:
    """Draw the published Dirichlet partition: for each class, shares of the clients ~ Dir(alpha).

    Redrawn until the smallest client has more than `min_examples` examples. Differs from the
    authors: at most `MAX_DIRICHLET_DRAWS` times. Returns one disjoint index array (M_i,) for each
    client; together they have all examples.

    Raises DataError where there are too few examples, or no draw gave enough to every client.
    """
    if len(labels) < num_clients * (min_examples + 1):
        raise DataError(
            f"dirichlet: {num_clients} clients with more than {min_examples} examples each need "
            f"{num_clients * (min_examples + 1)} examples, the data has {len(labels)}. Use fewer "
            "clients (num-partitions) or a smaller min-client-examples."
        )
    classes, counts = np.unique(labels, return_counts=True)
    best = 0
    for _ in range(MAX_DIRICHLET_DRAWS):
        weights = rng.dirichlet(np.full(num_clients, alpha), size=len(classes)).T
        smallest = int(np.diff(_cuts(weights, counts), axis=0).sum(1).min())
        if smallest > min_examples:
            return _divide(labels, classes, weights, rng)
        best = max(best, smallest)
    raise DataError(
        f"dirichlet: none of {MAX_DIRICHLET_DRAWS} draws with alpha {alpha} gave each of "
        f"{num_clients} clients more than {min_examples} examples; in the best one the smallest "
        f"client had {best}. Use a larger dirichlet-alpha, fewer clients (num-partitions), a "
        "smaller min-client-examples, or partition = 'pathological'."
    )


def split_natural(groups: Indices, *, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """Give each client all examples of one group: a writer, a hospital, a camera.

    Of more groups (M,) than clients, `rng` draws which; groups of one example are left out. Returns
    one disjoint index array (M_i,) for each client, in the order of their groups. Raises DataError
    where there are fewer groups than clients.
    """
    names, firsts, counts = np.unique(np.sort(groups), return_index=True, return_counts=True)
    large = np.flatnonzero(counts > 1)
    if len(large) < num_clients:
        raise DataError(
            f"natural-id gives each client one group of two examples or more, and the data has "
            f"{len(large)} of them (of {len(names)}) for {num_clients} clients. Use at most "
            f"{len(large)} clients (num-partitions)."
        )
    order = np.argsort(groups, kind="stable")
    chosen = np.sort(rng.permutation(large)[:num_clients])
    return [order[firsts[group] : firsts[group] + counts[group]] for group in chosen]


def thin_out(labels: Indices, *, most: int, rng: np.random.Generator) -> Indices:
    """Draw `most` of M > `most` examples whose classes are in proportion as nearly as possible.

    Every class gets its exact share rounded down; those with the largest remainders get one more,
    the smaller label first where remainders are equal. Which examples of a class, `rng` decides.
    Returns positions into `labels`.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * most, len(labels))
    largest = np.argsort(-remainders, kind="stable")
    quotas[largest[: most - int(quotas.sum())]] += 1
    kept = [
        rng.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def split_train_test(
    labels: Indices, *, test_fraction: float, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Split one client's share at random into positions of train and test examples.

    The test part has round(test_fraction M) examples, at least one and at most M - 1. A class that
    has an example to spare but none in the test part swaps one in, for an example of the class
    that has most there. Raises DataError where there are fewer than two examples.
    """
    count = len(labels)
    if count < 2:
        raise DataError(
            f"{count} example(s) cannot be split into train and test. Give the client more data "
            "or use fewer clients (num-partitions)."
        )
    order = rng.permutation(count)
    num_test = min(max(round(test_fraction * count), 1), count - 1)
    test, train = order[:num_test].copy(), order[num_test:].copy()
    for missing in np.setdiff1d(labels, labels[test]):
        spare = np.flatnonzero(labels[train] == missing)
        values, counts = np.unique(labels[test], return_counts=True)
        if len(spare) > 1 and counts.max() > 1:
            given = np.flatnonzero(labels[test] == values[counts.argmax()])[0]
            train[spare[0]], test[given] = test[given], train[spare[0]]
    return np.sort(train), np.sort(test)


def split_three_ways(
    labels: Indices,
    division: Division,
    *,
    test_fraction: float,
    validation_fraction: float,
    rng: np.random.Generator,
) -> tuple[Indices, Indices, Indices]:
    """Split one client's share into positions of train, validation and test examples.

    As the client's own division says, else at random, labels in proportion. Fractions are of all
    its examples; the validation part is taken from those held back, or, where a division names a
    test part and no validation part, from the train part. Raises DataError where nothing is left to
    train or to test on.
    """
    if division.parts is not None:
        return _as_named(labels, division.parts, validation_fraction, rng)
    fractions = (test_fraction, validation_fraction)
    if division.groups is not None:
        return _along(rng.permutation(np.unique(division.groups)), division.groups, *fractions)
    if division.times is not None:
        return _along(np.unique(division.times), division.times, *fractions)
    train, held = split_train_test(labels, test_fraction=test_fraction, rng=rng)
    chosen_on = validation_fraction / test_fraction
    if not chosen_on or len(held) < 2:
        return train, held[:0], held
    parts = split_train_test(labels[held], test_fraction=1 - chosen_on, rng=rng)
    return train, held[parts[0]], held[parts[1]]


def _as_named(
    labels: Indices, parts: NDArray[np.int8], validation_fraction: float, rng: np.random.Generator
) -> tuple[Indices, Indices, Indices]:
    train, validation, test = (np.flatnonzero(parts == part) for part in range(len(PARTS)))
    if min(len(train), len(test)) == 0:
        raise DataError(
            f"its own division has {len(train)} examples to train and {len(test)} to test; both "
            "need some."
        )
    if not len(validation) and validation_fraction and len(train) > 1:
        kept, chosen = split_train_test(labels[train], test_fraction=validation_fraction, rng=rng)
        train, validation = train[kept], train[chosen]
    return train, validation, test


def _along(
    order: NDArray[Any], keys: NDArray[Any], test_fraction: float, validation_fraction: float
) -> tuple[Indices, Indices, Indices]:
    """Fill train, validation and test part, one after the other, with whole groups in an order.

    The first group is trained on and the last one tests, however large they are.
    """
    if len(order) < 2:
        raise DataError(
            "all its examples are of one group or time, so nothing can be held back to test on. "
            "Use fewer clients, or give each several groups."
        )
    place = {key: number for number, key in enumerate(order.tolist())}
    places = np.array([place[key] for key in keys.tolist()])
    before = np.searchsorted(np.sort(places), places) / len(keys)  # the share in earlier groups
    held = (before >= 1 - test_fraction - 1e-9) | (places == len(order) - 1)
    tests = held & (before >= 1 - test_fraction + validation_fraction - 1e-9)
    tests |= places == len(order) - 1
    held &= places > 0
    return np.flatnonzero(~held), np.flatnonzero(held & ~tests), np.flatnonzero(held & tests)


def _divide(
    labels: Indices, classes: Indices, weights: NDArray[np.float64], rng: np.random.Generator
) -> list[Indices]:
    """Deal out the examples of each class, shuffled, by the weights (N, C) of the clients."""
    parts: list[list[Indices]] = [[] for _ in range(len(weights))]
    for column, label in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = _cuts(weights[:, [column]], np.array([len(members)]))[1:-1, 0]
        for part, indices in zip(parts, np.split(members, cuts), strict=True):
            part.append(indices)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def _cuts(weights: NDArray[np.float64], counts: Indices) -> Indices:
    """Turn weights (N, C) into cut points (N + 1, C), from 0 to counts (C,).

    A client of weight 0 gets nothing: behind the last owner the cumulated share is exactly 1,
    because x / x is, where a sum of normalised shares may stop short of it.
    """
    cumulated = np.cumsum(weights, axis=0)
    cuts = np.floor(cumulated / cumulated[-1] * counts).astype(np.int64)
    return np.vstack([np.zeros_like(counts), cuts])
