"""A run: begins a work folder or goes on with one, has the rows embedded, and puts the output in its place."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jina_v4_client.embed.encoder import make_encode
from jina_v4_client.embed.errors import ChangedError, StoppedError, UsageError
from jina_v4_client.embed.inputs import Inputs
from jina_v4_client.embed.job import Job, check_unchanged
from jina_v4_client.embed.journal import Journal, disk_errors
from jina_v4_client.embed.output import Lines, beside, check_output, journal_dtype, write_output
from jina_v4_client.embed.progress import Progress
from jina_v4_client.embed.work import Names, Settings, Work
from jina_v4_client.embed.work_folder import (
    begin_work,
    discard_work,
    find_work,
    hold_revision,
    may_be_mixed,
    note_change,
)
from jina_v4_client.errors import JinaV4Error

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

# Of 128 numbers: a Qdrant server takes fewer than 1,048,576 numbers in a multi-vector.
_QDRANT_ROWS = 8191
_DISCARD = "The lines may be of either state of it: discard them and give the same command again"


@dataclass(frozen=True)
class Run:
    """What is to be done, and the client that sends the requests.

    Attributes:
        options: those that decide about the vectors, by the name of the flag; only they are in the work folder's job.
    """

    client: "EmbeddingsClient"
    inputs: Inputs
    options: Mapping[str, Any]
    settings: Settings
    quiet: bool

    def to_file(self, path: Path, *, force: bool, restart: bool) -> bool:
        """Embed into a file, with a work folder beside it from which a run that was ended goes on.

        Returns:
            Whether every row and every file of a folder is in the output.

        Raises:
            UsageError: the run cannot begin, or the work folder is that of another job.
            StoppedError: it cannot go on; what is done is kept.
        """
        try:
            check_output(path, self.options)
            self.inputs.check_apart(path, [path, beside(path, "ids.json"), beside(path, "errors.jsonl")])
        except OSError as error:
            raise UsageError(f"OUTPUT {path} cannot be written: {error.strerror}") from error
        folder = beside(path, "partial")
        job = Job(self.options, self.inputs.fingerprints())
        total = self.inputs.count()  # reads all inputs as far as that is cheap, so that a wrong one is found now
        if restart:
            _check_free(path, force=force)
            discard_work(folder)
        earlier = find_work(folder, job)
        if earlier is None:
            _check_free(path, force=force)
            begin_work(folder, job)
        with Journal(folder, journal_dtype(self.options)) as journal:
            kept = find_work(folder, job) or job  # once more: another run may have been at work until now
            if not journal.is_finishing:
                _check_free(path, force=force)
            done = journal.count()
            if earlier is not None:
                self._say(f"resuming: {done:,} rows are done")
            try:
                if not journal.is_finishing:
                    revision = self._hold_server()
                    with disk_errors(folder):
                        kept = hold_revision(folder, kept, revision, any_vectors=journal.n_vectors > 0)
                with Progress(total, done, quiet=self.quiet) as progress:
                    compare = self.inputs.has_stdin or may_be_mixed(folder)
                    work = self._work(journal, progress.add, compare=compare)
                    n_rows = work.run(self.inputs.rows())
                n_failed = _count_failed(journal, n_rows)
                if n_failed == n_rows:
                    first = next(journal.recorded())
                    raise StoppedError(f"no row could be embedded; the first: {first.id}: {first.error}")
                check_unchanged(job, self.inputs.fingerprints)
            except BaseException:
                try:
                    check_unchanged(job, self.inputs.fingerprints)
                except ChangedError:
                    with contextlib.suppress(OSError):
                        note_change(folder)
                has_vectors = journal.n_vectors > 0
                journal.close()
                if not has_vectors:  # rows that failed are tried again
                    discard_work(folder)
                raise
            self._say(progress.summary())
            self._warn(journal)
            try:
                files = write_output(journal, path, folder, self.options, kept.revision, self.inputs.left_out)
            except OSError as error:
                raise StoppedError(f"{path} cannot be written: {error.strerror or error}") from error
        discard_work(folder)
        self._say("wrote " + ", ".join(map(str, reversed(files))))
        return self._end(work, n_rows, n_failed, f"{beside(path, 'errors.jsonl')} says why")

    def to_lines(self, *, as_base64: bool) -> bool:
        """Embed into lines of JSON on the standard output; such a run is not resumed.

        Args:
            as_base64: whether the lines hold vectors as base64 instead of lists of numbers.

        Returns:
            Whether every row has a vector, and every file of a folder has rows.

        Raises:
            UsageError: the run cannot begin.
            StoppedError: it cannot go on.
        """
        job = Job(self.options, self.inputs.fingerprints())
        total = self.inputs.count()
        self._hold_server()
        # A work folder all the same, to find equal content however far apart; it does not wait for the disk.
        with (
            tempfile.TemporaryDirectory(prefix="jina-v4-embed-") as folder,
            Journal(Path(folder), journal_dtype(self.options), durable=False) as journal,
            Progress(total, 0, quiet=self.quiet) as progress,
        ):
            lines = Lines(journal, sys.stdout.buffer, are_multi=self.options["multivector"], as_base64=as_base64)

            def add(n_rows: int) -> None:
                progress.add(n_rows)
                lines.write_done()

            work = self._work(journal, add, compare=False)
            n_rows = work.run(self.inputs.rows())
            n_failed = _count_failed(journal, n_rows)
            lines.write_left_out(self.inputs.left_out())
        check_unchanged(job, self.inputs.fingerprints, _DISCARD)
        return self._end(work, n_rows, n_failed, "their lines say why")

    def _hold_server(self) -> str | None:
        """Return the server's revision of the model; from now on the client refuses vectors of any other."""
        try:
            return self.client.revision()
        except JinaV4Error as error:
            raise StoppedError(str(error)) from error

    def _work(self, journal: Journal, on_progress: Callable[[int], None], *, compare: bool) -> Work:
        encode = make_encode(self.client, self.options, self.settings.batch_sizes)
        is_piped = self.inputs.has_stdin
        return Work(encode, journal, self.settings, compare=compare, is_piped=is_piped, on_progress=on_progress)

    def _warn(self, journal: Journal) -> None:
        """Warn of vectors and ids that vector stores refuse or mix up."""
        too_long = Names()
        for row_id in journal.longer_than(_QDRANT_ROWS) if self.options["multivector"] else ():
            too_long.add(row_id)
        if too_long.count:
            self._say(
                f"warning: {too_long.counted('multi-vector has', 'multi-vectors have')} over {_QDRANT_ROWS:,} rows,"
                f" which Qdrant refuses; use --pool-factor or --max-length: {too_long}"
            )
        n_repeated = journal.n_repeated_ids()
        if n_repeated is None:
            self._say("warning: repeated ids were not counted: no room for temporary files; set SQLITE_TMPDIR")
        elif n_repeated:
            self._say(f"warning: the ids of {n_repeated:,} rows are those of earlier rows")

    def _end(self, work: Work, n_rows: int, n_failed: int, why: str) -> bool:
        """Say what is worth knowing of the rows and which are missing; return whether none are."""
        for note, names in work.notes.items():
            self._say(f"note: {names.counted('row', 'rows')}: {note}: {names}")
        left_out = Names()
        for entry in self.inputs.left_out():
            left_out.add(entry.path)
        if n_failed:
            sys.stderr.write(f"{n_failed:,} of {n_rows:,} rows were skipped; {why}\n")
        if left_out.count:
            sys.stderr.write(f"{left_out.counted('file was', 'files were')} left out; {why}: {left_out}\n")
        return not n_failed and not left_out.count

    def _say(self, line: str) -> None:
        if not self.quiet:
            sys.stderr.write(f"{line}\n")


def _count_failed(journal: Journal, n_rows: int) -> int:
    """Count the rows without a vector; check before the output is written that every row is in the journal once."""
    n_done = journal.count()
    if n_rows == 0:
        raise UsageError("the input has no rows")
    if n_done != n_rows:
        raise StoppedError(f"internal error: {n_done} of {n_rows} rows are done")
    return journal.count(failed=True)


def _check_free(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; use --force to replace it")
