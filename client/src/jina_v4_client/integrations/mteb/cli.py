"""The command line: `python -m jina_v4_client.integrations.mteb [OPTIONS] TASK...`.

Exit codes: 0 every task has a score; 1 stopped, run it again to go on; 2 the command cannot be run as given; 3 some
tasks failed, the others have their scores.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jina_v4_client._model import MAX_LENGTH, MIN_PIXELS, TRUNCATE_DIMS
from jina_v4_client.errors import ArgumentError, ServerError

if TYPE_CHECKING:
    from jina_v4_client.integrations.mteb.encoder import JinaV4Encoder
    from jina_v4_client.integrations.mteb.run import Row

FAILED = 3

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help='Tasks or benchmarks of mteb: STS12, NanoBEIR, JinaVDR, "ViDoRe(v1)".'),
    ],
    base_url: Annotated[str, typer.Option(help="Address of the server or gateway.")] = "http://127.0.0.1:8000",
    out: Annotated[Path, typer.Option(help="Folder of results; a task with a result there is not run again.")] = Path(
        "results"
    ),
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type", help="Only a benchmark's tasks of this type: Retrieval, STS, ...; repeatable.", show_default="all"
        ),
    ] = None,
    multivector: Annotated[bool, typer.Option("--multivector", help="Rank by MaxSim over a vector a token.")] = False,
    dimensions: Annotated[
        int | None,
        typer.Option(help=f"Size of each vector: {', '.join(map(str, TRUNCATE_DIMS))}.", show_default="all"),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=1, max=MAX_LENGTH, help="Texts are cut to so many tokens, the prompt included.")
    ] = MAX_LENGTH,
    max_pixels: Annotated[int | None, typer.Option(min=MIN_PIXELS, help="Larger images are scaled down.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Requests in flight.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Texts per request.")] = 16,
    image_batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Images per request.")] = 4,
    api_key_file: Annotated[
        Path | None,
        typer.Option(envvar="JINA_V4_API_KEY_FILE", help="File with the API key; else the key is in JINA_V4_API_KEY."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Timeout of a request in seconds.")] = 600.0,
    max_retries: Annotated[
        int, typer.Option(min=0, max=100, help="Retries of a request; 6 last about 20 s without a server.")
    ] = 6,
    revision: Annotated[
        str | None,
        typer.Option(help="Revision to file results under, for a server that reports none, such as a stock vLLM."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run tasks again whose result is in the folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no bars.")] = False,
) -> None:
    """Run tasks of MTEB against a server. If a run is stopped, run the same command again and it resumes."""
    # mteb takes three seconds to import; mistaken options shall answer at once.
    from jina_v4_client.integrations.mteb.encoder import JinaV4Encoder
    from jina_v4_client.integrations.mteb.run import evaluate as run
    from jina_v4_client.integrations.mteb.run import find_groups

    logging.getLogger("mteb").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mteb")
    try:
        groups = find_groups(tasks, types or [])
        encoder = JinaV4Encoder(
            base_url,
            None if api_key_file is None else api_key_file.read_text().strip(),
            multivector=multivector,
            truncate_dim=dimensions,
            max_length=max_length,
            max_pixels=max_pixels,
            batch_size=batch_size,
            image_batch_size=image_batch_size,
            max_concurrency=workers,
            timeout_s=timeout_s,
            max_retries=max_retries,
            revision=revision,
        )
    except (ArgumentError, OSError, UnicodeDecodeError) as error:
        _end(f"error: {error}", 2)
    except ServerError as error:
        _end(f"error: {error}", 1)
    failed = 0
    try:
        with encoder:
            _tell(encoder)
            for row in run(encoder, groups, out, overwrite=overwrite, progress=not quiet):
                sys.stdout.write(line_of(row) + "\n")
                sys.stdout.flush()
                failed += row.error is not None
    except ServerError as error:
        _end(f"error: {error}; what is done is kept in {out}: run the same command again to resume", 1)
    except KeyboardInterrupt:
        _end(f"interrupted; what is done is kept in {out}: run the same command again to resume", 130)
    if failed:
        raise typer.Exit(FAILED)


def line_of(row: "Row") -> str:
    """Write a row of the table."""
    score = "-" if row.score is None else f"{row.score:.2f}"
    published = "" if row.published is None else f"  published {row.published:.2f}"
    reason = "" if row.error is None else f"  {row.error}"
    return f"{row.name:<48} {row.metric:<16} {score:>6}{published}{reason}"


def _tell(encoder: "JinaV4Encoder") -> None:
    served = ", ".join(f"{task} {revision or '(untold)'}" for task, revision in encoder.revisions.items())
    sys.stderr.write(f"served: {served}\nscores in percent\n")


def _end(line: str, code: int) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    raise typer.Exit(code)
