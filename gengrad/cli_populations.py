"""The commands of ``gengrad molecules`` for whole populations: baseline, optimize, evaluate, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from gengrad.cli_arguments import add_workers


def add_populations(commands, positive) -> None:
    """Adds them to the subparsers of ``gengrad molecules``."""
    search = commands.add_parser("baseline", help="random screening or a genetic algorithm at equal scorer calls")
    search.add_argument("method", help="random or graph-ga")
    _add_search(search)
    search.add_argument("--calls", type=int, required=True, metavar="N", help="different molecules scored, exactly")
    search.add_argument("--start", type=Path, default=None, metavar="FILE", help="molecules (default: the library)")
    search.add_argument("--population", type=positive, default=100, help="default 100")
    search.add_argument("--offspring", type=positive, default=100, help="of a generation (default 100)")
    search.set_defaults(command=baseline)

    improve = commands.add_parser("optimize", help="better molecules near given leads")
    improve.add_argument("leads", type=Path, help="a file of molecules")
    _add_search(improve)
    improve.add_argument("--similarity", type=float, default=0.4, help="Tanimoto to the lead, at least (default 0.4)")
    improve.add_argument("--calls", type=int, required=True, metavar="N", help="scorer calls for each lead")
    improve.add_argument(
        "--proposer",
        default="graph",
        help="graph (default), screen, or with settings: '{name: screen, path: shop.smi}', '{name: latent, run: RUN}'",
    )
    improve.add_argument("--keep-scaffold", action="store_true", help="only molecules of the lead's Murcko scaffold")
    improve.add_argument("--keep", type=positive, default=1, help="best molecules kept of each lead (default 1)")
    improve.set_defaults(command=optimize)

    judge = commands.add_parser("evaluate", help="metrics of a population against the one before")
    judge.add_argument("before", type=Path, help="a population's table, or any file of SMILES")
    judge.add_argument("after", type=Path)
    judge.add_argument("--training", type=Path, default=None, metavar="FILE", help="molecules that are not novel")
    judge.add_argument("--calls", type=Path, default=None, metavar="CSV", help="molecules in the order of their calls")
    judge.add_argument("--fcd", action="store_true", help="also the Frechet ChemNet distance, which needs fcd_torch")
    judge.add_argument("--fcd-at-any-size", action="store_true", help="also under 5,000 molecules, where it is biased")
    judge.add_argument("--seed", type=int, default=0, help="of the split for the FCD's floor")
    judge.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="default: metrics.json beside AFTER")
    add_workers(judge)
    judge.set_defaults(command=evaluate)

    show = commands.add_parser("report", help="one HTML file about the populations in a folder")
    show.add_argument("folder", type=Path, help="with population_before.csv and population_after.csv")
    show.add_argument("--out", type=Path, default=None, metavar="FILE.html", help="default: report.html in the folder")
    show.add_argument("--title", default=None)
    add_workers(show)
    show.set_defaults(command=report)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the same one again goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--column", default=None, help="the SMILES column of a table (default: a usual name)")
    add_workers(parser)


def _common(given) -> dict:
    return {key: getattr(given, key) for key in ("column", "seed", "processes", "timeout")}


def baseline(given) -> int:
    """``gengrad molecules baseline graph-ga --objective objective.yaml --calls 2000 --out FOLDER``"""
    from gengrad.molecules.searching import Search, run_baseline

    settings = Search(population=given.population, offspring=given.offspring)
    arguments = (given.method, given.objective, given.calls, given.out)
    found = run_baseline(*arguments, start=given.start, settings=settings, **_common(given))
    _say(found, given.out)
    return 0


def optimize(given) -> int:
    """``gengrad molecules optimize leads.smi --objective objective.yaml --similarity 0.4 --calls 100 --out FOLDER``"""
    import gengrad.latent.proposer  # noqa: F401 - registers the proposer of codes
    from gengrad.molecules.leads import LeadSearch, run_leads
    from gengrad.strict_yaml import parse_yaml

    named = given.proposer.lstrip().startswith("{")
    proposer = parse_yaml(given.proposer, "--proposer") if named else {"name": given.proposer}
    found = run_leads(
        given.leads,
        given.objective,
        given.similarity,
        given.calls,
        given.out,
        proposer=proposer,
        settings=LeadSearch(keep=given.keep, keep_scaffold=given.keep_scaffold),
        **_common(given),
    )
    refused = found["leads"] - found["valid_leads"]
    print(f"{found['valid_leads']} leads" + (f", {refused} rows of the file are no molecules" if refused else ""))
    print(f"  improved {found['success_rate']:.1%} of them, mean gain {found['mean_gain']:.3f}")
    _say(found, given.out, ["leads.csv"])
    return 0


def _say(found: dict, out: Path, more: list[str] | None = None) -> None:
    """The last step, the yield of the constraints and the files, on the terminal."""
    if found["resumed_after"]:
        print(f"  {found['resumed_after']:,} of the calls were made before and stand in calls.jsonl")
    last, spent = found["last_step"], found["yield"]
    print(f"{found['calls']:,} scorer calls ({found['ended']}), {found['seconds']:.1f} s")
    print("  " + ", ".join(f"{key.replace('_', ' ')} {last[key]:.4f}" for key in last if key.startswith("top_")))
    print(f"  AUC top 10 {last['auc_top_10']:.4f}, diversity of the top 100 {last['diversity_top_100']:.3f}")
    parts = [f"{count:,} {key.replace('_', ' ')}" for key, count in spent.items() if key != "refused"]
    print("  " + ", ".join(parts))
    for name, count in spent["refused"].items():
        print(f"  filter {name}: {count:,} refused")
    if not spent["passed"]:
        print("  no molecule passes; the notes in calls.csv say why")
    files = ["population_before.csv", "population_after.csv", *(more or []), "calls.csv", "steps.csv", "run.json"]
    print(f"written: {', '.join(str(out / name) if i == 0 else name for i, name in enumerate(files))}")


def evaluate(given) -> int:
    """``gengrad molecules evaluate before.csv after.csv [--training FILE]``"""
    from gengrad.files import writable
    from gengrad.molecules.evaluating import evaluate_files, lines

    out = writable(given.out or given.after.parent / "metrics.json", (".json",))
    found = evaluate_files(
        given.before,
        given.after,
        out,
        training=given.training,
        calls=given.calls,
        fcd=given.fcd or given.fcd_at_any_size,
        any_size=given.fcd_at_any_size,
        seed=given.seed,
        processes=given.processes,
        timeout=given.timeout,
    )
    print("\n".join(lines(found)))
    print(f"written: {out}")
    return 0


def report(given) -> int:
    """``gengrad molecules report FOLDER``"""
    from gengrad.files import writable
    from gengrad.molecules.report import write_report

    if not given.folder.is_dir():
        raise ValueError(f"no folder {given.folder}: give the one that holds population_before.csv and _after.csv")
    out = writable(given.out or given.folder / "report.html", (".html",))
    found = write_report(given.folder, out, title=given.title, processes=given.processes, timeout=given.timeout)
    for name, why in found["missing"].items():
        print(f"  {name} is not there: {why}")
    print(f"written: {out} ({out.stat().st_size / 1e6:.2f} MB)")
    return 0
