"""Prompts from a file: plain text, JSON lines, CSV or parquet.

    prompts.txt       one a line
    prompts.jsonl     a string a line, or an object with "prompt", "caption" or "text"
    prompts.csv       a header with one of these columns
    prompts.parquet   likewise; needs pyarrow

Lines end with LF, CR LF or CR. Empty ones are left out, control characters removed; what is not
UTF-8, or too large to be a prompt, is refused with its line, and so is what would lose a part of
a prompt: a key or a column that is there twice, a row of more fields than the header.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from fewstep.storage.bounded_reading import in_words, json_value, regular, size_of

COLUMNS = ("prompt", "caption", "text")
"""Where a prompt is looked for, in this order."""
MAX_BYTES = 2 << 30
"""Size of a file."""
MAX_LENGTH = 10_000
"""Characters of a prompt; encoders use a few hundred words of it at most."""
MAX_PROMPTS = 20_000_000
MAX_LINE = 16 << 20
"""Bytes of a line, which may hold more than a prompt."""
VALUES = 100_000
"""Values in a line of JSON."""
CHUNK = 1 << 20

Numbered = Iterator[tuple[int, str]]
_SPACE = re.compile(r"[\t\n\v\f\r]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BREAK = re.compile(rb"\r\n|\n|\r")


def read_prompts(path: Path | str) -> list[str]:
    """The prompts in a file, in order; duplicates stay.

    Arguments:
        path: a .txt, .jsonl, .csv or .parquet file, as the module describes; parquet needs
            pyarrow.
    Returns prompts without control characters; empty ones are left out.
    Raises ValueError, with the line where there is one, for a missing, too large or damaged file,
    and for one without a prompt.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: prompts are read from {', '.join(_READERS)} files")
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if size_of(path) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES >> 30} GiB; split it")
    prompts: list[str] = []
    for line, text in _READERS[path.suffix](path):
        if prompt := cleaned(text, path, line):
            prompts.append(prompt)
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{path} holds more than {MAX_PROMPTS} prompts; split it")
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def cleaned(text: str, path: Path, line: int) -> str:
    """A prompt without control characters; ValueError where it is too long, or no text."""
    prompt = _CONTROL.sub("", _SPACE.sub(" ", text)).strip()
    if len(prompt) > MAX_LENGTH:
        raise ValueError(
            f"{path}, line {line}: a prompt of {len(prompt)} characters; the longest may "
            f"have {MAX_LENGTH}"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{path}, line {line} holds half a character; it is not text")
    return prompt


def _lines(path: Path) -> Numbered:
    """The lines of a UTF-8 file, from 1, without their ends or a byte order mark."""
    for number, raw in enumerate(_split(path), 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not UTF-8 (byte {error.start + 1}); convert it"
            ) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _split(path: Path) -> Iterator[bytes]:
    """The lines of a file, read in parts: a line is at most `MAX_LINE` long."""
    rest, cut = b"", False
    with regular(path) as file:
        while part := file.read(CHUNK):
            # CR LF may lie across two parts
            part, cut = part[1:] if cut and part[:1] == b"\n" else part, part.endswith(b"\r")
            *lines, rest = _BREAK.split(rest + part)
            yield from lines
            if len(rest) > MAX_LINE:
                raise ValueError(f"{path} has a line of more than {in_words(MAX_LINE)}")
    if rest:
        yield rest


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values in a file of JSON lines, with the numbers of their lines."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield number, json_value(line, VALUES)
        except JSONDecodeError:
            raise ValueError(f"{path}, line {number} is not JSON") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON to be read: {error}") from None


def _jsonl(path: Path) -> Numbered:
    for number, value in json_lines(path):
        yield number, value if isinstance(value, str) else text_of(value, path, number)


def _csv(path: Path) -> Numbered:
    rows = csv.DictReader((f"{line}\n" for _, line in _lines(path)), strict=True)
    try:
        counts = Counter(rows.fieldnames or ())
        for name in COLUMNS:
            if counts[name] > 1:
                raise ValueError(f"{path} has {counts[name]} columns {name!r}; keep one")
        for row in rows:
            if None in row:
                raise ValueError(
                    f"{path}, line {rows.line_num} has more fields than the header; quote a text "
                    "that has commas"
                )
            yield rows.line_num, text_of(row, path, rows.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num} is not CSV ({error})") from None


def _parquet(path: Path) -> Numbered:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in COLUMNS if name in names), "")
        number = 0
        for batch in file.iter_batches(columns=[column] if column else None):
            for row in batch.to_pylist():
                number += 1
                yield number, text_of(row, path, number)
    except OSError as error:  # which pyarrow's own errors are
        raise ValueError(f"{path} is not a parquet file ({error})") from None


def text_of(row: Any, path: Path, line: int) -> str:
    """The prompt in a row."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{path}, line {line}: expected a text or an object with {COLUMNS[0]!r}")
    for name in COLUMNS:
        if isinstance(row.get(name), str):
            return str(row[name])
    columns = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f"{path}, line {line} has none of {', '.join(COLUMNS)}; it has {columns}")


_READERS: Mapping[str, Callable[[Path], Iterable[tuple[int, str]]]] = {
    ".txt": _lines,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
