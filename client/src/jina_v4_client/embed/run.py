"""A run: begins a work folder or goes on with one, has the rows embedded, puts the output in its place."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jina_v4_client.embed.encoder import Encode
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.inputs import Inputs, Names
from jina_v4_client.embed.job import JOB_FILE, Job, check_same, check_unchanged, read_job, settle_revision, sync_folder
from jina_v4_client.embed.journal import DATABASE, VECTORS, Journal, disk_errors, is_in_use
from jina_v4_client.embed.output import Lines, Shape, beside, check_output, write_output
from jina_v4_client.embed.progress import Progress
from jina_v4_client.embed.work import Settings, Work
from jina_v4_client.errors import JinaV4Error

# Of a work folder, beside the database's; a folder with anything else in it is not removed.
_OWN_FILES = {JOB_FILE, f"{JOB_FILE}.tmp", VECTORS, "ids", "errors", "output"}
# Of 128 numbers: a Qdrant server takes fewer than 1,048,576 numbers in a multi-vector.
_QDRANT_ROWS = 8191
# Asks the server for its revision of the model, and has vectors of any other refused from then on.
HoldRevision = Callable[[], str | None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        left_out: the files in folders that have no rows.
    """

    n_rows: int
    n_failed: int
    left_out: Names = field(default_factory=Names)


