"""The command line: `jina-v4-merge` and its commands.

torch is imported by the commands, not here, so that help and mistaken arguments answer at once.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from jina_v4_merge.errors import ConfigError, MergeError
from jina_v4_merge.prompts import TASKS, Task

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Options of several commands. typer has no list of literals, so tasks are an enum.
Base = Annotated[str, typer.Option(help="Folder of the base, or the name of a model on the hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a base on the hub.")]
Adapters = Annotated[
    str | None, typer.Option(help="Folder of the adapters, or a name on the hub.", show_default="beside the base")
]
AdaptersRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of --adapters on the hub.")]
SomeTasks = Annotated[list[Task] | None, typer.Option(help="Only this task; repeatable.", show_default="all")]


@app.callback()
def main() -> None:
    """Make stock checkpoints of jina-embeddings-v4, one a task."""


@app.command()
def fold(
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoints into.")],
    task: SomeTasks = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Precision of the weights.")
    ] = "bfloat16",
    revision: Revision = None,
    adapters: Adapters = None,
    adapters_revision: AdaptersRevision = None,
    quantize: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Write the language model's matrices in 8 bits: half the memory."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace existing checkpoints once the new ones are complete."),
    ] = False,
) -> None:
    """Fold the adapters into the base: write a stock checkpoint for each task."""
    with _errors_for_people():
        with _quiet_ctrl_c():
            from jina_v4_merge.fold import fold as fold_base

        start_s = time.monotonic()
        made = fold_base(
            base,
            out,
            _values(task),
            dtype,
            revision,
            adapters=adapters,
            adapters_revision=adapters_revision,
            quantized=quantize,
            force=force,
        )
        precision = "+".join(filter(None, (dtype, quantize)))
        for checkpoint in made:
            typer.echo(f"{checkpoint.folder}: {checkpoint.n_bytes / 1e9:.2f} GB, {precision}")
        typer.echo(f"done in {time.monotonic() - start_s:.1f} s")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of all three, or of an export.")],
    base: Annotated[
        str | None, typer.Option(help="Fold this base again and compare every bit; not for exports.")
    ] = None,
    revision: Revision = None,
    adapters: Adapters = None,
    adapters_revision: AdaptersRevision = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with someone else's checkpoint: a folder, or a name on the hub."),
    ] = None,
    canary: Annotated[
        bool,
        typer.Option(
            "--canary", help="If nothing is wrong, store vectors that a server must reproduce when it starts."
        ),
    ] = False,
) -> None:
    """Check every file, tensor and value of checkpoints; with --base, also fold again and compare."""
    with _errors_for_people():
        with _quiet_ctrl_c():
            from jina_v4_merge.reading.model import open_model
            from jina_v4_merge.reading.sources import find
            from jina_v4_merge.verify.against import compare_with
            from jina_v4_merge.verify.against import report as report_on
            from jina_v4_merge.verify.checks import find_checkpoints
            from jina_v4_merge.verify.checks import verify as verify_checkpoints
            from jina_v4_merge.verify.reference import make_canary
            from jina_v4_merge.verify.refold import compare
            from jina_v4_merge.writing.checkpoint import BASE, GGUF

        start_s = time.monotonic()
        other = None if against is None else find("--against", against).folder
        checkpoints = verify_checkpoints(find_checkpoints(folder), expect_canary=not canary)
        if other is not None and (len(checkpoints) > 1 or checkpoints[0].part is not None):
            raise ConfigError(f"--against compares with one checkpoint of `jina-v4-merge fold`; {folder} is none")
        if other is not None and checkpoints[0].quantized is not None:
            raise ConfigError(
                f"--against compares weights that differ by rounding, and {folder} is {checkpoints[0].quantized}: "
                "fold the task without --quantize to compare"
            )
        model = None
        lines = {checkpoint.folder: checkpoint.summary() for checkpoint in checkpoints}
        if base is not None:
            if exported := [checkpoint.folder for checkpoint in checkpoints if checkpoint.part is not None]:
                raise ConfigError(
                    f"{exported[0]} is part of an export, which --base compares with nothing: leave it out"
                )
            model = open_model(base, revision, adapters, adapters_revision)
            for each in compare(model, [checkpoint for checkpoint in checkpoints if checkpoint.tensors]):
                equal = f"{each.n_folded} folded and {each.n_copied} copied tensors"
                lines[each.checkpoint.folder] += f"; {equal} as folding {base} gives"
        for checkpoint in checkpoints:
            for problem in checkpoint.problems:
                sys.stderr.write(f"error: {problem}\n")
            if checkpoint.problems:
                continue
            typer.echo(lines[checkpoint.folder])
            if canary and checkpoint.part == GGUF:
                typer.echo(f"{checkpoint.folder}: no canary, since no server that reads one loads a GGUF file")
            elif canary and checkpoint.part != BASE:
                typer.echo(f"{checkpoint.folder}: {make_canary(checkpoint, model)}")
        compared = None
        if other is not None and not checkpoints[0].problems:
            compared = compare_with(checkpoints[0], other, model)
            for line in report_on(other, compared):
                typer.echo(line)
        typer.echo(f"done in {time.monotonic() - start_s:.1f} s")
        if any(checkpoint.problems for checkpoint in checkpoints) or (compared and not compared.same_vectors):
            raise typer.Exit(1)


@app.command()
def export_adapters(
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder to write the adapters into.")],
    task: SomeTasks = None,
    revision: Revision = None,
    adapters: Adapters = None,
    adapters_revision: AdaptersRevision = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Also write the base, as a stock checkpoint.")] = False,
) -> None:
    """Write the adapters as PEFT adapters, to serve all tasks from one base."""
    with _errors_for_people():
        with _quiet_ctrl_c():
            from jina_v4_merge.export.adapters import export_adapters as export

        start_s = time.monotonic()
        made = export(
            base,
            out,
            _values(task),
            revision,
            adapters=adapters,
            adapters_revision=adapters_revision,
            with_base=with_base,
        )
        for exported in made:
            typer.echo(f"{exported.folder}: {exported.n_bytes / 1e9:.2f} GB")
        typer.echo(f"done in {time.monotonic() - start_s:.1f} s")


@app.command()
def export_gguf(
    base: Base,
    task: Annotated[Task, typer.Option(help="Task of the adapter to fold.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"],
        typer.Option(help="Precision of the matrices; norms and biases are float32."),
    ] = "bf16",
    revision: Revision = None,
    adapters: Adapters = None,
    adapters_revision: AdaptersRevision = None,
) -> None:
    """Write a task's folded language model as a GGUF file for llama.cpp, and its projector beside it."""
    with _errors_for_people():
        with _quiet_ctrl_c():
            from jina_v4_merge.export.gguf import export_gguf as export

        start_s = time.monotonic()
        made = export(base, out, task.value, dtype, revision, adapters=adapters, adapters_revision=adapters_revision)
        typer.echo(f"{made.folder}: {made.n_bytes / 1e9:.2f} GB, {dtype}")
        typer.echo(f"done in {time.monotonic() - start_s:.1f} s")


@app.command()
def standin(
    folder: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
    size: Annotated[
        Literal["tiny", "full"], typer.Option(help="tiny: 60 MB; full: the published shapes, 8 GB.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a model with random weights in the published file layout."""
    with _errors_for_people():
        with _quiet_ctrl_c():
            from jina_v4_merge.standin.weights import standin as write_standin

        start_s = time.monotonic()
        n_bytes = write_standin(folder, size, seed)
        typer.echo(f"{folder}: {n_bytes / 1e9:.2f} GB, random weights, in {time.monotonic() - start_s:.1f} s")


def _values(tasks: list[Task] | None) -> Sequence[str]:
    return [task.value for task in tasks] if tasks else TASKS


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Print an error as one line, without a traceback, and let SIGTERM and SIGHUP unwind the stack as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    try:
        yield
    except MergeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error


@contextmanager
def _quiet_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once while torch is imported; it would come out as an error of that import."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, handler)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
