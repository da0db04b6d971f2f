"""The output: the vectors of the journal in the order of the input, as one file, or as lines while they come.

The same journal gives the same bytes: the groups of a parquet file are cut by what is in them, and no time is written.
"""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.embed import missing
from jina_v4_client.embed.content import escaped
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.folder import LeftOut
from jina_v4_client.embed.job import sync_folder
from jina_v4_client.embed.journal import Journal, Recorded, Span
from jina_v4_client.scoring.quantization import quantize_binary, quantize_int8

FORMATS = (".parquet", ".npy", ".safetensors")
# So much is in memory at once, and in one group of a parquet file.
_GROUP_BYTES = 2**24  # of vectors
_GROUP_ROWS = 2**15  # ids take memory too
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16"}
# What .parquet alone holds, and how its columns are read.
QUANTIZED = {"int8": "vector * scale", "binary": "bits of v > 0, most significant first"}


@dataclass(frozen=True)
class Shape:
    """What kind of vectors is written.

    Attributes:
        dtype: "float32", "float16", or for .parquet "int8" or "binary".
        facts: what a reader may want to know of their making; written where the format has a place for it.
    """

    dtype: str
    multivector: bool
    facts: Mapping[str, object]

    @property
    def kept_as(self) -> str:
        """The dtype of the vectors in the journal: they are quantized when they are written."""
        return "float32" if self.dtype in QUANTIZED else self.dtype


@dataclass(frozen=True)
class _Group:
    """Some rows: their ids, how many vectors each has, and the vectors, (n_vectors, width)."""

    ids: list[str]
    lengths: list[int]
    vectors: NDArray[np.generic]


def check_output(path: Path, shape: Shape) -> None:
    """Refuse an output that cannot be written in the format of its name.

    Raises:
        UsageError: it cannot.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"OUTPUT {path}: the name must end with {', '.join(FORMATS)}; or give `-` for lines of JSON")
    if path.suffix != ".parquet" and shape.dtype in QUANTIZED:
        raise UsageError(f"--dtype {shape.dtype} is for .parquet; use float32 or float16 with {path.suffix}")
    if path.suffix == ".npy" and shape.multivector:
        raise UsageError("multi-vectors differ in length, which .npy cannot hold; use .parquet or .safetensors")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # type: ignore[import-untyped] # noqa: F401 - it has no types
        except ModuleNotFoundError as error:
            raise UsageError(missing("pyarrow")) from error
    if not path.parent.is_dir():
        raise UsageError(f"OUTPUT {path}: {path.parent} is no folder")
    if path.is_dir():
        raise UsageError(f"OUTPUT {path} is a folder")


def beside(path: Path, what: str) -> Path:
    """Give the name of what lies beside an output."""
    return path.with_name(f"{path.name}.{what}")


def write_output(
    journal: Journal, path: Path, folder: Path, shape: Shape, left_out: Callable[[], Iterable[LeftOut]] = tuple
) -> list[Path]:
    """Write the output, and put it in its place when it is whole and on the disk.

    Args:
        journal: with all rows done.
        path: its ending tells the format.
        folder: for what is not whole yet; on the disk of `path`.
        shape: what kind of vectors they are.
        left_out: the files that have no rows.

    Returns:
        The files that are now there; the output itself last.
    """
    parts: dict[Path, Path] = {}
    n_failed = journal.count(failed=True)
    if path.suffix != ".parquet":
        parts[beside(path, "ids.json")] = _written(folder / "ids", lambda file: _write_ids(journal, file))
    any_errors = n_failed > 0 or any(True for _ in left_out())
    if any_errors:
        parts[beside(path, "errors.jsonl")] = _written(
            folder / "errors", lambda file: _write_errors(journal, left_out(), file)
        )
    write = {".parquet": _write_parquet, ".npy": _write_npy, ".safetensors": _write_safetensors}[path.suffix]
    parts[path] = _written(folder / "output", lambda file: write(journal, shape, file))
    journal.mark_finishing()
    if not any_errors:
        beside(path, "errors.jsonl").unlink(missing_ok=True)  # of the output that is replaced
    for place, part in parts.items():
        part.replace(place)
    sync_folder(path.parent)
    return list(parts)


class Lines:
    """Writes each row as a line of JSON, in UTF-8, as soon as it and all rows before it are done.

    Args:
        file: the standard output.
        as_base64: write vectors as the base64 of their little-endian bytes instead of lists of numbers.
    """

    def __init__(self, journal: Journal, file: IO[bytes], shape: Shape, *, as_base64: bool) -> None:
        self._journal, self._file, self._shape, self._as_base64 = journal, file, shape, as_base64
        self._next = 0

    def write_done(self) -> None:
        """Write the rows that have their turn."""
        for row in self._journal.recorded(self._next):
            if row.number != self._next:
                break
            self._write(self._line(row))
            self._next += 1
        self._try(self._file.flush)

    def write_left_out(self, left_out: Iterable[LeftOut]) -> None:
        """Write, behind all rows, the files that have none."""
        for entry in left_out:
            self._write({"id": escaped(entry.path), "error": escaped(entry.why)})
        self._try(self._file.flush)

    def _write(self, line: Mapping[str, object]) -> None:
        self._try(self._file.write, json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except OSError as error:
            # What is still in the buffer must not be tried again at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise StoppedError(f"the standard output cannot be written: {error.strerror}") from error

    def _line(self, row: Recorded) -> dict[str, object]:
        if row.span is None:
            return {"id": row.id, "error": row.error}
        vectors = self._journal.vectors([row.span])  # (n, width)
        name, vector = ("embeddings", vectors) if self._shape.multivector else ("embedding", vectors[0])
        if not self._as_base64:
            return {"id": row.id, name: vector.tolist()}
        return {"id": row.id, name: base64.b64encode(_little_endian(vector)).decode("ascii"), "shape": vector.shape}


def _groups(journal: Journal, shape: Shape) -> Iterator[_Group]:
    """Give the rows that have vectors in order, as many at once as their vectors' bytes allow."""
    vector_bytes = max(1, journal.width * np.dtype(shape.kept_as).itemsize)
    ids: list[str] = []
    spans: list[Span] = []
    n_vectors = 0
    for row in journal.recorded():
        if row.span is None:
            continue
        ids.append(row.id)
        spans.append(row.span)
        n_vectors += row.span.length
        if n_vectors * vector_bytes >= _GROUP_BYTES or len(ids) >= _GROUP_ROWS:
            yield _group(journal, ids, spans)
            ids, spans, n_vectors = [], [], 0
    if ids:
        yield _group(journal, ids, spans)


