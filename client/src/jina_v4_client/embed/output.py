"""The output: the vectors of the journal in the order of the input, as one file, or as lines of JSON as they come.

The same journal gives the same bytes: where a row group of a parquet file ends depends only on the rows in it, and no
time is written.
"""

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.embed import check_installed
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.folder import LeftOut
from jina_v4_client.embed.journal import Journal, Recorded, Span, sync_folder
from jina_v4_client.scoring.quantization import quantize_binary, quantize_int8

FORMATS = (".parquet", ".npy", ".safetensors")
# In memory at once, and in one row group of a parquet file.
_GROUP_BYTES = 2**24  # of vectors
_GROUP_ROWS = 2**15  # ids take memory too
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16"}
# The dtypes that only .parquet can hold, and how their columns are read.
QUANTIZED = {"int8": "vector * scale", "binary": "bits of v > 0, most significant first"}
# These options say how the inputs are read, not how the vectors are made.
_OF_INPUTS = ("text-column", "image-column", "id-column", "input-format")


def journal_dtype(options: Mapping[str, Any]) -> str:
    """Return the dtype of the vectors in the journal; they are quantized when the output is written."""
    return "float32" if options["dtype"] in QUANTIZED else options["dtype"]


def check_output(path: Path, options: Mapping[str, Any]) -> None:
    """Refuse an output that cannot be written in the format of its name.

    Raises:
        UsageError: it cannot.
    """
    dtype = options["dtype"]
    if path.suffix not in FORMATS:
        raise UsageError(f"OUTPUT {path}: the name must end with {', '.join(FORMATS)}; or give `-` for lines of JSON")
    if path.suffix != ".parquet" and dtype in QUANTIZED:
        raise UsageError(f"--dtype {dtype} is for .parquet; use float32 or float16 with {path.suffix}")
    if path.suffix == ".npy" and options["multivector"]:
        raise UsageError("multi-vectors differ in length, which .npy cannot hold; use .parquet or .safetensors")
    if path.suffix == ".parquet":
        check_installed("pyarrow")
    if not path.parent.is_dir():
        raise UsageError(f"OUTPUT {path}: {path.parent} is no folder")
    if path.is_dir():
        raise UsageError(f"OUTPUT {path} is a folder")


def beside(path: Path, what: str) -> Path:
    """Return the path of a file or folder beside an output, which is named after it."""
    return path.with_name(f"{path.name}.{what}")


