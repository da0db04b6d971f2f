"""The command line: `jina-v4-embed [OPTIONS] INPUT... OUTPUT`.

Exit codes: 0 all rows are in the output; 1 the run stopped, and the same command goes on; 2 the command cannot be run;
3 the output is written, but rows were skipped or files of a folder left out; 130 and 143 ended by Ctrl-C and SIGTERM.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jina_v4_client._model import MAX_LENGTH, MIN_PIXELS, TRUNCATE_DIMS, PromptName, Task
from jina_v4_client.embed.content import Kind
from jina_v4_client.embed.errors import ChangedError, Interrupted, StoppedError, UsageError
from jina_v4_client.embed.files import TableFormat
from jina_v4_client.embed.inputs import open_inputs
from jina_v4_client.embed.output import FORMATS, QUANTIZED
from jina_v4_client.embed.ray import Plan
from jina_v4_client.embed.run import Run
from jina_v4_client.embed.tables import STDIN
from jina_v4_client.embed.work import Settings
from jina_v4_client.errors import ArgumentError

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

SKIPPED = 3
BASE_URL = "http://127.0.0.1:8000"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="JSONL, CSV, parquet or text files, PDF files, images, folders of these, or - for the standard input.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A .parquet, .npy or .safetensors file, or - for lines of JSON.")
    ],
    task: Annotated[Task, typer.Option(help="Task of the vectors.")],
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Address of the server or gateway; with --ray several, separated by commas.", show_default=BASE_URL
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Embed on this Ray cluster: HOST:PORT, auto, or local to start one. OUTPUT is a folder then.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With --ray: start servers of this merged checkpoint, on every node."),
    ] = None,
    server_args: Annotated[
        str, typer.Option(help="With --ray: arguments of jina-v4-serve, as in '--dtype bfloat16'.")
    ] = "",
    prompt_name: Annotated[PromptName, typer.Option(help="Prompt of the texts.")] = "passage",
    dimensions: Annotated[
        int | None,
        typer.Option(help=f"Size of each vector: {', '.join(map(str, TRUNCATE_DIMS))}.", show_default="all"),
    ] = None,
    multivector: Annotated[bool, typer.Option("--multivector", help="One vector of 128 dimensions per token.")] = False,
    pool_factor: Annotated[
        int | None, typer.Option(min=2, help="With --multivector: how many rows become one, on average.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8", "binary"],
        typer.Option(help="Type of the written numbers; int8 and binary (bits) for .parquet only."),
    ] = "float32",
    text_column: Annotated[
        str | None, typer.Option(help="Column of texts in tables.", show_default="text, if no --image-column is set")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images: paths, URLs, data URIs or bytes.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids.", show_default="FILE#NUMBER is the id")] = None,
    input_format: Annotated[
        TableFormat | None,
        typer.Option(help="Format of tables whose name does not show it; jsonl for the standard input."),
    ] = None,
    pdf_scale: Annotated[float, typer.Option(min=0.1, max=20, help="Pixels per point of a page; 1 is 72 dpi.")] = 2.0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="Requests in flight; with --ray actors.",
            show_default="4; with --ray one a GPU",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Texts per request.")] = 16,
    image_batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Images per request.")] = 4,
    max_length: Annotated[
        int, typer.Option(min=1, max=MAX_LENGTH, help="Texts are cut to so many tokens, the prompt included.")
    ] = MAX_LENGTH,
    max_pixels: Annotated[int | None, typer.Option(min=MIN_PIXELS, help="Larger images are scaled down.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the served model.", show_default="by the task")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="JINA_V4_API_KEY_FILE",
            help="File with the API key; else the key is in JINA_V4_API_KEY.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Timeout of a request in seconds.")] = 600.0,
    max_retries: Annotated[
        int, typer.Option(min=0, max=100, help="Retries of a request; 6 last about 20 s without a server.")
    ] = 6,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="Stop at a row that cannot be embedded, or skip it.")
    ] = "stop",
    encoding: Annotated[Literal["float", "base64"], typer.Option(help="Form of vectors in lines of JSON.")] = "float",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the work of an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Embed a corpus. If a run is stopped, run the same command again and it resumes."""
    with _ended_in_words(None if output == STDIN else output):
        if dimensions is not None and dimensions not in TRUNCATE_DIMS:
            raise UsageError(f"--dimensions {dimensions} is not offered; choose {', '.join(map(str, TRUNCATE_DIMS))}")
        if dimensions is not None and multivector:
            raise UsageError("--dimensions does not go with --multivector: multi-vectors always have 128 dimensions")
        if pool_factor is not None:
            _check_pooling(multivector=multivector)
        if dtype in QUANTIZED and (ray is not None or output == STDIN):
            raise UsageError(f"--dtype {dtype} is for an OUTPUT.parquet without --ray; use float32 or float16")
        options: dict[str, Any] = {
            "task": task,
            "prompt-name": prompt_name,
            "dimensions": dimensions,
            "multivector": multivector,
            "pool-factor": pool_factor,
            "max-length": max_length,
            "max-pixels": max_pixels,
            "model": model,
            "pdf-scale": pdf_scale,
            "dtype": dtype,
            "text-column": "text" if text_column is None and image_column is None else text_column,
            "image-column": image_column,
            "id-column": id_column,
            "input-format": input_format,
        }
        batch_sizes: dict[Kind, int] = {"text": batch_size, "image": image_batch_size}
        client_arguments = {
            "api_key": _read_key(api_key_file),
            "task": task,
            "model": model,
            "timeout_s": timeout_s,
            "max_retries": max_retries,
            "priority": 999,  # the last: the server answers live queries before a corpus
        }
        if ray is not None:
            if (base_url is None) == (checkpoint is None):
                raise UsageError("--ray needs either --checkpoint DIR, to start servers, or --base-url of servers")
            if Path(output).suffix in FORMATS or STDIN in (output, *inputs):
                raise UsageError("with --ray INPUTs are files or folders, and OUTPUT is a folder of parquet parts")
            run_on_ray = _import_ray()
            plan = Plan(
                inputs=inputs,
                output=output,
                address=ray,
                n_workers=workers,
                urls=base_url.split(",") if base_url else [],
                server=[task, "--checkpoint", str(Path(checkpoint or "").absolute()), *_split(server_args)],
                client=client_arguments,
                batch_sizes=batch_sizes,
                options=options,
                skip=on_error == "skip",
                quiet=quiet,
            )
            raise typer.Exit(SKIPPED if run_on_ray(plan, force=force, restart=restart) else 0)
        if checkpoint is not None or server_args:
            raise UsageError("--checkpoint and --server-args are for --ray; add --ray ADDRESS, or leave them out")
        rows = open_inputs(inputs, options)
        settings = Settings(workers or 4, batch_sizes, on_error == "skip")
        with _client(base_url or BASE_URL, client_arguments) as client:
            run = Run(client, rows, options, settings, quiet)
            if output == STDIN:
                is_whole = run.to_lines(as_base64=encoding == "base64")
            else:
                is_whole = run.to_file(Path(output), force=force, restart=restart)
        if not is_whole:
            raise typer.Exit(SKIPPED)


