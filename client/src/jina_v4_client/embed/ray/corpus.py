"""The corpus: the driver lists files, tasks read them.

A read task yields what identifies each row and how its content is read; `read_contents` reads it. Between the two Ray
Data leaves out the rows that are done: a resumed run opens no image and renders no page twice.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow  # type: ignore[import-untyped] # it has no types
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from jina_v4_client._images import IMAGE_ENDINGS, prepare
from jina_v4_client.embed.content import Content, broken_row, escaped
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.embed.files import kind_of
from jina_v4_client.embed.inputs import open_input
from jina_v4_client.embed.pages import Pages, open_pages
from jina_v4_client.embed.places import File, FileSystems, on_this_machine, scheme_of
from jina_v4_client.embed.ray import Plan
from jina_v4_client.errors import ImageError

_FILES_A_TASK = 64  # of a folder; a file that is an INPUT has a task of its own
_ROWS_A_TABLE = 128
_ONE_IMAGE = tuple(IMAGE_ENDINGS - {".tif", ".tiff"})  # endings of names
# row: number of the file << 32 | number of the row in it, the order of the input. read: a pickle of what returns the
# content; without one, `file` is opened for it. error: why there is none.
_LISTED = pyarrow.schema({"row": "int64", "id": "string", "read": "large_binary", "file": "string", "error": "string"})
# text: also the URL of an image.
_READ = pyarrow.schema(
    {"row": "int64", "id": "string", "kind": "string", "text": "large_string", "image": "large_binary"}
    | {"note": "string", "error": "string"}
)


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
    name = file.name
    if file.left_out or _is_one_image(name):
        yield {"row": first, "id": name, "file": name, "error": file.left_out or None}
        return
    with on_this_machine(name, filesystems) as path:
        kind, why = kind_of(path) if file.in_folder else (None, "")
        if file.in_folder and kind is None:
            yield {"row": first, "id": name, "error": why}
            return
        source = open_pages(path, kind, plan.options["pdf-scale"]) if kind else open_input(path, plan.options)
        for number, row in enumerate(source.rows(), first):
            how = {"file": name} if isinstance(source, Pages) else {"read": pickle.dumps(row.read)}
            yield {"row": number, "id": row.id.replace(path, name, 1), **how}


def _is_one_image(name: str) -> bool:
    """Whether a file in an object store is taken for an image by its name; it is not fetched to be looked at."""
    return scheme_of(name) != "" and name.lower().endswith(_ONE_IMAGE)


def read_contents(rows: pyarrow.Table, filesystems: FileSystems, plan: Plan) -> pyarrow.Table:
    """Read the contents of rows, images as the files that are sent, pages rendered: `_LISTED` becomes `_READ`.

    Raises:
        StoppedError: a row has no content, and rows are not to be skipped.
    """
    found: list[dict[str, object]] = []
    for name, group in itertools.groupby(rows.to_pylist(), key=lambda row: None if row["error"] else row["file"]):
        if name is None:
            found += [row if row["error"] else row | _content(row, pickle.loads(row["read"]), plan) for row in group]  # noqa: S301 - ours
            continue
        unread = {row["row"]: row for row in group}
        with on_this_machine(name, filesystems) as path:
            kind, why = kind_of(path)[0] or "image", "the file has changed, or cannot be read on this node"
            pages = open_pages(path, kind, plan.options["pdf-scale"]).rows()
            if kind != "image" and _is_one_image(name):
                pages, why = iter(()), f"named as an image, but a {kind.upper()} file: rename it"
            first, last = min(unread) >> 32 << 32, max(unread)
            for number, page in zip(range(first, last + 1), pages, strict=False):
                if row := unread.pop(number, None):
                    found.append(row | _content(row, page.read, plan))
        found += [row | _content(row, broken_row(name, why).read, plan) for row in unread.values()]
    return pyarrow.Table.from_pylist(found, _READ)


def _content(row: Mapping[str, Any], read: Callable[[], Content], plan: Plan) -> dict[str, object]:
    try:
        content = read()
        value = content.value if isinstance(content.value, str) else prepare(content.value).content
    except (RowError, ImageError) as error:
        if not plan.skip:
            raise StoppedError(f"row {row['id']}: {error}") from error
        return {"error": escaped(str(error))}
    return {"kind": content.kind, "text" if isinstance(value, str) else "image": value, "note": content.note}