def write_output(
    journal: Journal,
    path: Path,
    folder: Path,
    options: Mapping[str, Any],
    revision: str | None,
    left_out: Callable[[], Iterable[LeftOut]],
) -> list[Path]:
    """Write the output, and put it in its place when it is whole and on the disk.

    Args:
        journal: with all rows done.
        path: its ending tells the format.
        folder: for files that are not whole yet; on the disk of `path`.
        options: of the command, by the name of the flag.
        revision: of the model.
        left_out: yields the files that have no rows.

    Returns:
        The files that were written; the output itself last.
    """
    parts: dict[Path, Path] = {}

    def write(place: Path, name: str, write_to: Callable[[IO[bytes]], None]) -> None:
        parts[place] = folder / name
        with parts[place].open("wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())

    if path.suffix != ".parquet":
        write(beside(path, "ids.json"), "ids", lambda file: _write_ids(journal, file))
    errors = beside(path, "errors.jsonl")
    if journal.count(failed=True) or any(True for _ in left_out()):
        write(errors, "errors", lambda file: _write_errors(journal, left_out(), file))
    write_vectors = {".parquet": _write_parquet, ".npy": _write_npy, ".safetensors": _write_safetensors}[path.suffix]
    write(path, "output", lambda file: write_vectors(journal, options, revision, file))
    journal.mark_finishing()
    if errors not in parts:
        errors.unlink(missing_ok=True)  # of the output that is replaced
    if path.suffix != ".parquet":
        path.unlink(missing_ok=True)  # or a kill could leave old vectors beside new ids
    for place, part in parts.items():
        part.replace(place)
    sync_folder(path.parent)
    return list(parts)


class Lines:
    """Writes each row as a line of JSON in UTF-8, as soon as it and all rows before it are done.

    Args:
        file: the standard output.
        are_multi: whether the vectors are multi-vectors.
        as_base64: write vectors as the base64 of their little-endian bytes instead of lists of numbers.
    """

    def __init__(self, journal: Journal, file: IO[bytes], *, are_multi: bool, as_base64: bool) -> None:
        self._journal, self._file, self._are_multi, self._as_base64 = journal, file, are_multi, as_base64
        self._next = 0

    def write_done(self) -> None:
        """Write the rows that are done, up to the first that is not."""
        for row in self._journal.recorded(self._next):
            if row.number != self._next:
                break
            self._write(self._line(row))
            self._next += 1
        self._try(self._file.flush)

    def write_left_out(self, left_out: Iterable[LeftOut]) -> None:
        """Write the files that have no rows, after all rows."""
        for entry in left_out:
            self._write({"id": entry.path, "error": entry.why})
        self._try(self._file.flush)

    def _write(self, line: Mapping[str, object]) -> None:
        self._try(self._file.write, _json_line(line))

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except OSError as error:
            # The end of the process must not try again to write what is still in the buffer.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise StoppedError(f"the standard output cannot be written: {error.strerror}") from error

    def _line(self, row: Recorded) -> dict[str, object]:
        if row.span is None:
            return {"id": row.id, "error": row.error}
        vectors = self._journal.vectors([row.span])  # (n, width)
        name, vector = ("embeddings", vectors) if self._are_multi else ("embedding", vectors[0])
        if not self._as_base64:
            return {"id": row.id, name: vector.tolist()}
        return {"id": row.id, name: base64.b64encode(_little_endian(vector)).decode("ascii"), "shape": vector.shape}


class _Group(NamedTuple):
    """Some rows: their ids, how many vectors each has, and the vectors, (n_vectors, width)."""

    ids: list[str]
    lengths: list[int]
    vectors: NDArray[np.generic]


def _groups(journal: Journal) -> Iterator[_Group]:
    """Yield the rows that have vectors in order, as many at once as their vectors' bytes allow."""
    ids: list[str] = []
    spans: list[Span] = []
    n_vectors = 0
    for row in journal.recorded():
        if row.span is None:
            continue
        ids.append(row.id)
        spans.append(row.span)
        n_vectors += row.span.length
        if n_vectors * journal.width * journal.dtype.itemsize >= _GROUP_BYTES or len(ids) >= _GROUP_ROWS:
            yield _Group(ids, [span.length for span in spans], journal.vectors(spans))
            ids, spans, n_vectors = [], [], 0
    if ids:
        yield _Group(ids, [span.length for span in spans], journal.vectors(spans))


def facts(options: Mapping[str, Any], revision: str | None) -> str:
    """Return how the vectors were made, as JSON for the metadata of the output."""
    made_with = {name: value for name, value in options.items() if name not in _OF_INPUTS}
    made_with |= {"quantization": QUANTIZED.get(options["dtype"]), "revision": revision}
    return json.dumps({name: value for name, value in made_with.items() if value is not None})


# Dictionaries and compression do not make floats of an embedding smaller; reading is faster without.
PARQUET_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": ["id"]}


def vector_column(vectors: NDArray[np.generic], lengths: Sequence[int] | None) -> Any:
    """Make a column of parquet.

    Args:
        vectors: (n_vectors, width).
        lengths: of multi-vectors, how many vectors each has; None if there is one a row.
    """
    import pyarrow  # type: ignore[import-untyped] # it has no types

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    return _in_rows(column, lengths)


def _in_rows(column: Any, lengths: Sequence[int] | None) -> Any:
    """Turn a column with an entry a vector into one with a list a row."""
    import pyarrow

    if lengths is None:
        return column
    return pyarrow.ListArray.from_arrays(pyarrow.array(np.cumsum([0, *lengths], dtype=np.int32)), column)


def _columns(group: _Group, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make the columns of parquet; int8 has a scale a vector, binary a bit a number."""
    import pyarrow

    columns = {"id": pyarrow.array(group.ids, pyarrow.string())}
    lengths = group.lengths if options["multivector"] else None
    if options["dtype"] == "binary":
        return columns | {"vector": vector_column(quantize_binary(group.vectors).codes, lengths)}
    if options["dtype"] == "int8":
        stored = quantize_int8(group.vectors)
        scale = _in_rows(pyarrow.array(stored.scales), lengths)
        return columns | {"vector": vector_column(stored.codes, lengths), "scale": scale}
    return columns | {"vector": vector_column(group.vectors, lengths)}


def _write_parquet(journal: Journal, options: Mapping[str, Any], revision: str | None, file: IO[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    one = _Group([""], [1], np.ones((1, journal.width), journal.dtype))  # its columns have the types of all
    schema = pyarrow.schema(
        [pyarrow.field(name, column.type, nullable=False) for name, column in _columns(one, options).items()],
        metadata={"jina_v4": facts(options, revision)},
    )
    encoding: dict[str, Any] = dict(PARQUET_OPTIONS)
    if options["dtype"] in QUANTIZED:  # parquet has no type of 8 bits: without a dictionary each code takes 4 bytes
        encoding["use_dictionary"] = ["vector" + ".list.element" * (2 if options["multivector"] else 1)]
    with parquet.ParquetWriter(file, schema, store_schema=True, **encoding) as writer:
        for group in _groups(journal):
            table = pyarrow.table(_columns(group, options), schema)
            writer.write_table(table, row_group_size=len(group.ids))


def _write_npy(journal: Journal, _options: Mapping[str, Any], _revision: str | None, file: IO[bytes]) -> None:
    n_rows = journal.count() - journal.count(failed=True)
    header = {"descr": journal.dtype.str, "fortran_order": False, "shape": (n_rows, journal.width)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call] # numpy's
    for group in _groups(journal):
        file.write(_little_endian(group.vectors))


def _write_safetensors(journal: Journal, options: Mapping[str, Any], revision: str | None, file: IO[bytes]) -> None:
    # The package safetensors writes only what is in memory as a whole.
    lengths = np.fromiter((row.span.length for row in journal.recorded() if row.span is not None), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")  # (n_rows + 1,)
    shapes = {"vectors": (_SAFETENSORS_TYPES[options["dtype"]], (int(offsets[-1]), journal.width), journal.dtype)}
    if options["multivector"]:
        shapes = {"offsets": ("I64", offsets.shape, offsets.dtype), **shapes}
    header: dict[str, object] = {"__metadata__": {"jina_v4": facts(options, revision)}}
    end = 0
    for name, (type_name, shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    if options["multivector"]:
        file.write(offsets.tobytes())
    for group in _groups(journal):
        file.write(_little_endian(group.vectors))


def _write_ids(journal: Journal, file: IO[bytes]) -> None:
    separator = "["
    for row in journal.recorded():
        if row.span is not None:
            file.write(f"{separator}{json.dumps(row.id, ensure_ascii=False)}".encode())
            separator = ",\n"
    file.write(b"]\n")


def _write_errors(journal: Journal, left_out: Iterable[LeftOut], file: IO[bytes]) -> None:
    for row in journal.recorded():
        if row.error is not None:
            file.write(_json_line({"row": row.number + 1, "id": row.id, "error": row.error}))
    for entry in left_out:
        file.write(_json_line({"row": None, "id": entry.path, "error": entry.why}))


def _json_line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _little_endian(vectors: NDArray[np.generic]) -> bytes:
    return vectors.astype(vectors.dtype.newbyteorder("<"), copy=False).tobytes()
