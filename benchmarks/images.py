"""NSGF++ against flow matching and OT flow matching on small images; what its first phase is; the UNet's throughput.

    python benchmarks/images.py [--quick] [--data ROOT] [--parts methods,phase1,speed] [--steps 1800] [--runs FOLDER]

methods: the same UNet, number of images seen and draws for all; Frechet distance of classifier features (FD-classifier,
which is no FID) on 10,000 samples against the 10,000 test images at each NFE, three sampling seeds, beside the floor
(training against test images). phase1: per epsilon and OT batch in pixel space, what the Sinkhorn plan looks like and
how far the re-solved flow strays from a straight line. speed: images a second of a training step, beside torchcfm's
UNet and diffusers' where they are installed. ROOT holds MNIST as torchvision keeps it; --quick uses the embedded 8x8
digits. Cells that the JSON holds are not computed again, and a run that was cut goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import yaml
from torch import nn

import gengrad
from gengrad import pictures, plotting
from gengrad.config import RunConfig, read_config
from gengrad.data.base import FiniteData
from gengrad.data.draws import generator_for
from gengrad.evaluation.report import format_table
from gengrad.files import write_json
from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
from gengrad.functionals import SinkhornDivergence
from gengrad.networks import UNet
from gengrad.ot import exact_assignment, sinkhorn_velocity
from gengrad.registry import DATASETS
from gengrad.sampling import judge_images

ROOT = Path(__file__).parents[1]
NFES = (1, 2, 5, 10, 20, 60)
METHODS = {
    "NSGF++, two networks": {},
    "NSGF++, shared network": {"shared_network": True},
    "flow matching": {"name": "flow_matching", "coupling": "independent"},
    "OT flow matching": {"name": "flow_matching", "coupling": "minibatch_ot"},
}
EPSILONS = (0.002, 0.01, 0.05, 0.2)
BATCHES = (128, 512, 2048)


# ------------------------------------------------------------------ methods


def config_of(method: str, given: argparse.Namespace) -> RunConfig:
    """The shipped NSGF++ config with the method in its place: network, images and training are the same."""
    name = "digits" if given.quick else "mnist"
    raw = yaml.safe_load((ROOT / "configs" / "images" / f"{name}_nsgf_pp.yaml").read_text())
    raw["method"] = METHODS[method] if "name" in METHODS[method] else raw["method"] | METHODS[method]
    raw["train"] |= {"steps": given.steps, "warmup": min(50, given.steps // 10)}
    if not given.quick:
        raw["data"]["root"] = given.data
    raw |= {"out": str(given.runs / f"{name}-{method.replace(' ', '_')}-{given.steps}"), "device": given.device}
    return read_config(raw)


def train(config: RunConfig) -> dict:
    """Trains the run, or goes on with it; {"seconds", "cpu_seconds"} of this call."""
    outcome = gengrad.train(config, quiet=True)
    if not outcome.finished:
        raise SystemExit("interrupted; the same command goes on")
    return {"seconds": outcome.seconds, "cpu_seconds": outcome.cpu_seconds, "config": config.digest()}


def judge(config: RunConfig, target: FiniteData, nfe: int, n: int) -> dict:
    """Every image score of the run at one NFE, three sampling seeds."""
    flow = gengrad.load(config.general.out)
    folder = Path(config.general.out) / "samples"
    report = judge_images(flow, target, [nfe], n=n, draws=3, seed=0, features="classifier", folder=folder)
    return report["results"][0]


def methods(results: dict, given: argparse.Namespace) -> None:
    target = DATASETS.build(config_of("flow matching", given).data)
    for method in METHODS:
        config = config_of(method, given)
        cells = results["methods"].setdefault(method, {"nfe": {}})
        if "config" in cells and cells["config"] != config.digest():
            cells = results["methods"][method] = {"nfe": {}}  # measured under another config
        if "config" not in cells:
            cells |= train(config)
            save(results, given)
        for nfe in NFES:
            if str(nfe) not in cells["nfe"]:
                cells["nfe"][str(nfe)] = judge(config, target, nfe, given.n)
                save(results, given)
    flows = {method: gengrad.load(config_of(method, given).general.out) for method in METHODS}
    given.pictures.mkdir(parents=True, exist_ok=True)
    for nfe in (5, 10):
        grids = {method: flow.sample(36, nfe, seed=0) for method, flow in flows.items()}
        plotting.save(pictures.side_by_side(grids), given.pictures / f"images_nfe{nfe}{'_quick' * given.quick}.png")


def methods_table(results: dict) -> str:
    rows = []
    for method, cells in results["methods"].items():
        scores = {nfe: cell["FD-classifier"] for nfe, cell in cells["nfe"].items()}
        if scores:
            floor = next(iter(scores.values()))["floor"]["mean"]
            values = {f"NFE {nfe}": f"{s['mean']:.2f} ± {s['std']:.2f}" for nfe, s in scores.items()}
            rows.append({"FD-classifier": method, **values, "floor": f"{floor:.2f}", "s": round(cells["seconds"])})
    return format_table(rows)


# ------------------------------------------------------------------ phase 1


def plan(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> dict:
    """The plan between noise x (n, d) and images y (n, d), and the flow that is solved again at each of five steps."""
    started = time.perf_counter()
    solved = sinkhorn_velocity(x, y, epsilon_rel=epsilon)
    seconds = time.perf_counter() - started
    flow = particle_flow(SinkhornDivergence(y, epsilon_rel=epsilon), x, geodesic_taus(geodesic_times(5)))
    way, times = flow.states[-1] - x, torch.tensor(geodesic_times(5))
    straight = x + times.view(-1, 1, 1) * way
    stray = (flow.states - straight).square().mean((1, 2)).sqrt().max() / way.square().mean().sqrt()
    return {
        "effective_neighbours": float(solved.effective_neighbours),
        "self_mass": float(solved.self_mass),
        "stray": float(stray),
        "seconds": seconds,
    }


def matched_cost(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared distance of the best matching, as a share of that of independent pairs."""
    potential = sinkhorn_velocity(x, y, epsilon_rel=0.01, tol=0.1, debias=False).g
    best = (x - y[exact_assignment(x, y, potential)]).square().sum(1).mean()
    return float(best / (x - y).square().sum(1).mean())


