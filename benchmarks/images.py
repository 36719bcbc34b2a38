"""NSGF++ against flow matching and OT flow matching on small images; what its first phase is; the UNet's throughput.

    python benchmarks/images.py [--quick] [--data ROOT] [--parts methods,phase1,coupling,speed,precision]
        [--methods nsgf_pp,flow_matching] [--seeds 3] [--steps 3000] [--runs FOLDER] [--out FILE]

methods: the same UNet, number of images seen and draws for all; Frechet distance of classifier features (FD-classifier,
which is no FID) on 10,000 samples against the 10,000 test images at each NFE, three sampling seeds, beside the floor
(training against test images). phase1: per epsilon and OT batch in pixel space, what the Sinkhorn plan looks like and
how far the re-solved flow strays from a straight line. coupling: how much a plan tells of the image, in pixels and in
principal components. precision: the loss in fp32 and in bf16. speed: images a second of a training step, beside
torchcfm's UNet and diffusers' where they are installed. ROOT holds MNIST as torchvision keeps it; --quick uses the
embedded 8x8 digits. Cells that the JSON holds are not computed again, and a run that was cut goes on from its
checkpoint; two processes with different --methods may share one JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch
import yaml
from torch import nn

import gengrad
from gengrad import plotting
from gengrad.config import RunConfig, read_config
from gengrad.data.base import FiniteData
from gengrad.data.draws import generator_for
from gengrad.data.images import as_bytes
from gengrad.evaluation.features import ClassifierFeatures
from gengrad.evaluation.fid import Statistics, frechet_distance, reference_statistics
from gengrad.evaluation.report import format_table
from gengrad.evaluation.shards import Shards
from gengrad.files import write_json
from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
from gengrad.functionals import SinkhornDivergence
from gengrad.networks import UNet
from gengrad.ot import exact_assignment, principal_components, sinkhorn_velocity
from gengrad.registry import DATASETS
from gengrad.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
NFES = (1, 2, 5, 10, 20, 60)
METHODS = {
    "nsgf_pp": {"shared_network": False},
    "nsgf_pp_shared": {"shared_network": True},
    "flow_matching": {"name": "flow_matching", "coupling": "independent"},
    "ot_flow_matching": {"name": "flow_matching", "coupling": "minibatch_ot"},
    # not by default: straight lines between the pairs of NSGF++'s own plans, all the way. It says what the plans are
    # worth without the phases
    "nsgf": {
        "name": "nsgf",
        "pool": "geodesic",
        "target": "match",
        "epsilon_rel": 0.01,
        "tol": 0.1,
        "ot_batch": 2048,
        "uses": 2,
        "ot_dims": 10,
    },
}
TITLES = {
    "nsgf_pp": "NSGF++, two networks",
    "nsgf_pp_shared": "NSGF++, shared network",
    "flow_matching": "flow matching",
    "ot_flow_matching": "OT flow matching",
    "nsgf": "OT flow matching with the plans of NSGF++",
}
DEFAULT = ("nsgf_pp", "nsgf_pp_shared", "flow_matching", "ot_flow_matching")
EPSILONS = (0.002, 0.01, 0.05, 0.2)
BATCHES = (128, 512, 2048)
BATCHES_COUPLED = {128: 60, 1024: 8, 2048: 6}  # OT batch: how many
DIMS = (3, 5, 8, 12, 20)


# ------------------------------------------------------------------ methods


def config_of(method: str, given: argparse.Namespace) -> RunConfig:
    """The shipped NSGF++ config with the method in its place: network, images and training are the same."""
    name = "digits" if given.quick else "mnist"
    raw = yaml.safe_load((ROOT / "configs" / "images" / f"{name}_nsgf_pp.yaml").read_text())
    change = METHODS[method]
    raw["method"] = change if "name" in change else raw["method"] | change
    raw["train"] |= {"steps": given.steps, "warmup": min(raw["train"]["warmup"], given.steps // 10)}
    raw["train"].pop("preview_every", None)  # its pictures come at the end
    if not given.quick:
        raw["data"]["root"] = given.data
    raw |= {"out": str(given.runs / f"{name}-{method}-{given.steps}"), "device": given.device}
    return read_config(raw)


def train(config: RunConfig) -> dict:
    """Trains the run, or goes on with it; CPU-seconds of its steps, of them on transport problems, and images seen."""
    outcome = gengrad.train(config, quiet=True)
    if not outcome.finished:
        raise SystemExit("interrupted; the same command goes on")
    rows = read_metrics(config.general.out)
    return {
        **{key: sum(row.get(key, 0.0) for row in rows) for key in ("cpu_seconds", "ot_seconds")},
        "images": config.train.steps * config.train.batch_size,
        "config": config.digest(),
    }


def judge(config: RunConfig, target: FiniteData, nfe: int, seed: int, n: int) -> dict:
    """FD-classifier of ``n`` samples at one NFE and seed against the test images; shards go on where they were."""
    flow, extract = gengrad.load(config.general.out), ClassifierFeatures(target)
    truth = reference_statistics(as_bytes(target.held_out), extract)
    shards = Shards(flow, Path(config.general.out) / "samples" / f"{nfe}-{seed}-{n}", n, nfe=nfe, seed=seed)
    shards.draw()
    shards.extract(extract)
    found = {"FD-classifier": frechet_distance(Statistics.of(shards.features(extract)), truth), **shards.bill, "n": n}
    shards.remove()
    return found


def floor_of(target: FiniteData, n: int) -> float:
    """FD-classifier of ``n`` training images against the test images."""
    extract = ClassifierFeatures(target)
    rows = torch.randperm(len(target.points), generator=generator_for(0, "image floor"))[:n].sort().values
    some = reference_statistics(as_bytes(target.points[rows]), extract)
    return frechet_distance(some, reference_statistics(as_bytes(target.held_out), extract))


def order(given: argparse.Namespace) -> list[tuple[int, int]]:
    """(NFE, seed): few evaluations first, the many last, so that a benchmark cut short has the table's left part."""
    return [(nfe, seed) for nfe in sorted(NFES) for seed in range(given.seeds)]


def methods(results: dict, given: argparse.Namespace) -> None:
    target = DATASETS.build(config_of("flow_matching", given).data)
    for method in given.methods:
        config = config_of(method, given)
        cells = results["methods"].setdefault(method, {"cells": {}})
        if cells.get("config", config.digest()) != config.digest():
            cells = results["methods"][method] = {"cells": {}}  # measured under another config
        if "config" not in cells:
            cells |= train(config)
            save(results, given)
        if "floor" not in cells:
            cells["floor"] = floor_of(target, given.n)
    for nfe, seed in order(given):
        for method in given.methods:
            cells = results["methods"][method]["cells"]
            if f"{nfe}/{seed}" not in cells:
                cells[f"{nfe}/{seed}"] = judge(config_of(method, given), target, nfe, seed, given.n)
                save(results, given)
    ready = [method for method in METHODS if (Path(config_of(method, given).general.out) / "flow.json").exists()]
    flows = {TITLES[method]: gengrad.load(config_of(method, given).general.out) for method in ready}
    given.pictures.mkdir(parents=True, exist_ok=True)
    for nfe in (5, 10):
        grids = {title: flow.sample(36, nfe, seed=0) for title, flow in flows.items()}
        plotting.save(plotting.side_by_side(grids), given.pictures / f"images_nfe{nfe}{'_quick' * given.quick}.png")


def methods_table(results: dict) -> str:
    """Mean and standard deviation over sampling seeds; the number of seeds where there are fewer than the most."""
    most = max((len(scores_at(cells, nfe)) for cells in results["methods"].values() for nfe in NFES), default=0)
    rows = []
    for method, cells in results["methods"].items():
        row = {"FD-classifier": TITLES[method]}
        for nfe in NFES:
            scores = scores_at(cells, nfe)
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            seeds = f" ({len(scores)} of {most} seeds)" if len(scores) < most else ""
            row[f"NFE {nfe}"] = f"{statistics.mean(scores):.2f}{spread}{seeds}" if scores else ""
        row |= {"floor": f"{cells['floor']:.2f}", "images": f"{cells['images']:,}"}
        rows.append(row | {"CPU s": round(cells["cpu_seconds"]), "of them OT": round(cells["ot_seconds"])})
    return format_table(rows)


