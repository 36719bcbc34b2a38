"""Standardisation row by row, and what becomes of a whole file."""

import csv
import json

import pytest

from gengrad.cli import main
from gengrad.molecules.standard import Standard, standardise

CHANGED = {
    "OCC": ("CCO", []),
    "C1=CC=CC=C1": ("c1ccccc1", []),
    "[Na+].[O-]C(=O)c1ccccc1": ("O=C(O)c1ccccc1", ["fragments removed", "charges neutralised"]),
    "CC(=O)O.c1ccccc1CN.Cl": ("NCc1ccccc1", ["fragments removed"]),
    "[NH3+]CC(=O)[O-]": ("NCC(=O)O", ["charges neutralised"]),
    "C[N+](C)(C)C": ("C[N+](C)(C)C", []),
    "C[N+](=O)[O-]": ("C[N+](=O)[O-]", []),
    "[2H]C([2H])O": ("CO", ["isotopes removed"]),
    "[13CH4]": ("C", ["isotopes removed"]),
    "C[C@H](N)O": ("CC(N)O", ["stereo removed"]),
    "F/C=C/F": ("FC=CF", ["stereo removed"]),
}
REFUSED = {
    "": "empty",
    "  ": "empty",
    "hello": "not a SMILES",
    "C1CC": "not a SMILES",
    "CC(C)(C)(C)C": "Explicit valence for atom # 1 C, 5",
    "c1cccc1": "kekulize",
    "C*": "wildcard",
    "[H][H]": "no heavy atom",
    "[Na+].[Cl-]": "no carbon",
    "[Pt]CC": "element Pt",
    "C" * 101: "more than 100 heavy atoms",
    "C" * 100_000: "longer than 1000 characters",
}


@pytest.mark.parametrize("text", CHANGED)
def test_a_molecule_is_brought_to_one_form_and_the_changes_are_named(text):
    assert standardise("smiles", text, Standard()) == CHANGED[text]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_molecule_to_work_with_is_refused_with_the_reason(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        standardise("smiles", text, Standard())


def test_what_is_asked_to_stay_stays():
    keep = Standard(stereo=True, isotopes=True, charges=True, salts=True)
    for text in ("C[C@H](N)O", "[13CH4]", "NCC(=O)[O-]", "CO.CO"):
        assert standardise("smiles", text, keep) == (text, [])


def test_standardising_twice_changes_nothing_more():
    for text in CHANGED:
        once = standardise("smiles", text, Standard())[0]
        assert standardise("smiles", once, Standard()) == (once, [])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_of_a_file_is_kept_or_rejected_once_in_order_whatever_the_processes(tmp_path, capsys):
    texts = [*REFUSED, *CHANGED, "OCC", "CO[C@@H](C)O"]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "smiles"], *([f"m{i}", text] for i, text in enumerate(texts))])
    outs = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        assert (
            main(
                [
                    "molecules",
                    "prepare",
                    str(tmp_path / "a.csv"),
                    "--out",
                    str(out),
                    "--processes",
                    processes,
                    "--timeout",
                    "60",
                ]
            )
            == 0
        )
        outs.append([(out / name).read_bytes() for name in ("molecules.csv", "rejected.csv")])
    assert outs[0] == outs[1]
    kept, rejected = read(out / "molecules.csv"), read(out / "rejected.csv")
    numbers = [[int(row["row"]) for row in part] for part in (kept, rejected)]
    assert sorted(numbers[0] + numbers[1]) == list(range(2, len(texts) + 2)) and all(n == sorted(n) for n in numbers)
    duplicate = next(row for row in rejected if row["reason"].startswith("duplicate"))
    assert duplicate["reason"] == f"duplicate of row {2 + len(REFUSED)}" and duplicate["input"] == "OCC"
    assert all(row["id"] == f"m{int(row['row']) - 2}" for row in kept + rejected)
    assert len({row["smiles"] for row in kept}) == len(kept)
    summary = json.loads((out / "prepare.json").read_text())
    assert (summary["rows"], summary["kept"], summary["rejected"]) == (len(texts), len(kept), len(rejected))
    assert f"{len(kept)} molecules of {len(texts)} rows" in capsys.readouterr().out


def test_a_file_without_a_molecule_ends_with_code_2_after_saying_why_row_by_row(tmp_path, capsys):
    (tmp_path / "a.smi").write_text("hello\n\n")
    assert main(["molecules", "prepare", str(tmp_path / "a.smi"), "--out", str(tmp_path / "out")]) == 2
    assert "no molecule is left of 2 rows (not a SMILES: 1, empty: 1)" in capsys.readouterr().err
    assert [row["reason"] for row in read(tmp_path / "out" / "rejected.csv")] == ["not a SMILES", "empty"]
    assert not (tmp_path / "out" / "molecules.csv").exists()
