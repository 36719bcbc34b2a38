"""What may be asked of a flow: numbers of samples and evaluations, seeds, classes; refused before any work."""

from __future__ import annotations

import operator

from gengrad.registry import SEEDS


def check_sampling(n: object, nfe: object, seed: object, first: object = 0, chunk: object = 1) -> None:
    """Raises ``ValueError`` for what is no whole number, or beyond its bounds; ``nfe`` may be None."""
    whole("n", n, "the number of samples", least=1)
    whole("first", first, "the number of the first sample", least=0)
    whole("chunk", chunk, "the number of samples moved at once", least=1)
    check_nfe(nfe)
    if whole("seed", seed, "the key of the draws", least=0) >= SEEDS:
        raise ValueError(f"seed is the key of the draws, less than 2^63; got {seed!r}")


def check_nfe(nfe: object) -> None:
    """Raises ``ValueError`` for an ``nfe`` that is neither None nor a whole number of at least 1."""
    if nfe is not None:
        whole("nfe", nfe, "the number of network evaluations per sample", least=1)


def whole(name: str, value: object, meaning: str, least: int) -> int:
    """``value`` as an int of at least ``least``; ``ValueError`` that says what ``name`` means for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {meaning}, a whole number of at least {least}; got {value!r}")
    return number


def check_class(classes: int | None, weights: list[float] | None, label: int | None, guidance: float) -> None:
    """Raises ``ValueError`` for a class, or a guidance, that a flow of so many ``classes`` does not know.

    ``weights``: the share of each class in its data.
    """
    if classes is None:
        if label is not None or guidance != 1:
            raise ValueError(
                "this flow was trained without classes, so it takes neither a class nor guidance; train one with "
                "network.classes=K on data with labels"
            )
        return
    if not isinstance(guidance, (int, float)) or not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance is a finite number, 0 or more (1: none); got {guidance!r}")
    if label is None:
        return
    if whole("label", label, "the class of the samples", least=0) >= classes:
        raise ValueError(f"class {label} is none of this flow's classes 0 .. {classes - 1}")
    if weights and not weights[label]:
        known = [c for c, weight in enumerate(weights) if weight]
        raise ValueError(f"class {label} was not in this flow's data, which had the classes {known}")
