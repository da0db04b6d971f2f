"""Where files lie: on this machine or in an object store, as pyarrow's file systems see it."""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

from pyarrow import fs  # type: ignore[import-untyped] # it has no types

from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.folder import walk

FileSystems = Mapping[str, fs.FileSystem]  # by the scheme of the URI
_SCHEME = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://")


class File(NamedTuple):
    """A file of an input.

    Attributes:
        name: its absolute path or URI.
        in_folder: whether it was found in a folder.
        state: its size and time.
        left_out: why it has no rows; "" if it may have some.
    """

    name: str
    in_folder: bool
    state: str
    left_out: str = ""


def scheme_of(name: str) -> str:
    """Return the scheme of a URI; "" of a path."""
    found = _SCHEME.match(name)
    return found[1] if found else ""


def without_keys(name: str) -> str:
    """Return a path as it is, and a URI without the user and the options in it."""
    if not scheme_of(name):
        return name
    uri = urlsplit(name)
    return f"{uri.scheme}://{uri.netloc.rpartition('@')[2]}{uri.path}"


def place(name: str) -> tuple[str, fs.FileSystem, str]:
    """Return the scheme ("" on this machine), the file system and the path in it of a path or a URI."""
    scheme = scheme_of(name)
    try:
        if not scheme:
            name.encode()
            return "", fs.LocalFileSystem(), str(Path(name).absolute())
        return "" if scheme == "file" else scheme, *fs.FileSystem.from_uri(name.rstrip("/"))
    except UnicodeEncodeError as error:
        raise UsageError(f"{name!r}: the name is not UTF-8; rename it") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be opened: {error}") from error


def list_files(inputs: Sequence[str], output: str) -> tuple[list[File], FileSystems, list[dict[str, object]]]:
    """List all files, sorted by name within each input.

    Args:
        inputs: files, folders, or patterns in which `*` stands for any characters but `/`.
        output: a folder; what is in it or in the work folder beside it is left out of folders and patterns.

    Returns:
        The files, their file systems, and of each input a fingerprint by which a change is seen.

    Raises:
        UsageError: an input cannot be listed or is in the output, or two with one scheme are on different file systems.
    """
    places = [place(name) for name in inputs]
    filesystems: dict[str, fs.FileSystem] = {}
    for scheme, filesystem, _ in places:
        if filesystems.setdefault(scheme, filesystem) != filesystem:
            raise UsageError(f"all inputs with {scheme}:// need the same endpoint, region and account")
    is_in_output = _within(output)
    files: list[File] = []
    fingerprints: list[dict[str, object]] = []
    for name, (scheme, filesystem, path) in zip(map(without_keys, inputs), places, strict=True):
        digest, n_before = hashlib.sha256(), len(files)
        root = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
        if is_in_output(f"{scheme}://{root}" if scheme else root):
            raise UsageError(f"INPUT {name} is in OUTPUT {without_keys(output)}; choose another OUTPUT")
        try:
            for file in _stored(scheme, filesystem, path) if scheme else _local(path):
                if not is_in_output(file.name.rpartition("/")[0]):
                    digest.update(f"{file.name}\0{file.state}\0".encode())
                    files.append(file)
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {error}") from error
        except UnicodeEncodeError as error:
            raise UsageError(f"{file.name!r}: the name is not UTF-8; rename it") from error
        if len(files) == n_before:
            raise UsageError(f"{name} is not there, or holds no files")
        fingerprints.append({"path": name, "files": len(files) - n_before, "listing": digest.hexdigest()})
    return files, filesystems, fingerprints


def _within(output: str) -> Callable[[str], bool]:
    """Return a function that tells of a folder whether it is the output, the work folder, or in one of them."""
    scheme, _, path = place(output)
    out = f"{scheme}://{path}" if scheme else os.path.realpath(path)

    @functools.cache
    def is_within(folder: str) -> bool:
        real = folder if scheme_of(folder) else os.path.realpath(folder or "/")  # a linked folder may lead there
        return f"{real}/".startswith((f"{out}/", f"{out}.partial/"))

    return is_within


def _local(path: str) -> Iterator[File]:
    """Yield files on this machine, as a shell or the command without Ray finds them."""
    pattern = "*".join(map(glob.escape, path.split("*")))
    for found in sorted(glob.glob(pattern)):  # noqa: PTH207 - Path.glob finds hidden names too
        if not Path(found).is_dir():
            yield File(found, in_folder=False, state=_state(found))
        elif "*" not in path:
            for below, why_not in walk(found):
                yield File(below, in_folder=True, state=why_not or _state(below), left_out=why_not)


def _state(path: str) -> str:
    status = Path(path).stat()
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _stored(scheme: str, filesystem: fs.FileSystem, path: str) -> Iterator[File]:
    """Yield files of an object store."""
    root = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    pattern = re.compile("[^/]*".join(map(re.escape, path.split("*"))) + ("" if "*" in path else "(/.*)?"), re.DOTALL)
    found = filesystem.get_file_info([root])
    is_folder = found[0].type == fs.FileType.Directory
    if is_folder:
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    for one in sorted(found, key=lambda one: one.path):
        if one.type == fs.FileType.File and pattern.fullmatch(one.path) and "/." not in one.path[len(root) :]:
            yield File(f"{scheme}://{one.path}", is_folder and "*" not in path, f"{one.size}\0{one.mtime_ns}")


def remove(filesystem: fs.FileSystem, path: str) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    found = filesystem.get_file_info(path).type
    if found == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif found == fs.FileType.File:
        filesystem.delete_file(path)


@contextmanager
def on_this_machine(name: str, filesystems: FileSystems) -> Iterator[str]:
    """Hold a file, fetched if it is not on this machine; errors name it as the user does."""
    if not (scheme := scheme_of(name)):
        yield name
        return
    path = name.removeprefix(f"{scheme}://")
    with TemporaryDirectory(prefix="jina-v4-embed-") as folder:
        copy = f"{folder}/{PurePosixPath(path).name}"
        fs.copy_files(path, copy, filesystems[scheme], fs.LocalFileSystem())
        try:
            yield copy
        except UsageError as error:
            raise UsageError(str(error).replace(copy, name)) from error