def scores_at(cells: dict, nfe: int) -> list[float]:
    return [cell["FD-classifier"] for key, cell in cells["cells"].items() if key.split("/")[0] == str(nfe)]


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
    target = DATASETS.build(config_of("flow_matching", given).data)
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


# ------------------------------------------------------------------ coupling


def explained(points: torch.Tensor, n: int, basis: torch.Tensor | None, batches: int) -> dict:
    """Share of the variance of images (N, d) that is linear in the noise, matched in batches of ``n``; seconds a batch.

    |C|^2 / tr cov(points), C = cov(noise, image): the product of two independent estimates of C, so without bias.
    """
    generator, halves, seconds = generator_for(0, "coupling", n), [0.0, 0.0], 0.0
    for number in range(batches):
        y = points[torch.randperm(len(points), generator=generator)[:n]]
        x = torch.randn(y.shape, generator=generator)
        started = time.perf_counter()
        a, b = (x, y) if basis is None else (x @ basis, y @ basis)
        potential = sinkhorn_velocity(a, b, epsilon_rel=0.01, tol=0.1, debias=False).g
        matched = y[exact_assignment(a, b, potential)]
        seconds += time.perf_counter() - started
        halves[number % 2] = halves[number % 2] + x.T @ matched / (len(y) * batches / 2)
    return {"explained": float((halves[0] * halves[1]).sum() / points.var(0).sum()), "seconds": seconds / batches}


def coupling(results: dict, given: argparse.Namespace) -> None:
    points = DATASETS.build(config_of("flow_matching", given).data).points.flatten(1)
    points = points - points.mean(0)
    basis = principal_components(points[:4096], max(DIMS), generator_for(0, "coupling components"))
    for n, batches in BATCHES_COUPLED.items():
        for dims in (None, *DIMS):
            key = f"{n}/{dims or 'all'}"
            if key not in results["coupling"]:
                seen = None if dims is None else basis[:, :dims]
                results["coupling"][key] = explained(points, n, seen, 2 if given.quick else batches)
                save(results, given)


def coupling_table(results: dict) -> str:
    rows = []
    for n in BATCHES_COUPLED:
        cells = {dims: results["coupling"][f"{n}/{dims or 'all'}"] for dims in (None, *DIMS)}
        shares = {f"{dims} components" if dims else "all": f"{c['explained']:.2f}" for dims, c in cells.items()}
        rows.append({"OT batch": n, **shares, "s: all": cells[None]["seconds"], "s: 8": cells[8]["seconds"]})
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
    """UNets of the same number of parameters, with maps and attention of the same sizes; None where not installed.

    All have 32, 64 and 64 channels, one residual block a level (two on the way up) with time as a scale and a shift,
    and one attention, in the middle.
    """
    ours = {"event_shape": (channels, size, size), "channels": 32, "multipliers": [1, 2, 2]}
    found: dict = {"gengrad": UNet(**ours), "gengrad, channels_last": UNet(**ours, channels_last=True)}
    try:
        from torchcfm.models.unet import UNetModel

        settings = {"channel_mult": [1, 2, 2], "attention_resolutions": "1", "use_scale_shift_norm": True}
        network = UNetModel(dim=(channels, size, size), num_channels=32, num_res_blocks=1, **settings)
        found["torchcfm"] = Peer(network, lambda unet, x, t: unet(t, x))
    except ImportError:
        found["torchcfm"] = None
    try:
        from diffusers import UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
        settings = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, **blocks}
        settings["resnet_time_scale_shift"] = "scale_shift"
        network = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **settings)
        found["diffusers"] = Peer(network, lambda unet, x, t: unet(x, t).sample)
    except ImportError:
        found["diffusers"] = None
    for name in ("torchcfm", "diffusers"):
        if found[name] is not None:  # the same layout for them, for comparison at their best
            last = copy.deepcopy(found[name]).to(memory_format=torch.channels_last)
            found[f"{name}, channels_last"] = ChannelsLast(last)
    return found


