"""The commands of ``gengrad molecules`` for files: library, prepare, score; ``cli_populations`` has the others."""

from __future__ import annotations

import argparse
from pathlib import Path

from gengrad.cli_arguments import add_workers
from gengrad.cli_latent import add_latent
from gengrad.cli_populations import add_populations


def add_molecules(parser: argparse.ArgumentParser, positive) -> None:
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=type(parser))
    enumerate_ = commands.add_parser("library", help="write the enumerated library, which needs no download")
    enumerate_.add_argument("--n", type=positive, default=20_000, help="how many molecules (default 20000)")
    enumerate_.add_argument("--seed", type=int, default=0)
    enumerate_.add_argument("--out", type=Path, required=True, metavar="FILE.smi")
    enumerate_.set_defaults(command=library)

    clean = commands.add_parser("prepare", help="standardise a file; every row that is not kept gets its reason")
    _add_file(clean)
    clean.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="molecules.csv, rejected.csv and prepare.json go there",
    )
    for what, said in (
        ("stereo", "stereochemistry"),
        ("isotopes", "isotope labels"),
        ("charges", "charges"),
        ("salts", "all fragments"),
    ):
        clean.add_argument(f"--keep-{what}", action="store_true", help=f"keep {said}")
    clean.add_argument("--max-atoms", type=positive, default=100, help="heavy atoms (default 100)")
    clean.set_defaults(command=prepare)

    judge = commands.add_parser("score", help="score a file by an objective, one line out for each row")
    _add_file(judge)
    judge.add_argument("--objective", type=Path, required=True, metavar="FILE.yaml")
    judge.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    judge.set_defaults(command=score)
    add_populations(commands, positive)
    add_latent(commands, positive)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=".smi, .csv, .tsv, .txt or .sdf, also .gz, .xz, .bz2")
    parser.add_argument("--column", default=None, help="the SMILES column of a table (default: a usual name)")
    add_workers(parser)


def library(given) -> int:
    """``gengrad molecules library --out library.smi``"""
    from gengrad.files import writable, write_atomically
    from gengrad.molecules.library import library as enumerate_library

    writable(given.out, (".smi",))
    smiles = enumerate_library(given.n, given.seed)
    write_atomically(given.out, "".join(f"{text} {i}\n" for i, text in enumerate(smiles, 1)).encode())
    print(f"{len(smiles):,} molecules\nwritten: {given.out}")
    return 0


def prepare(given) -> int:
    """``gengrad molecules prepare FILE --out FOLDER``"""
    from gengrad.molecules.prepare import prepare_file
    from gengrad.molecules.standard import Standard

    kept = {what: getattr(given, f"keep_{what}") for what in ("stereo", "isotopes", "charges", "salts")}
    found = prepare_file(
        given.file,
        given.out,
        column=given.column,
        processes=given.processes,
        timeout=given.timeout,
        settings=Standard(max_atoms=given.max_atoms, **kept),
    )
    print(f"{found['kept']:,} molecules of {found['rows']:,} rows, {found['rejected']:,} rejected")
    for reason, count in [*found["reasons"].items()][:10]:
        print(f"  {count:8,} {reason}")
    if found["encoding"] == "latin-1":
        print("  the file is not UTF-8; it was read as Latin-1")
    print(f"written: {given.out / 'molecules.csv'}, rejected.csv, prepare.json")
    return 0


def score(given) -> int:
    """``gengrad molecules score FILE --objective objective.yaml --out scores.csv``"""
    from gengrad.files import writable
    from gengrad.molecules.objective import load_objective
    from gengrad.molecules.scoring import score_file

    writable(given.out, (".csv",))
    objective = load_objective(given.objective)
    found = score_file(
        given.file, objective, given.out, column=given.column, processes=given.processes, timeout=given.timeout
    )
    print(f"{found['rows']:,} rows, {found['valid']:,} valid, {found['calls']:,} scored, {found['passed']:,} pass")
    for label, median in found["median"].items():
        missing = found["without_value"][label]
        print(f"  {label}: median {median:.4g}" + (f", {missing:,} without a value" if missing else ""))
    for name, count in found["refused"].items():
        print(f"  filter {name}: {count:,} refused")
    if not found["passed"]:
        print("  no molecule passes; the notes in the table say why")
    print(f"written: {given.out}")
    return 0