def _import_ray() -> Callable[..., int]:
    try:
        from jina_v4_client.embed.ray.run import run
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pandas", "pyarrow"):
            raise
        raise UsageError(
            f"--ray needs {error.name} here; install it with: pip install 'jina-v4-client[embed,ray]'"
        ) from error
    return run


def _check_pooling(*, multivector: bool) -> None:
    if not multivector:
        raise UsageError("--pool-factor is for multi-vectors; add --multivector, or leave it out")
    if find_spec("scipy") is None:
        raise UsageError("--pool-factor needs scipy here; install it with: pip install 'jina-v4-client[embed,pooling]'")


def _split(server_args: str) -> list[str]:
    try:
        return shlex.split(server_args)
    except ValueError as error:
        raise UsageError(f"--server-args {server_args} cannot be read: {error}") from error


def _read_key(file: Path | None) -> str | None:
    try:
        return None if file is None else file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} cannot be read: {error}") from error


def _client(base_url: str, arguments: Mapping[str, Any]) -> "EmbeddingsClient":
    # Imported only here: it takes about a second, and wrong options are to be refused at once.
    from jina_v4_client import EmbeddingsClient

    try:
        return EmbeddingsClient(base_url, **arguments)
    except ArgumentError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _ended_in_words(output: str | None) -> Iterator[None]:
    """Print one line that says why a run ends and how it goes on, instead of a traceback."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except UsageError as error:
        _end(f"error: {error}", 2)
    except ChangedError as error:
        _end(f"error: {error}", 1)
    except StoppedError as error:
        _end(f"error: {error}{_how_to_go_on(output)}", 1)
    except BrokenPipeError:
        raise typer.Exit(128 + signal.SIGPIPE) from None  # nobody reads any more
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        _end(f"error: {where}{error.strerror or error}{_how_to_go_on(output)}", 1)
    except KeyboardInterrupt:
        _end(f"interrupted{_how_to_go_on(output)}", 128 + signal.SIGINT)
    except Interrupted:
        _end(f"ended by SIGTERM{_how_to_go_on(output)}", 128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def _how_to_go_on(output: str | None) -> str:
    if output is None or not os.path.exists(f"{output}.partial"):  # noqa: PTH110 - Path.exists raises for a name that is too long
        return ""
    return f"; what is done is kept in {output}.partial: run the same command again to resume"


def _end(line: str, code: int) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    raise typer.Exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted
