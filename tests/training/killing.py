"""Saves states in children that are killed, and counts what was lost. Run as a script: PyTorch is imported once.

``python killing.py MODE DIRECTORY [arguments]`` prints one JSON line of figures. A child acknowledges a save by a
line in a file, after ``save`` has returned: what it acknowledged must be there after any kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from checkpoint_cases import POINTS, MortalStore, fits, load_in_ranks, rank_state, shared_state

from gengrad.cli import leave
from gengrad.training.checkpoint import CheckpointStore, Ranks
from gengrad.training.interrupt import Interrupts

SIZE = 100_000  # floats of a state: a save takes long enough to be hit
LAST = 10**6


class Figures:
    """Counts over kills; ``check`` loads what a kill left behind."""

    def __init__(self):
        self.counts = {"kills": 0, "unloadable": 0, "lost": 0, "wrong": 0, "damaged": 0, "in_a_save": 0, "newest": -1}

    def check(self, directory: Path, acknowledged: int, world: int) -> None:
        self.counts["kills"] += 1
        self.counts["in_a_save"] += any(directory.glob("checkpoints/tmp_*"))
        for rank, found in enumerate(load_in_ranks(directory / "checkpoints", world)):
            if isinstance(found, Exception):
                self.counts["unloadable"] += 1
            elif found is None:
                self.counts["lost"] += acknowledged >= 0
            else:
                self.counts["lost"] += found.step < acknowledged
                self.counts["wrong"] += not fits(found, rank, SIZE)
                self.counts["newest"] = found.step
        self.counts["damaged"] += len(list(directory.glob("checkpoints/corrupt_*")))


def acknowledge(directory: Path, step: int) -> None:
    with open(directory / "acknowledged", "ab", buffering=0) as file:
        file.write(b"%d\n" % step)


def acknowledged(directory: Path) -> int:
    path = directory / "acknowledged"
    return max(map(int, path.read_text().split()), default=-1) if path.exists() else -1


def save_on(directory: Path, ranks: Ranks, steps: int, dies_at: tuple[str, int] | None = None) -> None:
    """Resume and save step after step. ``dies_at``: the point, and how many saves before it are allowed."""
    found = CheckpointStore(directory / "checkpoints", ranks=ranks).load_latest()
    start = 0 if found is None else found.step + 1
    dying = (start + dies_at[1], dies_at[0]) if dies_at else None
    store = MortalStore(directory / "checkpoints", ranks=ranks, dies_at=dying)
    for step in range(start, start + steps):
        store.save(step, shared_state(step, SIZE), rank_state(step, ranks.rank))
        if ranks.first:
            acknowledge(directory, step)


def fork(work, *arguments) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception as error:  # a rank whose partner was killed
            code = 3 if isinstance(error, RuntimeError) else 1
        finally:
            os._exit(code)
    return child


def one_rank(directory: Path, kills: int) -> dict:
    """Kill at every named point twice (first save and a later one), then ``kills`` times at random moments."""
    figures = Figures()
    for point in POINTS[0]:
        for before in (0, 3):
            _, status = os.waitpid(fork(save_on, directory, Ranks(), before + 1, (point, before)), 0)
            if os.WIFSIGNALED(status):
                figures.check(directory, acknowledged(directory), 1)
    return kill_at_random(directory, kills, figures, lambda _: [fork(save_on, directory, Ranks(), LAST)], 1)


def kill_at_random(directory: Path, kills: int, figures: Figures, start, world: int) -> dict:
    chance = random.Random(kills)
    for number in range(kills):
        before = acknowledged(directory)
        children = start(number)
        while acknowledged(directory) == before:  # at work, its resume done
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        victims = chance.choice([children, *([child] for child in children)])
        for child in victims:
            os.kill(child, signal.SIGKILL)
        wait_for(children)
        figures.check(directory, acknowledged(directory), world)
    return figures.counts


def wait_for(children: list[int]) -> list[int]:
    return [os.waitpid(child, 0)[1] for child in children]


def grouped(directory: Path, name: str, rank: int, *arguments) -> None:
    """``save_on`` as one of two ranks of a real gloo group."""
    import torch.distributed as group

    address = f"file://{directory}/meeting_{name}"
    group.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ranks = Ranks.of_process_group()
    if ranks.world != 2:
        raise SystemExit(4)
    save_on(directory, ranks, *arguments)


def two_ranks(directory: Path, kills: int) -> dict:
    """Kill either rank at every named point, then ``kills`` times one or both at random moments."""
    figures = Figures()
    for victim, points in POINTS.items():
        for point in points:
            name = f"{victim}_{point}"
            plans = [(3, (point, 2)) if rank == victim else (3,) for rank in range(2)]
            statuses = wait_for([fork(grouped, directory, name, rank, *plan) for rank, plan in enumerate(plans)])
            if os.WIFSIGNALED(statuses[victim]):
                figures.check(directory, acknowledged(directory), 2)

    def start(number: int) -> list[int]:
        return [fork(grouped, directory, f"random_{number}", rank, LAST) for rank in range(2)]

    return kill_at_random(directory, kills, figures, start, 2)


def overwrite(directory: Path) -> None:
    """What a plain save does: the same files again."""
    for step in range(LAST):
        state = shared_state(step, SIZE)
        weight = state["networks"]["velocity"]["weight"]
        (directory / "weight.safetensors").write_bytes(safetensors.torch.save({"weight": weight}))
        (directory / "step.json").write_text(json.dumps(step))
        acknowledge(directory, step)


def plain_saves(directory: Path, kills: int) -> dict:
    """The control: kills at random moments of a writer without a store."""
    counts, chance = {"kills": 0, "unloadable": 0, "wrong": 0}, random.Random(0)
    for _ in range(kills):
        (directory / "acknowledged").unlink(missing_ok=True)
        child = fork(overwrite, directory)
        while acknowledged(directory) < 0:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        wait_for([child])
        counts["kills"] += 1
        try:
            step = json.loads((directory / "step.json").read_text())
            weight = safetensors.torch.load((directory / "weight.safetensors").read_bytes())["weight"]
            counts["wrong"] += not weight.equal(shared_state(step, SIZE)["networks"]["velocity"]["weight"])
        except Exception:
            counts["unloadable"] += 1
    return counts


def train_until_told(directory: Path) -> None:
    """A loop as training has it: steps, a poll, a save at the end."""
    store = CheckpointStore(directory / "checkpoints")
    found = store.load_latest()
    with Interrupts(announce=False) as interrupts:
        acknowledge(directory, -1)
        for step in range(found.step + 1 if found else 0, LAST):
            time.sleep(0.005)
            if interrupts.signal is not None:
                store.save(step, shared_state(step, SIZE), rank_state(step, 0))
                acknowledge(directory, step)
                break
    raise SystemExit(interrupts.exit_code)


def signals(directory: Path, times: int) -> dict:
    """SIGTERM and SIGINT at random moments of a loop that saves and leaves."""
    chance, counts = random.Random(0), {"143": 0, "130": 0, "other": 0, "saved": 0, "longest": 0.0}
    for number in range(times):
        before = acknowledged(directory)
        lines = len((directory / "acknowledged").read_bytes().split()) if before >= 0 else 0
        child = fork(train_until_told, directory)
        while not (directory / "acknowledged").exists() or lines >= len(
            (directory / "acknowledged").read_bytes().split()
        ):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        began = time.monotonic()
        os.kill(child, signal.SIGINT if number % 4 == 3 else signal.SIGTERM)
        code = str(os.waitstatus_to_exitcode(wait_for([child])[0]))
        counts["longest"] = max(counts["longest"], time.monotonic() - began)
        counts[code if code in counts else "other"] += 1
        found = CheckpointStore(directory / "checkpoints").load_latest()
        counts["saved"] += found is not None and found.step == acknowledged(directory) > before
    return counts


def full_disk(directory: Path) -> dict:
    """Save until a real disk (a small one) is full; then free some and go on."""
    store, size = CheckpointStore(directory / "checkpoints"), SIZE
    for step in range(100):
        try:
            store.save(step, shared_state(step, size))
        except OSError as refusal:
            error = refusal
            break
        size += SIZE
    else:
        raise SystemExit("the disk never became full")
    names = sorted(os.listdir(directory / "checkpoints"))
    found = store.load_latest()
    expected = shared_state(step - 1, size - SIZE)["networks"]["velocity"]["weight"]
    whole = found.shared["networks"]["velocity"]["weight"].equal(expected)
    store.save(step, shared_state(step, 10))
    return {
        "error": type(error).__name__, "errno": error.errno, "message": str(error), "names": names,
        "kept": found.step == step - 1 and whole, "goes_on": store.load_latest().step == step,
    }  # fmt: skip


def under_torchrun(directory: Path, plan: str) -> dict | None:
    """One of torchrun's workers: dies as ``plan`` says ("rank:point,..."), once per restart; then a full disk."""
    import torch.distributed as group
    from accelerate import Accelerator

    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # torchrun's own store still has the addresses of the workers before a restart, and gloo dials those
    address = f"file://{directory}/meeting_{attempt}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group.init_process_group("gloo", address, rank=rank, world_size=world)
    world = Accelerator(cpu=True).num_processes
    if world != 2:
        raise SystemExit(f"{world} processes instead of 2")
    ranks, deaths = Ranks.of_process_group(), [death.split(":") for death in plan.split(",") if death]
    found, before = CheckpointStore(directory / "checkpoints", ranks=ranks).load_latest(), acknowledged(directory)
    good = before < 0 if found is None else found.step >= before and fits(found, rank, SIZE)
    if not good:
        (directory / "bad").touch()
    if attempt < len(deaths):
        victim, point = deaths[attempt]
        save_on(directory, ranks, 3, (point, 2) if int(victim) == rank else None)
        raise SystemExit("the planned death did not come")
    if found is None:
        save_on(directory, ranks, 1)
    outcome = ranks.gather_object(fill_one_disk(directory, ranks, found.step if found else 0))
    figures = {"attempts": attempt + 1, "bad": (directory / "bad").exists(), "world": world, "outcome": outcome}
    group.destroy_process_group()  # as gengrad's runs do: gloo's threads abort a process that ends under them
    return figures if ranks.first else None


