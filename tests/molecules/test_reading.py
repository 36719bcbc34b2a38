"""Every way in which a list of molecules comes: what is read, which number a row has, and what is refused."""

import bz2
import gzip
import lzma

import pytest

from gengrad.molecules.reading import read_molecules

TABLE = "id,smiles,x\na,CCO,1\nb,c1ccccc1,2\n"
BROKEN = "\n  broken\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\nnonsense\nM  END\n$$$$\n"


def methane(title: str) -> str:
    atom = "    0.0000    0.0000    0.0000 C   0  0\n"
    return f"{title}\n  gengrad\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n{atom}M  END\n> <x>\n1\n\n$$$$\n"


# file name -> bytes; each is a header and two molecules, or two molecules
SAME = {
    "a.csv": TABLE.encode(),
    "semicolons.csv": TABLE.replace(",", ";").encode(),
    "tabs.tsv": TABLE.replace(",", "\t").encode(),
    "bars.csv": TABLE.replace(",", "|").encode(),
    "bom.csv": b"\xef\xbb\xbf" + TABLE.encode(),
    "utf16.csv": TABLE.encode("utf-16"),
    "crlf.csv": TABLE.replace("\n", "\r\n").encode(),
    "old_mac.csv": TABLE.replace("\n", "\r").encode(),
    "latin1.csv": TABLE.replace("x", "prix é").encode("latin-1"),
    "no_end.csv": TABLE.rstrip().encode(),
    "upper.csv": TABLE.replace("smiles", "Canonical_SMILES").encode(),
    "quoted.csv": TABLE.replace("CCO", '"CCO"').encode(),
    "a.csv.gz": gzip.compress(TABLE.encode()),
    "a.csv.xz": lzma.compress(TABLE.encode()),
    "a.csv.bz2": bz2.compress(TABLE.encode()),
    "packed_and_called_csv.csv": gzip.compress(TABLE.encode()),
    "header.smi": b"SMILES name\nCCO a\nc1ccccc1\tb\n",
}


@pytest.mark.parametrize("name", SAME)
def test_a_table_is_read_whatever_its_delimiter_encoding_and_packing(name, tmp_path):
    (tmp_path / name).write_bytes(SAME[name])
    rows = read_molecules(tmp_path / name).rows
    assert [(row.number, row.name, row.text) for row in rows] == [(2, "a", "CCO"), (3, "b", "c1ccccc1")]


def test_a_list_keeps_its_empty_lines_as_rows_and_names_the_nameless_by_their_line(tmp_path):
    (tmp_path / "a.smi").write_text("CCO first one\n\nC\n")
    rows = read_molecules(tmp_path / "a.smi").rows
    assert [(r.number, r.name, r.text) for r in rows] == [(1, "first one", "CCO"), (2, "2", ""), (3, "3", "C")]


def test_a_list_of_carbons_only_is_not_taken_for_a_header(tmp_path):
    (tmp_path / "a.smi").write_text("C\nCC\n")
    assert [row.text for row in read_molecules(tmp_path / "a.smi").rows] == ["C", "CC"]


def test_the_records_of_an_sdf_are_counted_also_when_one_is_broken_or_the_last_has_no_end(tmp_path):
    (tmp_path / "a.sdf").write_text(methane("one") + BROKEN + methane("three").removesuffix("$$$$\n"))
    rows = read_molecules(tmp_path / "a.sdf").rows
    assert [(row.number, row.name) for row in rows] == [(1, "one"), (2, "2"), (3, "three")]
    assert {row.kind for row in rows} == {"molblock"}


def test_short_and_empty_rows_of_a_table_stay_and_a_record_over_two_lines_has_the_number_of_its_first(tmp_path):
    (tmp_path / "a.csv").write_text('note,smiles\nshort\n"two\nlines",CC\n,\nx,CCC\n')
    rows = read_molecules(tmp_path / "a.csv").rows
    assert [(r.number, r.text) for r in rows] == [(2, ""), (3, "CC"), (5, ""), (6, "CCC")]


def test_the_column_can_be_named(tmp_path):
    (tmp_path / "a.csv").write_text("smiles,parent\nC,CC\n")
    assert read_molecules(tmp_path / "a.csv", "parent").rows[0].text == "CC"


REFUSED = {
    "empty.csv": (b"", "empty"),
    "blank.smi": (b"\n \n", "empty"),
    "binary.smi": (b"\x00\x01\x02" * 50, "binary"),
    "truncated.csv.gz": (gzip.compress(TABLE.encode())[:-9], "truncated or damaged"),
    "odd_utf16.csv": (b"\xff\xfe" + b"a", "damaged"),
    "no_column.csv": (b"id,mol\n1,CC\n", "no SMILES column.*id, mol.*--column"),
    "open_quote.csv": (b'id,smiles\n1,CC\n2,"CCC\n3,CO\n', "line 3.*closed"),
    "molecules.xlsx": (b"x", "unknown ending"),
    "no_ending": (b"CC", "unknown ending"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(name, tmp_path):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_molecules(tmp_path / name)


def test_a_folder_a_missing_file_and_a_column_of_a_list_are_refused(tmp_path):
    (tmp_path / "a.smi").write_text("C\n")
    with pytest.raises(ValueError, match=r"is a folder; give one file, e\.g\. .*a\.smi"):
        read_molecules(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_molecules(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="has no columns"):
        read_molecules(tmp_path / "a.smi", "smiles")