def _group(journal: Journal, ids: list[str], spans: Sequence[Span]) -> _Group:
    return _Group(ids, [span.length for span in spans], journal.vectors(spans))


# Numbers of an embedding do not get smaller by dictionaries or compression; reading is faster without.
PARQUET_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": ["id"]}


def vector_column(vectors: NDArray[np.generic], lengths: Sequence[int] | None) -> Any:
    """Make a column of parquet.

    Args:
        vectors: (n_vectors, width).
        lengths: of multi-vectors, how many vectors each has; None if there is one a row.
    """
    import pyarrow

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    if lengths is None:
        return column
    return pyarrow.ListArray.from_arrays(pyarrow.array(np.cumsum([0, *lengths], dtype=np.int32)), column)


def _parquet_columns(vectors: NDArray[np.generic], lengths: Sequence[int] | None, dtype: str) -> dict[str, Any]:
    """Make the columns of vectors (n_vectors, width); int8 has a scale a vector, binary a bit a number."""
    import pyarrow

    if dtype == "binary":
        return {"vector": vector_column(quantize_binary(vectors).codes, lengths)}
    if dtype == "int8":
        stored = quantize_int8(vectors)
        scale = pyarrow.array(stored.scales)
        if lengths is not None:
            scale = pyarrow.ListArray.from_arrays(pyarrow.array(np.cumsum([0, *lengths], dtype=np.int32)), scale)
        return {"vector": vector_column(stored.codes, lengths), "scale": scale}
    return {"vector": vector_column(vectors, lengths)}


def _write_parquet(journal: Journal, shape: Shape, file: IO[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    one = np.ones((1, journal.width), shape.kept_as)  # has the types of all
    columns = {"id": pyarrow.array([""]), **_parquet_columns(one, [1] if shape.multivector else None, shape.dtype)}
    schema = pyarrow.schema(
        [pyarrow.field(name, column.type, nullable=False) for name, column in columns.items()],
        metadata={"jina_v4": json.dumps(shape.facts)},
    )
    with parquet.ParquetWriter(file, schema, store_schema=True, **PARQUET_OPTIONS) as writer:
        for group in _groups(journal, shape):
            columns = _parquet_columns(group.vectors, group.lengths if shape.multivector else None, shape.dtype)
            arrays = [pyarrow.array(group.ids, pyarrow.string()), *columns.values()]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=len(group.ids))


def _write_npy(journal: Journal, shape: Shape, file: IO[bytes]) -> None:
    n_rows = journal.count() - journal.count(failed=True)
    header = {"descr": np.dtype(shape.dtype).str, "fortran_order": False, "shape": (n_rows, journal.width)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call] # numpy's
    for group in _groups(journal, shape):
        file.write(_little_endian(group.vectors))


def _write_safetensors(journal: Journal, shape: Shape, file: IO[bytes]) -> None:
    lengths = np.fromiter((row.span.length for row in journal.recorded() if row.span is not None), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")  # (n_rows + 1,)
    n_vectors = int(offsets[-1])
    tensors = {"offsets": ("I64", offsets.shape, offsets.nbytes)} if shape.multivector else {}
    n_bytes = n_vectors * journal.width * np.dtype(shape.dtype).itemsize
    tensors["vectors"] = (_SAFETENSORS_TYPES[shape.dtype], (n_vectors, journal.width), n_bytes)
    header: dict[str, object] = {"__metadata__": {"jina_v4": json.dumps(shape.facts)}}
    end = 0
    for name, (dtype, dims, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    if shape.multivector:
        file.write(offsets.tobytes())
    for group in _groups(journal, shape):
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
            line: dict[str, object] = {"row": row.number + 1, "id": row.id, "error": row.error}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    for entry in left_out:
        line = {"row": None, "id": escaped(entry.path), "error": escaped(entry.why)}
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _written(path: Path, write: Callable[[IO[bytes]], None]) -> Path:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _little_endian(vectors: NDArray[np.generic]) -> bytes:
    return vectors.astype(vectors.dtype.newbyteorder("<"), copy=False).tobytes()