def fill_one_disk(directory: Path, ranks: Ranks, last: int) -> list:
    """Rank 1 may write no large file: (what the save said, the old one stands, a later save works)."""
    import resource

    store, step = CheckpointStore(directory / "checkpoints", ranks=ranks), last + 1
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    message = "no error"
    try:
        store.save(step, shared_state(step, SIZE), {"big": torch.zeros(100_000)})
    except OSError as error:
        message = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    stands = store.load_latest().step == last
    store.save(step, shared_state(step, SIZE), rank_state(step, ranks.rank))
    return [message, stands, fits(store.load_latest(), ranks.rank, SIZE)]


def together(directory: Path, *amounts: int) -> dict:
    """Several modes in one process: most of the time of each is the import of PyTorch."""
    results = {}
    for mode, amount in zip(["one", "two", "plain", "signals"], amounts):
        (directory / mode).mkdir()
        results[mode] = MODES[mode](directory / mode, amount)
    return results


MODES = {
    **{"one": one_rank, "two": two_ranks, "plain": plain_saves, "signals": signals, "together": together},
    **{"full": full_disk, "torchrun": under_torchrun},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, where, *rest = sys.argv[1:]
    result = MODES[mode](Path(where), *(int(word) if word.isdigit() else word for word in rest))
    if result is not None:
        print(json.dumps(result), flush=True)
    leave(0)