class ChannelsLast(nn.Module):
    """A network that is handed its images in channels_last layout."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last), t)


def images_per_second(networks: dict, shape: tuple, bf16: bool, steps: int, batch: int = 64) -> dict[str, float]:
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
                measured = images_per_second(networks, shape, bf16, 1 if given.quick else (3 if bf16 else 7))
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


# ------------------------------------------------------------------ precision


def precision(results: dict, given: argparse.Namespace) -> None:
    """The same short training in fp32 and in bf16: the loss at each step, and images a second."""
    rows = []
    for name, value in (("fp32", "no"), ("bf16", "bf16")):
        config = config_of("flow_matching", given).resolved()
        config["train"] |= {"steps": given.short, "precision": value, "log_every": 1, "warmup": given.short // 10}
        config["train"]["checkpoint_every"] = given.short
        run = read_config(config | {"out": str(given.runs / f"precision-{name}-{given.short}")})
        if name not in results["precision"]:
            outcome = gengrad.train(run, quiet=True)
            losses = [row["loss"] for row in read_metrics(run.general.out)]
            rate = given.short * run.train.batch_size / outcome.cpu_seconds
            results["precision"][name] = {"losses": losses, "images a CPU-second": rate, "steps": given.short}
            save(results, given)
        losses = results["precision"][name]["losses"]
        rows += [{"stage": name, "step": k + 1, "loss": loss} for k, loss in enumerate(losses)]
    given.pictures.mkdir(parents=True, exist_ok=True)
    plotting.save(plotting.loss_curve(rows, overlay=True), given.pictures / f"images_bf16{'_quick' * given.quick}.png")


def precision_table(results: dict) -> str:
    rows = []
    for name, cell in results["precision"].items():
        last = cell["losses"][-max(1, len(cell["losses"]) // 5) :]
        rate = round(cell["images a CPU-second"])
        rows.append(
            {
                "precision": name,
                "steps": cell["steps"],
                "images a CPU-second": rate,
                "mean loss of the last fifth": f"{statistics.mean(last):.4f}",
            }
        )
    return format_table(rows)


# ------------------------------------------------------------------ main

PARTS = {
    "methods": (methods, methods_table),
    "phase1": (phase1, phase1_table),
    "coupling": (coupling, coupling_table),
    "speed": (speed, speed_table),
    "precision": (precision, precision_table),
}


def save(results: dict, given: argparse.Namespace) -> None:
    """Writes the JSON; what another process has written of other methods and parts meanwhile stays."""
    there = json.loads(given.out.read_text()) if given.out.exists() else {}
    for part in PARTS:
        if part not in given.parts:
            results |= {part: there[part]} if part in there else {}
        elif part == "methods":
            others = {m: cells for m, cells in there.get(part, {}).items() if m not in given.methods}
            results[part] = {**others, **{m: c for m, c in results.get(part, {}).items() if m in given.methods}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, results)


def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names of a comma-separated list; leaves the program where one is unknown."""
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: unknown {', '.join(map(repr, wrong))}; known: {', '.join(known)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8x8 digits and few samples: minutes")
    parser.add_argument("--data", default="data", help="folder with MNIST, as torchvision keeps it")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", default=",".join(DEFAULT), help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the config's)")
    parser.add_argument("--short", type=int, default=200, help="steps of the trainings in fp32 and bf16")
    parser.add_argument("--n", type=int, default=None, help="samples per seed (10000; quick: 1497)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_images"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    given.parts = chosen(given.parts, PARTS, "parts")
    given.methods = chosen(given.methods, METHODS, "methods")
    shipped = ROOT / "configs" / "images" / f"{'digits' if given.quick else 'mnist'}_nsgf_pp.yaml"
    given.steps = given.steps or yaml.safe_load(shipped.read_text())["train"]["steps"]
    given.n = given.n or (1497 if given.quick else 10_000)
    name = "images_quick.json" if given.quick else "images.json"
    given.out = given.out or ROOT / "benchmarks" / "results" / name
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results |= {"machine": machine, "date": str(date.today()), "gengrad": gengrad.__version__}
    for part in given.parts:
        measure, table = PARTS[part]
        results.setdefault(part, {})
        measure(results, given)
        save(results, given)
        print(f"\n{part}\n{table(results)}")


if __name__ == "__main__":
    main()
