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

from pyarrow import compute, fs, parquet  # type: ignore[import-untyped] # it has no types
from ray.data.block import BlockAccessor
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, FilenameProvider, WriteResult

from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.job import JOB_FILE, Job, differences, load_job
from jina_v4_client.embed.output import PARQUET_OPTIONS
from jina_v4_client.embed.places import place, remove, without_keys

_ID = "row"  # the column by which checkpoints know a row
_PENDING = ".pending.parquet"  # ends a checkpoint's name while its part is written


class Output:
    """The two folders, on any file system of pyarrow. As an actor it holds a run together; its name is a lock."""

    def __init__(self, name: str) -> None:
        _, self.filesystem, self.path = place(name)
        self.name, self._work = without_keys(name), f"{self.path}.partial"
        self._own = [f"{self.path}/{part}" for part in (JOB_FILE, "vectors", "errors")]

    def begin(self, job: Job, *, force: bool, restart: bool) -> None:
        """Begin, or go on with the work of an earlier run.

        Raises:
            UsageError: the output is there, or the work is that of another run.
        """
        is_whole, is_begun = self._has(self._own[0]), self._has(f"{self._work}/{JOB_FILE}")
        if (force and (is_whole or not is_begun)) or (restart and not is_whole and self._has(self._work)):
            self._remove()
        then = self._read_job()
        if self._has(self._own[0]) or (then is None and any(map(self._has, self._own))):
            raise UsageError(f"{self.name} is there already; use --force to replace it")
        if then is not None and (different := differences(then, job)):
            raise UsageError(
                f"{self.name}.partial holds the work of another run: {'; '.join(different)}. Give the options and"
                " inputs of that run to go on with it, or --restart to start anew"
            )
        if then is None:
            self._remove()  # checkpoints without a job are those of a folder that was removed by half
        self._write_job(then or job)
        for folder in self._own[1:]:
            self.filesystem.create_dir(folder, recursive=True)
        self._settle_checkpoints()

    def hold(self, revision: str | None) -> str | None:
        """Note the revision of the first worker of the first run; return it to all."""
        if self._job.revision is None and revision is not None:
            self._write_job(replace(self._job, revision=revision))
        return self._job.revision

    def finish(self) -> int:
        """Mark the output as whole; return how many rows have errors.

        Raises:
            UsageError: there are no rows.
            StoppedError: no row has a vector.
        """
        vectors, errors = map(self._parts, self._own[1:])
        if not vectors and not errors:
            self._remove()
            raise UsageError("the input has no rows")
        if not vectors:
            row = parquet.read_table(errors[0], filesystem=self.filesystem).slice(0, 1).to_pylist()[0]
            raise StoppedError(f"no row could be embedded; one of them: {row['id']}: {row['error']}")
        n_failed: int = sum(parquet.read_metadata(part, filesystem=self.filesystem).num_rows for part in errors)
        self.filesystem.copy_file(f"{self._work}/{JOB_FILE}", f"{self.path}/{JOB_FILE}")
        remove(self.filesystem, self._work)
        return n_failed

    def checkpoints(self) -> CheckpointConfig:
        """Return where Ray Data notes which rows are done."""
        # Were they deleted by Ray Data, a kill in the middle of that would have rows done twice.
        path = f"{self._work}/done"
        return CheckpointConfig(_ID, path, override_filesystem=self.filesystem, delete_checkpoint_on_success=False)

    def _has(self, path: str) -> bool:
        return bool(self.filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def _parts(self, folder: str) -> list[str]:
        return [one.path for one in self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))]

    def _remove(self) -> None:
        """Remove all; without the job, which goes first, nobody resumes what is left after a kill."""
        for old in (f"{self._work}/{JOB_FILE}", *self._own, self._work):
            remove(self.filesystem, old)

    def _read_job(self) -> Job | None:
        if not self._has(f"{self._work}/{JOB_FILE}"):
            return None
        with self.filesystem.open_input_stream(f"{self._work}/{JOB_FILE}") as file:
            return load_job(file.read(), f"{self.name}.partial")

    def _write_job(self, job: Job) -> None:
        self._job = job
        self.filesystem.create_dir(self._work, recursive=True)
        with self.filesystem.open_output_stream(f"{self._work}/new") as file:
            file.write(job.dump())
        self.filesystem.move(f"{self._work}/new", f"{self._work}/{JOB_FILE}")

    def _settle_checkpoints(self) -> None:
        """Remove the second name of what is committed.

        An object store renames by copying. After a kill between the two steps Ray Data finds both names: it removes the
        part, and goes on to count its rows as done.
        """
        names = set(self._parts(f"{self._work}/done"))
        for name in names:
            if name.endswith(_PENDING) and name.replace(_PENDING, ".parquet") in names:
                self.filesystem.delete_file(name)


class _Names(FilenameProvider):
    """Names of one length, as Ray Data finds the part of a checkpoint by the beginning of its name."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{write_uuid}-{task_index:012}.parquet"


class Parts(BlockBasedFileDatasink):
    """Writes blocks of (row, id, vector, note, error) as parts; `n_rows` says how many rows, once all are written."""

    n_rows = 0

    def __init__(self, output: Output) -> None:
        super().__init__(output.path, filesystem=output.filesystem, filename_provider=_Names())

    def write_block(self, block: BlockAccessor, _: int, ctx: Any) -> None:
        """Write a part of each table that has rows."""
        table = block.to_arrow()
        name = self.filename_provider.get_filename_for_task(ctx.kwargs["write_uuid"], ctx.task_idx)
        failed = compute.is_valid(table["error"])
        parts = {
            "vectors": table.filter(compute.invert(failed)).select(["id", "vector", _ID, "note"]),
            "errors": table.filter(failed).select(["id", "error", _ID]),
        }
        for folder, part in parts.items():
            if part.num_rows:
                with self.open_output_stream(f"{self.path}/{folder}/{name}") as file:
                    parquet.write_table(part, file, **PARQUET_OPTIONS)

    def on_write_complete(self, write_result: WriteResult[None]) -> None:
        """Keep the count."""
        self.n_rows = write_result.num_rows
