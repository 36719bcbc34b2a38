"""Reading molecules: SMILES lists, tables and SDF, compressed or not; every row keeps its number."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

SMILES_COLUMNS = ("smiles", "canonical_smiles", "isomeric_smiles", "structure")  # in any case, the first one found
NAME_COLUMNS = ("id", "name", "title", "zinc_id", "chembl_id", "molecule_id", "compound_id")
ENDINGS = {
    ".smi": "list",
    ".smiles": "list",
    ".txt": "list",
    ".ism": "list",
    ".csv": "table",
    ".tsv": "table",
    ".tab": "table",
    ".sdf": "sdf",
    ".sd": "sdf",
}
DELIMITERS = ",;\t|"
UNPACK = {b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ": lzma.decompress, b"BZh": bz2.decompress}
PACKED = (".gz", ".xz", ".bz2")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Row:
    """One molecule as the file has it. ``number``: its line or its record in an SDF; ``kind`` as in standard."""

    number: int
    name: str
    text: str
    kind: str = "smiles"

    @property
    def shown(self) -> str:
        """What stands for the row in a table: the SMILES, or the title of an SDF record; at most 500 characters."""
        text = self.name if self.kind == "molblock" else self.text
        return text if len(text) <= 500 else f"{text[:497]}..."


@dataclass(frozen=True)
class Contents:
    """The rows of a file in its order, its ``encoding``, and for tables the ``column`` and ``delimiter`` taken."""

    rows: list[Row]
    encoding: str
    column: str | None = None
    delimiter: str | None = None


def read_molecules(path: str | Path, column: str | None = None) -> Contents:
    """Every row of a .smi, .csv, .tsv, .txt or .sdf file, packed by gzip, xz or bzip2 or not.

    A list has ``SMILES name`` on each line, a table a header with a SMILES column (``column``, or a usual name). Bytes
    that are not UTF-8 are read as Latin-1. Raises ``OSError``, or ``ValueError`` when no molecule can be found in it.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if _form(p))[:5]
        raise ValueError(f"{path} is a folder; give one file" + (f", e.g. {path / inside[0]}" if inside else ""))
    if not path.exists():
        raise FileNotFoundError(f"no molecule file at {str(path)!r} (looked in {Path.cwd()})")
    form = _form(path)
    if form is None:
        raise ValueError(f"{path}: unknown ending; allowed are {', '.join(ENDINGS)}, also with {', '.join(PACKED)}")
    text, encoding = _decoded(_unpacked(path.read_bytes(), path), path)
    if not text.strip():
        raise ValueError(f"{path} is empty: no molecule to read")
    if column is not None and form != "table":
        raise ValueError(f"--column {column} is for tables (.csv, .tsv); {path.name} has no columns")
    if form == "sdf":
        return Contents(_records(text), encoding)
    if form == "list":
        return Contents(_lines(text), encoding)
    return _table(text, encoding, path, column)


def _form(path: Path) -> str | None:
    endings = [ending.lower() for ending in path.suffixes if ending.lower() not in PACKED]
    return ENDINGS.get(endings[-1]) if endings else None


def _unpacked(data: bytes, path: Path) -> bytes:
    for mark, unpack in UNPACK.items():
        if data.startswith(mark):
            try:
                return unpack(data)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path} is truncated or damaged: {error}. Fetch or pack it again.") from None
    return data


def _decoded(data: bytes, path: Path) -> tuple[str, str]:
    """Text and encoding; line ends become plain newlines."""
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if marked is None and b"\0" in data[:4096]:
        raise ValueError(f"{path} is a binary file, not a list of molecules")
    for encoding in [marked] if marked else ["utf-8", "latin-1"]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text.replace("\r\n", "\n").replace("\r", "\n"), encoding
    raise ValueError(f"{path} starts as {marked} text and does not go on so: it is damaged. Save it again as UTF-8.")


def _lines(text: str) -> list[Row]:
    """``SMILES name`` on each line; a first line ``smiles ...`` is a header. Empty lines stay, as rows."""
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        first, _, rest = line.strip().replace("\t", " ").partition(" ")
        if number == 1 and first.lower().rstrip(",;") in SMILES_COLUMNS:
            continue
        rows.append(Row(number, rest.strip() or str(number), first))
    return rows


def _records(text: str) -> list[Row]:
    """The records of an SDF, each up to its line ``$$$$``; the last one may lack it."""
    rows, record = [], []
    for line in text.split("\n"):
        if line.startswith("$$$$"):
            rows.append(_record(len(rows) + 1, record))
            record = []
        else:
            record.append(line)
    if any(line.strip() for line in record):
        rows.append(_record(len(rows) + 1, record))
    return rows


def _record(number: int, lines: list[str]) -> Row:
    title = lines[0].strip() if lines else ""
    return Row(number, title or str(number), "\n".join(lines), "molblock")


def _table(text: str, encoding: str, path: Path, column: str | None) -> Contents:
    """The rows of a table; the delimiter is the one that finds the SMILES column in its header."""
    header = text.lstrip("\n").partition("\n")[0]
    tries = {mark: _fields(header, mark) for mark in DELIMITERS}
    found = {mark: _position(fields, column) for mark, fields in tries.items()}
    fitting = [mark for mark in DELIMITERS if found[mark] is not None]
    if not fitting:
        best = max(tries.values(), key=len)
        wanted = f"no column {column!r}" if column else f"no SMILES column (looked for {', '.join(SMILES_COLUMNS)})"
        raise ValueError(
            f"{path}: {wanted}. Its first line has: {', '.join(best)}. Name the column with --column, "
            "or call a list without a header .smi"
        )
    mark = max(fitting, key=lambda mark: len(tries[mark]))  # ties: the first of them, a table of one column has any
    place = found[mark]
    names = [name.lower() for name in tries[mark]]
    named = next((names.index(name) for name in NAME_COLUMNS if name in names and names.index(name) != place), None)
    reader = csv.reader(io.StringIO(text), delimiter=mark, strict=True)
    rows, start = [], 1
    try:
        for fields in reader:
            number, start = start, reader.line_num + 1
            if number == 1 or (not rows and [f.strip() for f in fields] == tries[mark]):
                continue
            value = fields[place].strip() if place < len(fields) else ""
            name = fields[named].strip() if named is not None and named < len(fields) else ""
            rows.append(Row(number, name or str(number), value))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {start}: {error}. A quotation mark that is opened and not closed hides the "
            "rows after it: close or remove it."
        ) from None
    return Contents(rows, encoding, tries[mark][place], mark)


def _fields(line: str, mark: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=mark), [])]


def _position(fields: list[str], column: str | None) -> int | None:
    """The place of the named column, or of the first usual one."""
    if column is not None:
        return fields.index(column) if column in fields else None
    lowered = [field.lower() for field in fields]
    return next((lowered.index(name) for name in SMILES_COLUMNS if name in lowered), None)
