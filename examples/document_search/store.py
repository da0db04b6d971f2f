"""The index: a LanceDB table with a row a page, which lies in a folder and needs no server.

LanceDB writes new files first and makes them the table's next version in one step. All pages of a file are one such
step, so a run that is killed leaves a file whole, as it was before, or not there.

The table remembers the vector of a fixed text. A server that gives another one has other weights: its vectors cannot
be compared with those of the table, though nothing else would show it.
"""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lancedb
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped] # it has no types
from jina_v4_client.scoring import cosine, rank
from numpy.typing import NDArray

from document_search.errors import SearchError, UsageError

Vector = NDArray[np.float32]

TABLE = "pages"
MULTIVECTOR_DIM = 128
PROBE_TEXT = "Which model made this index?"
_PROBE = b"probe"  # where the schema's metadata have its vector
# The same weights in bfloat16 and float32 give 0.9998 and more.
_MIN_PROBE_COSINE = 0.99
_PLACE = ["file", "page", "digest", "scale", "max_pixels", "grid_rows", "grid_columns"]  # the columns of a Found
_BROKEN = (ValueError, OSError, RuntimeError)  # what LanceDB raises for a table that it cannot read or write


@dataclass(frozen=True)
class Source:
    """What the vectors of a page come from, so that it can be rendered again, and that a change is seen.

    Attributes:
        file: absolute path.
        digest: of the file, from `documents`.
        scale: at which it is rendered, pixels a point.
        max_pixels: to which the server scales larger pages down.
    """

    file: Path
    digest: str
    scale: float
    max_pixels: int


@dataclass(frozen=True)
class Page:
    """A page to be stored.

    Attributes:
        number: of the page, from 1.
        dense: (dim,).
        multivector: (n_tokens, 128).
        grid: rows and columns of the page's patches.
    """

    number: int
    dense: Vector
    multivector: Vector
    grid: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """A page that was found.

    Attributes:
        number: of the page, from 1.
        grid: rows and columns of the page's patches.
        dense: cosine with the query, where the search was made by it.
        maxsim: MaxSim with the query, where the search was made by it.
    """

    source: Source
    number: int
    grid: tuple[int, int]
    dense: float | None = None
    maxsim: float | None = None