@dataclass(frozen=True)
class Run:
    """What is to be done.

    Attributes:
        options: those that decide about the vectors, by the name of the flag; only the same go on with a work folder.
        as_base64: of lines on the standard output: whether vectors are base64.
    """

    inputs: Inputs
    shape: Shape
    options: Mapping[str, object]
    settings: Settings
    as_base64: bool = False
    quiet: bool = False

    def to_file(
        self, encode: Encode, hold_revision: HoldRevision, path: Path, *, force: bool, restart: bool
    ) -> Outcome:
        """Embed into a file, with a work folder beside it from which a run that was ended goes on.

        Raises:
            UsageError: the run cannot begin, or the work folder is of another.
            StoppedError: it cannot go on; what is done is kept.
        """
        try:
            check_output(path, self.shape)
            self.inputs.check_apart(path, [path, *(beside(path, what) for what in ("ids.json", "errors.jsonl"))])
        except OSError as error:
            raise UsageError(f"OUTPUT {path} cannot be written: {error.strerror}") from error
        folder = beside(path, "partial")
        job = Job(self.options, self.inputs.fingerprints())
        total = self.inputs.count()  # reads what can be read of every input, so that a wrong one is found now
        if restart:
            _check_free(path, force=force)
            _discard(folder)
        begun = self._begin(folder, job, path, force=force)
        with Journal(folder, self.shape.kept_as) as journal:
            if not journal.is_finishing:
                _check_free(path, force=force)
            done = journal.count()
            if not begun:
                self._say(f"resuming: {done:,} rows are done")
            try:
                if not journal.is_finishing:
                    revision = _ask(hold_revision)
                    with disk_errors(folder):
                        settle_revision(folder, revision, any_vectors=journal.n_vectors > 0)
                with Progress(total, done, quiet=self.quiet) as progress:
                    work = Work(
                        encode,
                        journal,
                        self.settings,
                        compare=self.inputs.told_apart_by_content,
                        on_progress=progress.add,
                    )
                    outcome = _checked(work.run(self.inputs.rows()), journal)
                check_unchanged(job, self.inputs.fingerprints)
                self._say(progress.summary())
                if self.shape.multivector:
                    self._say_too_long(journal)
                if self.options["id-column"] and (n_repeated := journal.n_repeated_ids()):
                    self._say(f"warning: the ids of {n_repeated:,} rows are those of earlier rows")
            except BaseException:
                nothing_done = journal.count() == 0
                journal.close()
                if nothing_done:
                    _discard(folder)
                raise
            then = read_job(folder)
            facts = {**self.shape.facts, **({"revision": then.revision} if then and then.revision else {})}
            try:
                files = write_output(journal, path, folder, replace(self.shape, facts=facts), self.inputs.left_out)
            except OSError as error:
                raise StoppedError(f"{path} cannot be written: {error.strerror or error}") from error
        _discard(folder)
        self._say("wrote " + ", ".join(map(str, reversed(files))))
        return self._ended(outcome)

    def to_lines(self, encode: Encode, hold_revision: HoldRevision) -> Outcome:
        """Embed into lines of JSON on the standard output; there is nothing to resume.

        Raises:
            UsageError: the run cannot begin.
            StoppedError: it cannot go on.
        """
        total = self.inputs.count()
        _ask(hold_revision)
        # The same work folder, without waiting for the disk: equal content is found however far apart it is.
        with (
            tempfile.TemporaryDirectory(prefix="jina-v4-embed-") as folder,
            Journal(Path(folder), self.shape.kept_as, durable=False) as journal,
            Progress(total, 0, quiet=self.quiet) as progress,
        ):
            lines = Lines(journal, sys.stdout.buffer, self.shape, as_base64=self.as_base64)

            def add(n_rows: int) -> None:
                progress.add(n_rows)
                lines.write_done()

            work = Work(encode, journal, self.settings, on_progress=add)
            outcome = _checked(work.run(self.inputs.rows()), journal, output_needs_a_vector=False)
            lines.write_left_out(self.inputs.left_out())
        return self._ended(outcome)

    def _begin(self, folder: Path, job: Job, path: Path, *, force: bool) -> bool:
        """Make the work folder, or check that it is this run's; tell whether it is new."""
        if folder.is_dir():
            then = read_job(folder)
            if then is not None:
                check_same(then, job, folder)
                return False
            _discard(folder)  # killed before the job was written
        _check_free(path, force=force)
        try:
            folder.mkdir()
            job.write(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made, where the work is kept: {error.strerror}") from error
        return True

    def _ended(self, outcome: Outcome) -> Outcome:
        """Say what somebody should know of the rows, and add the files that have none to what the run came to."""
        for note, names in self.inputs.notes.items():
            self._say(f"note: {names.count:,} {'row' if names.count == 1 else 'rows'}: {note}: {names}")
        left_out = Names()
        for entry in self.inputs.left_out():
            left_out.add(entry.path)
        return replace(outcome, left_out=left_out)

    def _say_too_long(self, journal: Journal) -> None:
        names = Names()
        for row_id in journal.longer_than(_QDRANT_ROWS):
            names.add(row_id)
        if names.count:
            self._say(
                f"warning: {names.count:,} {'multi-vector has' if names.count == 1 else 'multi-vectors have'} over"
                f" {_QDRANT_ROWS:,} rows, which Qdrant refuses; use --pool-factor or --max-length: {names}"
            )

    def _say(self, line: str) -> None:
        if not self.quiet:
            sys.stderr.write(f"{line}\n")


def _ask(hold_revision: HoldRevision) -> str | None:
    try:
        return hold_revision()
    except JinaV4Error as error:
        raise StoppedError(str(error)) from error


def _checked(n_rows: int, journal: Journal, *, output_needs_a_vector: bool = True) -> Outcome:
    """Count once more before the output is written: every row must be there once."""
    n_done, n_failed = journal.count(), journal.count(failed=True)
    if n_rows == 0:
        raise UsageError("the input has no rows")
    if n_done != n_rows:
        raise StoppedError(f"{n_done} rows are done of {n_rows}: this is a mistake of the program")
    if n_failed == n_rows and output_needs_a_vector:
        first = next(row for row in journal.recorded() if row.error is not None)
        raise StoppedError(f"no row could be embedded; the first: {first.id}: {first.error}")
    return Outcome(n_rows, n_failed)


def _discard(folder: Path) -> None:
    """Remove a work folder.

    The job goes first: what is left of the folder after a kill is not work to go on with, and where nothing may be
    removed all stays as it was.
    """
    try:
        if not folder.exists():
            return
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(DATABASE)}
        if strange := sorted(names - _OWN_FILES):
            raise UsageError(f"{folder} is not removed: {strange[0]} in it was not put there by this command")
        if is_in_use(folder):
            raise UsageError(f"{folder} is not removed: another run is at work in it")
        (folder / JOB_FILE).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be removed: {error.strerror}") from error


def _check_free(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; use --force to replace it")
