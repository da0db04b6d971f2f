"""The corpus: the driver lists files, tasks read them.

A read task yields what identifies each row and how its content is read; `read_contents` reads it. Between the two Ray
Data leaves out the rows that are done: a resumed run opens no image and renders no page twice.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

import pyarrow  # type: ignore[import-untyped] # it has no types
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from jina_v4_client._images import prepare
from jina_v4_client.embed.content import Content, Kind, broken_row, escaped
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.embed.files import kind_by_name, kind_of
from jina_v4_client.embed.folder import open_file
from jina_v4_client.embed.inputs import Source, open_input
from jina_v4_client.embed.pages import ImageFile, Pdf, Tiff
from jina_v4_client.embed.places import File, FileSystems, on_this_machine, scheme_of
from jina_v4_client.embed.tables import Columns
from jina_v4_client.errors import ImageError

_FILES_A_TASK = 64  # of a folder; a file that is an INPUT has a task of its own
_ROWS_A_TABLE = 128
_TIFF_ENDINGS = (".tif", ".tiff")
# row: number of the file << 32 | number of the row in it, the order of the input. read: a pickle of what returns the
# content; without one, `file` is opened for it, or `error` says why there is none.
_LISTED = pyarrow.schema({"row": "int64", "id": "string", "read": "large_binary", "file": "string", "error": "string"})
_READ = pyarrow.schema(
    {"row": "int64", "id": "string", "kind": "string", "content": "large_binary", "note": "string", "error": "string"}
)


@dataclass(frozen=True)
class Plan:
    """What every process of a run knows."""

    options: Mapping[str, Any]  # those that decide about the vectors, by the name of the flag
    urls: Sequence[str]  # of servers; none to start one a worker
    server: Sequence[str]  # arguments of `jina-v4-serve`, for those that are started
    client: Mapping[str, Any]  # arguments of the clients, but for the address
    batch_sizes: Mapping[Kind, int]  # items a request
    skip: bool  # a row that cannot be embedded gets an error; it stops the run otherwise


class Corpus(Datasource):
    """The rows of files, in tables as `_LISTED`."""

    def __init__(self, files: Sequence[File], filesystems: FileSystems, plan: Plan) -> None:
        self.tasks: list[Callable[[], Iterator[Any]]] = []
        for in_folder, group in itertools.groupby(enumerate(files), key=lambda numbered: numbered[1].in_folder):
            while some := list(itertools.islice(group, _FILES_A_TASK if in_folder else 1)):
                self.tasks.append(partial(_tables, some, filesystems, plan))

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return a task for each group of files."""
        return [ReadTask(task, BlockMetadata(None, None, None, None)) for task in self.tasks]


def _tables(files: Sequence[tuple[int, File]], filesystems: FileSystems, plan: Plan) -> Iterator[Any]:
    rows = itertools.chain.from_iterable(_rows(number << 32, file, filesystems, plan) for number, file in files)
    while some := list(itertools.islice(rows, _ROWS_A_TABLE)):
        yield pyarrow.Table.from_pylist(some, _LISTED)


def _rows(first: int, file: File, filesystems: FileSystems, plan: Plan) -> Iterator[dict[str, object]]:
    name, options = file.name, plan.options
    if file.left_out:
        yield {"row": first, "id": name, "error": file.left_out}
        return
    if _is_one_image(name):
        yield {"row": first, "id": name, "file": name}
        return
    with on_this_machine(name, filesystems) as path:
        source: Source
        if file.in_folder:
            kind, why = kind_of(path)
            if kind is None:
                yield {"row": first, "id": name, "error": why}
                return
            source = open_file(path, kind, options["pdf-scale"])
        else:
            columns = Columns(options["text-column"], options["image-column"], options["id-column"])
            source = open_input(path, columns, options["input-format"], options["pdf-scale"])
        is_opened_later = isinstance(source, ImageFile | Tiff | Pdf)
        for number, row in enumerate(source.rows(), first):
            how = {"file": name} if is_opened_later else {"read": pickle.dumps(row.read)}
            yield {"row": number, "id": row.id.replace(path, name, 1), **how}


def _is_one_image(name: str) -> bool:
    """Whether a file in an object store is taken for an image by its name; it is not fetched to be looked at."""
    suffix = PurePosixPath(name).suffix.lower()
    return scheme_of(name) != "" and kind_by_name(suffix) == "image" and suffix not in _TIFF_ENDINGS


def read_contents(rows: pyarrow.Table, filesystems: FileSystems, plan: Plan) -> pyarrow.Table:
    """Read the contents of rows, images as the files that are sent, pages rendered: `_LISTED` becomes `_READ`.

    Raises:
        StoppedError: a row has no content, and rows are not to be skipped.
    """
    found: list[dict[str, object]] = []
    for name, group in itertools.groupby(rows.to_pylist(), key=itemgetter("file")):
        if name is None:
            found += [row if row["error"] else row | _content(row, pickle.loads(row["read"]), plan) for row in group]  # noqa: S301 - ours
            continue
        unread = {row["row"]: row for row in group}
        first, last = min(unread) >> 32 << 32, max(unread)
        with on_this_machine(name, filesystems) as path:
            kind, why = kind_of(path)[0] or "image", "the file has changed, or cannot be read on this node"
            pages = open_file(path, kind, plan.options["pdf-scale"]).rows()
            if kind != "image" and _is_one_image(name):
                pages, why = iter(()), f"named as an image, but a {kind.upper()} file: rename it"
            for number, page in zip(range(first, last + 1), pages, strict=False):
                if row := unread.pop(number, None):
                    found.append(row | _content(row, page.read, plan))
        found += [row | _content(row, broken_row(name, why).read, plan) for row in unread.values()]
    return pyarrow.Table.from_pylist(found, _READ)


def _content(row: Mapping[str, Any], read: Callable[[], Content], plan: Plan) -> dict[str, object]:
    try:
        content = read()
        if isinstance(content.value, str):
            kind = "url" if content.kind == "image" else "text"
            return {"kind": kind, "content": content.value.encode(), "note": content.note}
        return {"kind": "image", "content": prepare(content.value).content, "note": content.note}
    except (RowError, ImageError) as error:
        if not plan.skip:
            raise StoppedError(f"row {row['id']}: {error}") from error
        return {"error": escaped(str(error))}
