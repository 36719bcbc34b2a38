"""The worker process: reads a task, then JSON lists of items, and answers one JSON line per item."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY = 8 << 30  # bytes of address space for gengrad's own tasks


def standardise_task(**settings) -> Callable:
    """Item (kind, text) -> (SMILES, changes)."""
    from gengrad.molecules.standard import Standard, standardise

    chosen = Standard(**settings)
    return lambda item: standardise(item[0], item[1], chosen)


def score_task(scorers: list[dict]) -> Callable:
    """Item SMILES -> (values, problems by position, scaffold); the molecule is parsed once for all scorers."""
    import gengrad.molecules.scorers  # noqa: F401 - registers them
    from gengrad.molecules.properties import score_all
    from gengrad.registry import SCORERS

    built = [SCORERS.build(settings) for settings in scorers]
    return lambda smiles: score_all(built, smiles)


def selfies_task() -> Callable:
    """Item SMILES -> its SELFIES symbols."""
    from gengrad.molecules.tokens import selfies_of

    return selfies_of


def python_task(path: str) -> Callable:
    """Item SMILES -> the number that the file's ``score(smiles)`` returns."""
    sys.path.insert(0, str(Path(path).resolve().parent))  # the file may import its neighbours
    spec = importlib.util.spec_from_file_location("scorer_of_ones_own", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the scorer file {path} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, "score", None)):
        raise ValueError(f"the scorer file {path} has no function score(smiles) that returns a number")
    return lambda smiles: plain(module.score(smiles))


def breed_task(mutation_rate: float, max_atoms: int) -> Callable:
    """Item (SMILES, SMILES or None, seed) -> a child's SMILES, or None."""
    from gengrad.molecules.moves import breed

    return lambda item: breed(*item, mutation_rate, max_atoms)


def describe_task(properties: list[str]) -> Callable:
    """Item SMILES -> what ``describing.look`` finds in it."""
    from gengrad.molecules.describing import look
    from gengrad.registry import SCORERS

    scorers = [SCORERS.build({"name": name}) for name in properties]
    return lambda smiles: look(smiles, scorers)


def plain(value: object) -> object:
    """Numbers of NumPy and PyTorch as Python's; anything else is described, for the reader to refuse."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)[:200]


TASKS = {
    "standardise": standardise_task,
    "score": score_task,
    "selfies": selfies_task,
    "python": python_task,
    "breed": breed_task,
    "describe": describe_task,
}


def answer(work: Callable, item: object) -> dict:
    """{"value": .} or {"problem": .}; an exception is an answer, not an end."""
    try:
        return {"value": work(item)}
    except ValueError as error:
        return {"problem": str(error)}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a scorer prints must not get between the answers

    def say(value: dict) -> None:
        out.write(json.dumps(value).encode() + b"\n")

    head = json.loads(sys.stdin.buffer.readline())
    if head["task"] != "python":  # somebody's own scorer may map large files
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    try:
        work = TASKS[head["task"]](**head["settings"])
    except Exception as error:
        say({"problem": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"})
        return
    say({})
    for line in sys.stdin.buffer:
        for item in json.loads(line):
            say(answer(work, item))


if __name__ == "__main__":
    main()