class Store:
    """The table. Made by :meth:`open` or :meth:`open_or_make`."""

    def __init__(self, table: Any, folder: Path) -> None:
        self._table = table
        self._folder = folder

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an index.

        Raises:
            UsageError: there is none.
        """
        message = f"{folder} holds no index; make one with: index FILE.pdf"
        if not folder.is_dir():  # connect() would make it
            raise UsageError(message)
        try:
            table = lancedb.connect(folder).open_table(TABLE)
        except _BROKEN as error:
            raise UsageError(f"{message} ({_line(error)})") from error
        if _PROBE not in (table.schema.metadata or {}):
            raise UsageError(f"{folder} holds a table of another program; choose another --index")
        return cls(table, folder)

    @classmethod
    def open_or_make(cls, folder: Path, probe: Vector) -> Self:
        """Open an index, or make an empty one.

        Args:
            folder: where it lies.
            probe: (dim,), the dense vector of PROBE_TEXT.

        Raises:
            UsageError: the vectors there are another model's; it cannot be made.
        """
        try:
            lancedb.connect(folder).create_table(TABLE, schema=_schema(probe))
        except _BROKEN as error:
            if "already exists" not in str(error):
                raise UsageError(f"no index can be made in {folder}: {_line(error)}") from error
        store = cls.open(folder)
        store.check_model(probe)
        return store

    def check_model(self, probe: Vector) -> None:
        """Refuse a server whose vectors are of another kind than those of the table; probe as for open_or_make."""
        stored = np.frombuffer(base64.b64decode(self._table.schema.metadata[_PROBE]), dtype="<f4")  # (dim,)
        if len(stored) != len(probe):
            why = f"has vectors of {len(stored)} dimensions, and the server gives {len(probe)}"
        elif cosine(stored, probe).item() < _MIN_PROBE_COSINE:
            why = "was made by a model with other weights"
        else:
            return
        raise UsageError(f"the index in {self._folder} {why}: use that model's server, or another --index")

    def __len__(self) -> int:
        """Count the pages."""
        return int(self._table.count_rows())

    def page_numbers(self, source: Source) -> set[int]:
        """Return the pages of a file that are in the index, as the file is now."""
        same = f"digest = '{source.digest}' AND scale = {source.scale!r} AND max_pixels = {source.max_pixels}"
        rows = self._table.search().where(f"{_is_file(source.file)} AND {same}").select(["page"]).to_arrow()
        return set(rows["page"].to_pylist())

    def put(self, source: Source, pages: Sequence[Page]) -> None:
        """Store all pages of a file, in place of those it had: all of it at once, or nothing.

        Raises:
            SearchError: they cannot be written.
        """
        n = len(pages)
        dense = np.stack([page.dense for page in pages])  # (n, dim)
        tokens = np.concatenate([page.multivector for page in pages])  # (n_rows, 128)
        offsets = np.cumsum([0, *(len(page.multivector) for page in pages)])  # (n + 1,)
        columns = {
            "id": [f"{source.file}#{page.number}" for page in pages],
            "file": [str(source.file)] * n,
            "page": [page.number for page in pages],
            "digest": [source.digest] * n,
            "scale": [source.scale] * n,
            "max_pixels": [source.max_pixels] * n,
            "grid_rows": [page.grid[0] for page in pages],
            "grid_columns": [page.grid[1] for page in pages],
            "dense": _fixed_lists(dense),
            "multivector": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _fixed_lists(tokens)),
        }
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        try:
            # Pages that the file had and has no longer go in the same step.
            merge = merge.when_not_matched_by_source_delete(_is_file(source.file))
            merge.execute(pa.table(columns, schema=self._table.schema))
        except _BROKEN as error:
            raise SearchError(f"{source.file} cannot be stored in {self._folder}: {_line(error)}") from error

    def by_dense(self, query: Vector, top_k: int) -> list[Found]:
        """Find pages by cosine; query (dim,)."""
        rows = self._search("dense", query, top_k, [])
        return [_found(row, dense=1 - row["_distance"]) for row in rows.to_pylist()]

    def by_multivector(self, query: Vector, top_k: int) -> list[Found]:
        """Find pages by MaxSim with every page; query (n_tokens, 128)."""
        # LanceDB's distance is the sum, over the query's tokens, of 1 minus the best cosine.
        rows = self._search("multivector", list(query), top_k, [])
        return [_found(row, maxsim=len(query) - row["_distance"]) for row in rows.to_pylist()]

    def by_both(self, dense: Vector, multivector: Vector, top_k: int, n_candidates: int) -> list[Found]:
        """Find candidates by cosine, then order these by MaxSim."""
        rows = self._search("dense", dense, max(top_k, n_candidates), ["multivector"])
        documents = [_rows(column) for column in rows["multivector"]]
        plain = rows.drop_columns(["multivector"]).to_pylist()
        hits = rank(multivector, documents, top_k) if plain else []
        return [_found(plain[hit.index], 1 - plain[hit.index]["_distance"], hit.score) for hit in hits]

    def page(self, digest: str, number: int) -> Found | None:
        """Return a page of a file with that digest; None if the index has none.

        Where several files have that digest, it is one that can still be read, if there is one.
        """
        where = f"digest = {_quoted(digest)} AND page = {number}"
        rows = self._table.search().where(where).select(_PLACE).to_arrow().to_pylist()
        readable = (row for row in rows if os.access(row["file"], os.R_OK))
        row = next(readable, rows[0] if rows else None)
        return None if row is None else _found(row)

    def count_files(self) -> int:
        """Count the files."""
        return len(self._table.search().select(["file"]).to_arrow()["file"].unique())

    def multivector(self, page: Found) -> Vector:
        """Give the multi-vector of a page that was found; (n_tokens, 128)."""
        where = f"{_is_file(page.source.file)} AND page = {page.number}"
        return _rows(self._table.search().where(where).select(["multivector"]).limit(1).to_arrow()["multivector"][0])

    def _search(self, column: str, query: Any, n: int, more: list[str]) -> Any:
        """Give the n nearest rows as an Arrow table. Every row is looked at: no approximate index is ever made."""
        columns = [*_PLACE, "_distance", *more]
        search = self._table.search(query, vector_column_name=column).distance_type("cosine")
        try:
            return search.select(columns).limit(n).to_arrow()
        except _BROKEN as error:
            raise SearchError(f"the index in {self._folder} cannot be read: {_line(error)}") from error


def _schema(probe: Vector) -> Any:
    stored = base64.b64encode(probe.astype("<f4").tobytes())
    # Two runs at once that add the same page are in conflict by this, and the later one is made to replace it.
    key = {"lance-schema:unenforced-primary-key": "true"}
    columns = [
        pa.field("id", pa.string(), nullable=False, metadata=key),
        pa.field("file", pa.string()),
        pa.field("page", pa.int32()),
        pa.field("digest", pa.string()),
        pa.field("scale", pa.float64()),
        pa.field("max_pixels", pa.int32()),
        pa.field("grid_rows", pa.int32()),
        pa.field("grid_columns", pa.int32()),
        pa.field("dense", pa.list_(pa.float32(), len(probe))),
        pa.field("multivector", pa.list_(pa.list_(pa.float32(), MULTIVECTOR_DIM))),
    ]
    return pa.schema(columns, metadata={_PROBE: stored})


def _fixed_lists(vectors: Vector) -> Any:
    """Give vectors (n, dim) as an Arrow array of n lists, without a Python object a number."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _rows(multivector: Any) -> Vector:
    """Give one value of the multi-vector column as (n_tokens, 128)."""
    rows: Vector = multivector.values.flatten().to_numpy().reshape(-1, MULTIVECTOR_DIM)
    return rows


def _found(row: dict[str, Any], dense: float | None = None, maxsim: float | None = None) -> Found:
    source = Source(Path(row["file"]), row["digest"], row["scale"], row["max_pixels"])
    return Found(source, row["page"], (row["grid_rows"], row["grid_columns"]), dense, maxsim)


def _is_file(file: Path) -> str:
    """Give the condition, in SQL, that a row is of that file."""
    return f"file = {_quoted(str(file))}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