def phase1(results: dict, given: argparse.Namespace) -> None:
    target = DATASETS.build(config_of("flow matching", given).data)
    for n in BATCHES[: 2 if given.quick else None]:
        y = target.sample(n, generator_for(0, "phase1 target")).flatten(1)
        x = torch.randn(y.shape, generator=generator_for(0, "phase1 source"))
        cells = results["phase1"].setdefault(str(n), {})
        if "matched_cost" not in cells:
            cells["matched_cost"] = matched_cost(x, y)
        for epsilon in EPSILONS:
            if str(epsilon) not in cells:
                cells[str(epsilon)] = plan(x, y, epsilon)
                save(results, given)


def phase1_table(results: dict) -> str:
    rows = []
    for n, cells in results["phase1"].items():
        for epsilon in EPSILONS:
            if (cell := cells.get(str(epsilon))) is not None:
                names = {"OT batch": int(n), "epsilon_rel": epsilon, "matched cost": cells["matched_cost"]}
                rows.append({**names, **cell})
    return format_table(rows)


# ------------------------------------------------------------------ speed


class Peer(nn.Module):
    """Another package's UNet, called like ours."""

    def __init__(self, network: nn.Module, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.call(self.network, x, t)


def peers(channels: int, size: int) -> dict:
    """UNets of about the size of ours, where their packages are installed; a name without a network where not."""
    found: dict = {"gengrad": UNet(event_shape=(channels, size, size), channels=32, multipliers=[1, 2, 2])}
    last = UNet(event_shape=(channels, size, size), channels=32, multipliers=[1, 2, 2], channels_last=True)
    found["gengrad, channels_last"] = last
    try:
        from torchcfm.models.unet import UNetModel

        network = UNetModel(dim=(channels, size, size), num_channels=32, num_res_blocks=1)
        found["torchcfm"] = Peer(network, lambda unet, x, t: unet(t, x))
    except ImportError:
        found["torchcfm"] = None
    try:
        from diffusers import UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
        settings = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, **blocks}
        network = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **settings)
        found["diffusers"] = Peer(network, lambda unet, x, t: unet(x, t).sample)
    except ImportError:
        found["diffusers"] = None
    return found


def images_per_second(networks: dict, shape: tuple, bf16: bool, steps: int, batch: int = 128) -> dict[str, float]:
    """Median over steps of forward, backward and Adam, the networks in turn so that all meet the same machine."""
    optimizers = {name: torch.optim.Adam(list(n.parameters())) for name, n in networks.items()}
    x, t = torch.randn(batch, *shape), torch.rand(batch)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for step in range(steps + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = (network(x, t) - x).square().mean()
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if step:  # the first one sets up
                seconds[name].append(time.perf_counter() - started)
    return {name: batch / statistics.median(s) for name, s in seconds.items()}


def speed(results: dict, given: argparse.Namespace) -> None:
    for shape in ((1, 28, 28), (3, 32, 32)):
        there = peers(shape[0], shape[1])
        networks = {name: network for name, network in there.items() if network is not None}
        for bf16 in (False, True):
            key = f"{shape[1]}x{shape[2]} {'bf16' if bf16 else 'fp32'}"
            if key not in results["speed"]:
                measured = images_per_second(networks, shape, bf16, 1 if given.quick else 9)
                counts = {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}
                missing = [name for name, network in there.items() if network is None]
                measured = {"rates": measured, "parameters": counts, "missing": missing}
                results["speed"][key] = measured | {"threads": torch.get_num_threads()}
                save(results, given)


def speed_table(results: dict) -> str:
    rows = [
        {"images": key, **{name: round(rate, 1) for name, rate in cell["rates"].items()}, "threads": cell["threads"]}
        for key, cell in results["speed"].items()
    ]
    missing = {name for cell in results["speed"].values() for name in cell["missing"]}
    return format_table(rows) + (f"\nnot installed, so not measured: {', '.join(sorted(missing))}" if missing else "")


# ------------------------------------------------------------------ main

PARTS = {"methods": (methods, methods_table), "phase1": (phase1, phase1_table), "speed": (speed, speed_table)}


def save(results: dict, given: argparse.Namespace) -> None:
    write_json(given.out, results)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8x8 digits and few samples: minutes")
    parser.add_argument("--data", default="data", help="folder with MNIST, as torchvision keeps it")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=None, help="training steps (1800; quick: 1200)")
    parser.add_argument("--n", type=int, default=None, help="samples per seed (10000; quick: 1497)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_images"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    given.steps = given.steps or (1200 if given.quick else 1800)
    given.n = given.n or (1497 if given.quick else 10_000)
    name = "images_quick.json" if given.quick else "images.json"
    given.out = given.out or ROOT / "benchmarks" / "results" / name
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results |= {"machine": machine, "date": str(date.today()), "gengrad": gengrad.__version__}
    for part in given.parts.split(","):
        measure, table = PARTS[part]
        results.setdefault(part, {})
        measure(results, given)
        save(results, given)
        print(f"\n{part}\n{table(results)}")


if __name__ == "__main__":
    main()
