"""NSGF++, flow matching and OT flow matching on CIFAR-10 on one GPU, within a stated time of training each.

    python benchmarks/cifar10_gpu.py [--data ROOT | --data FILE.npz] [--minutes 20] [--piece 9] [--n 50000]

Each method trains for ``--minutes`` in all, the same UNet in bf16 with mirror images: the number of steps is set once,
from the speed of a short trial, so that the learning rate ends where the time ends. Then ``--n`` samples at each NFE,
scored by FID where Inception's weights are at hand (see docs/images.md), else by FD-classifier. ROOT is torchvision's
folder; an .npz holds uint8 ``images`` and ``labels``, and has no official test set: a tenth is held out.

The work comes in pieces: after ``--piece`` minutes the script saves and ends with exit code 75; the same command goes
on. It ends with 0 when the table is whole. ``--tiny`` makes everything small enough for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import gengrad
from gengrad import plotting
from gengrad.config import RunConfig, load_config, read_config
from gengrad.evaluation.report import format_table
from gengrad.files import write_json
from gengrad.sampling import features_at_hand, judge_images, target_of

CONFIG = Path(__file__).parents[1] / "configs" / "images" / "cifar10_nsgf_pp.yaml"
NFES = (1, 2, 5, 10, 20, 35, 59)
METHODS = {
    "nsgf_pp": None,  # from the config
    "flow_matching": {"name": "flow_matching", "coupling": "independent"},
    "ot_flow_matching": {"name": "flow_matching", "coupling": "minibatch_ot"},
}
TRIAL, AGAIN = 40, 75  # steps that measure the speed; the exit code that asks for the next piece
TINY = {
    "network": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention_at": [], "channels_last": False},
    "train": {"batch_size": 32, "precision": "no", "warmup": 0, "log_every": 5},
    "ot_batch": 64,
}


class PieceOver(Exception):
    """The time of this piece is used up."""


class Clock:
    """Ends the work of a piece: training by SIGTERM, which saves; anything else by ``PieceOver``."""

    def __init__(self, minutes: float):
        self.training = False
        signal.signal(signal.SIGALRM, self._ring)
        signal.signal(signal.SIGTERM, self._ring)  # the training has a handler of its own, which saves
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 1.0)

    def _ring(self, number, frame) -> None:
        if self.training and number == signal.SIGALRM:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise PieceOver

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def config_of(method: str, steps: int, given: argparse.Namespace, out: Path) -> RunConfig:
    """The shipped config with the method in its place; ``steps`` of training into ``out``."""
    raw = load_config(CONFIG).resolved()
    if given.data.endswith(".npz"):
        raw["data"] = {"name": "image_array", "path": given.data, "key": "images", "labels": "labels", "flip": True}
    else:
        raw["data"]["root"] = given.data
    if given.tiny:
        raw["network"] |= TINY["network"]
        raw["train"] |= TINY["train"]
        raw["method"]["ot_batch"] = TINY["ot_batch"]
    if METHODS[method]:
        raw["method"] = METHODS[method]
    raw["train"] |= {"steps": steps, "warmup": min(raw["train"]["warmup"], steps // 10)}
    raw["train"]["preview_every"] = None  # the time is for training
    raw["train"]["checkpoint_every"] = max(1, min(raw["train"]["checkpoint_every"], steps // 4))
    return read_config(raw | {"out": str(out), "device": "auto"})


def steps_for(method: str, given: argparse.Namespace) -> int:
    """Training steps that fit into the time, from the speed of a trial (its first half, which sets up, left out)."""
    seconds = []
    for steps in (TRIAL // 2, TRIAL):
        out = given.out / f"trial-{method}-{steps}"
        shutil.rmtree(out, ignore_errors=True)  # one that was cut would only be finished, and look fast
        seconds.append(gengrad.train(config_of(method, steps, given, out), quiet=True).seconds)
    # two runs set up alike, so their difference is steps alone
    each = max((seconds[1] - seconds[0]) / (TRIAL - TRIAL // 2), 1e-4)
    return max(10, int(60 * given.minutes / each))


def train(method: str, cells: dict, given: argparse.Namespace, clock: Clock) -> Path:
    """The finished run of a method; raises ``PieceOver`` when the piece ends first, with the run saved."""
    if "steps" not in cells:
        cells["steps"] = steps_for(method, given)
    config = config_of(method, cells["steps"], given, given.out / f"run-{method}")
    clock.training = True
    outcome = gengrad.train(config, quiet=True)
    clock.training = False
    if not cells.get("finished"):
        cells["seconds"] = cells.get("seconds", 0.0) + outcome.seconds
    if not outcome.finished:
        raise PieceOver
    cells |= {"finished": True, "images_seen": cells["steps"] * config.train.batch_size}
    cells["images_per_second"] = cells["images_seen"] / cells["seconds"]
    return Path(config.general.out)


def judge(run: Path, nfe: int, given: argparse.Namespace) -> dict:
    """Every image score of a run at one NFE; samples come in shards, which a next piece finds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flow = gengrad.load(run, device)
    target = target_of(flow)
    features = given.features or features_at_hand(target)
    settings = {"n": given.n, "draws": 1, "seed": 0, "features": features, "folder": run / "samples"}
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return judge_images(flow, target, [nfe], **settings)["results"][0]


def table(results: dict) -> str:
    """One row per method: speed, images seen, and the Frechet distance at each NFE."""
    rows = []
    for method, cells in results["methods"].items():
        if not cells.get("finished"):
            continue
        about = {"images/s": round(cells["images_per_second"]), "images seen": cells["images_seen"]}
        row = {"method": method, **about, "training s": round(cells["seconds"])}
        for nfe, cell in cells["nfe"].items():
            name = next(name for name in cell if name.startswith("F"))
            row["score"], row[f"NFE {nfe}"] = name, cell[name]["mean"]
            row["floor"] = cell[name].get("floor", {}).get("mean")
        rows.append(row)
    return format_table(rows)


def work(results: dict, given: argparse.Namespace, clock: Clock) -> None:
    for method in METHODS:
        cells = results["methods"].setdefault(method, {"nfe": {}})
        run = train(method, cells, given, clock)
        write_json(given.out / "results.json", results)
        for nfe in given.nfe:
            if str(nfe) not in cells["nfe"]:
                cells["nfe"][str(nfe)] = judge(run, nfe, given)
                write_json(given.out / "results.json", results)
        rows = {f"NFE {nfe}": gengrad.load(run).sample(8, nfe, seed=0) for nfe in given.nfe}
        plotting.save(plotting.strips(rows), given.out / f"{method}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--minutes", type=float, default=20, help="of training for each method")
    parser.add_argument("--piece", type=float, default=9, help="minutes after which it ends, to be called again")
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--nfe", type=lambda text: [int(k) for k in text.split(",")], default=list(NFES))
    parser.add_argument("--features", choices=("inception", "classifier", "identity"), default=None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_gpu"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    asked = {key: getattr(given, key) for key in ("minutes", "data", "n", "features", "tiny")}
    results = json.loads(file.read_text()) if file.exists() else {"methods": {}, **asked}
    for key in asked:
        if results.get(key, asked[key]) != asked[key]:
            raise SystemExit(f"{file} was begun with --{key} {results[key]}; give that, or another --out")
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    started, clock = time.perf_counter(), Clock(given.piece)
    try:
        work(results, given, clock)
    except PieceOver:
        print(f"{table(results)}\nafter {time.perf_counter() - started:.0f} s: the same command goes on")
        return AGAIN
    finally:
        clock.stop()
        write_json(file, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
