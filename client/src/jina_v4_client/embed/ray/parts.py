"""The output: a folder of parquet parts, and until it is whole a folder for the work beside it.

```
OUTPUT/vectors/*.parquet    id, vector, row, note
OUTPUT/errors/*.parquet     id, error, row
OUTPUT/job.json             written last
OUTPUT.partial/             job.json, and in done/ Ray Data's checkpoints
```
"""

from dataclasses import replace
from typing import Any

from pyarrow import compute, dataset, fs, parquet  # type: ignore[import-untyped] # it has no types
from ray.data.block import BlockAccessor
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, FilenameProvider, WriteResult

from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.job import JOB_FILE, Job, check_same, load_job
from jina_v4_client.embed.output import PARQUET_OPTIONS
from jina_v4_client.embed.places import place, remove, without_keys

_ID = "row"  # the column by which checkpoints know a row
# Ray Data finds the part of a checkpoint by how its name begins: the dot ends the number of a part.
_NAMES = FilenameProvider(file_format="part.parquet")


class Output(BlockBasedFileDatasink):
    """The two folders, on any file system of pyarrow. As an actor it holds a run together; its name is a lock."""

    n_rows = 0  # that this run wrote
    _is_held = False  # whether a worker of this run has told its revision, or that it knows none

    def __init__(self, name: str) -> None:
        scheme, filesystem, path = place(name)
        super().__init__(path, filesystem=filesystem, filename_provider=_NAMES)
        self.uri = name if scheme else path  # for processes that run elsewhere
        self.name = without_keys(self.uri)
        self._whole, self._vectors, self._errors = (f"{path}/{part}" for part in (JOB_FILE, "vectors", "errors"))
        self._work = f"{path}.partial"
        self._job_file, self._done, self._changed = (f"{self._work}/{part}" for part in (JOB_FILE, "done", "changed"))
        # In the order of their removal: without the job, nobody resumes what is left after a kill.
        self._all = [self._job_file, self._whole, self._vectors, self._errors, self._work]

    def begin(self, job: Job, *, force: bool, restart: bool) -> None:
        """Begin, or go on with the work of an earlier run.

        Raises:
            UsageError: the output is there, or the work is that of another run.
        """
        found = self.filesystem.get_file_info([*self._all, self._changed])
        is_begun, is_whole, *has_parts, has_work, is_changed = (one.type != fs.FileType.NotFound for one in found)
        if is_begun and not is_whole and not restart:
            check_same(self._read_job(), job, f"{self.name}.partial")
            if is_changed:
                raise UsageError(f"{self.name}.partial: an input changed while it was read; start anew with --restart")
        elif force or not (is_whole or any(has_parts)) or (restart and has_work and not is_whole):
            self._remove()
            self._write_job(job)
        else:
            raise UsageError(f"{self.name} is there already; use --force to replace it")
        for folder in (self._vectors, self._errors):
            self.filesystem.create_dir(folder, recursive=True)

    def note_change(self) -> None:
        """Note that a file changed while it was read: no later run goes on with this work, even if it is put back."""
        self.open_output_stream(self._changed).close()

    def hold(self, revision: str | None) -> None:
        """Hold the workers of all runs to the revision of the first one; raise StoppedError for any other."""
        job = self._read_job()
        if job.revision is None and not self._is_held and not self._files(self._vectors):
            self._write_job(replace(job, revision=revision))
        elif job.revision != revision:
            raise StoppedError(
                f"a server has revision {revision} of the model, and other vectors are of {job.revision}: they do not"
                " go together. Give every node the same checkpoint and the same --dtype in --server-args, or start"
                " anew with --restart"
            )
        self._is_held = True

    def checkpoints(self) -> CheckpointConfig:
        """Return where Ray Data notes which rows are done."""
        # An object store renames by copying. After a kill between the two steps Ray Data would find both names: it
        # would remove the part, and go on to count its rows as done.
        names = self._files(self._done)
        for second in names & {f"{name.removesuffix('.parquet')}.pending.parquet" for name in names}:
            self.filesystem.delete_file(second)
        # Were they deleted by Ray Data, a kill in the middle of that would have rows done twice.
        return CheckpointConfig(
            _ID, self._done, override_filesystem=self.filesystem, delete_checkpoint_on_success=False
        )

    def write_block(self, block: BlockAccessor, _: int, ctx: Any) -> None:
        """Write (row, id, vector, note, error) as a part of each folder that gets rows."""
        table = block.to_arrow()
        name = self.filename_provider.get_filename_for_task(ctx.kwargs["write_uuid"], ctx.task_idx)
        failed = compute.is_valid(table["error"])
        parts = {
            self._vectors: table.filter(compute.invert(failed)).select(["id", "vector", _ID, "note"]),
            self._errors: table.filter(failed).select(["id", "error", _ID]),
        }
        for folder, part in parts.items():
            if part.num_rows:
                parquet.write_table(part, f"{folder}/{name}", filesystem=self.filesystem, **PARQUET_OPTIONS)

    def on_write_complete(self, write_result: WriteResult[None]) -> None:
        """Keep the count."""
        self.n_rows = write_result.num_rows

    def finish(self) -> int:
        """Mark the output as whole; return how many rows have errors.

        Raises:
            UsageError: there are no rows.
            StoppedError: no row has a vector.
        """
        vectors, errors = (dataset.dataset(each, filesystem=self.filesystem) for each in (self._vectors, self._errors))
        n_failed: int = errors.count_rows()
        if not vectors.files:
            first = errors.head(1).to_pylist()
            self._remove()  # rows that failed are tried again
            if not n_failed:
                raise UsageError("the input has no rows")
            (row,) = first
            raise StoppedError(f"no row could be embedded; one of them: {row['id']}: {row['error']}")
        self.filesystem.copy_file(self._job_file, self._whole)
        remove(self.filesystem, self._work)
        return n_failed

    def _files(self, folder: str) -> set[str]:
        return {one.path for one in self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))}

    def _remove(self) -> None:
        for old in self._all:
            remove(self.filesystem, old)

    def _read_job(self) -> Job:
        with self.filesystem.open_input_stream(self._job_file) as file:
            return load_job(file.read(), f"{self.name}.partial")

    def _write_job(self, job: Job) -> None:
        self.filesystem.create_dir(self._work, recursive=True)
        with self.open_output_stream(f"{self._job_file}.tmp") as file:
            file.write(job.dump())
        self.filesystem.move(f"{self._job_file}.tmp", self._job_file)
