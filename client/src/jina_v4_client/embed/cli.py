"""The command line: `jina-v4-embed [OPTIONS] INPUT... OUTPUT`.

Exit codes: 0 all rows are in the output; 1 stopped, run it again to go on; 2 the command cannot be run as given; 3 the
output is whole but for rows that were skipped, or for files in a folder that have no rows; 130 and 143 ended by Ctrl-C
and SIGTERM.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jina_v4_client._model import MAX_LENGTH, MIN_PIXELS, TRUNCATE_DIMS
from jina_v4_client.embed.content import Kind
from jina_v4_client.embed.encoder import make_encode
from jina_v4_client.embed.errors import ChangedError, Interrupted, StoppedError, UsageError
from jina_v4_client.embed.inputs import open_inputs
from jina_v4_client.embed.output import FORMATS, QUANTIZED, Shape
from jina_v4_client.embed.ray import Plan
from jina_v4_client.embed.run import Outcome, Run
from jina_v4_client.embed.tables import STDIN, Columns
from jina_v4_client.embed.work import Settings
from jina_v4_client.errors import ArgumentError

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

SKIPPED = 3
BASE_URL = "http://127.0.0.1:8000"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class TaskName(StrEnum):
    """What the vectors are for."""

    RETRIEVAL = "retrieval"
    TEXT_MATCHING = "text-matching"
    CODE = "code"


class PromptName(StrEnum):
    """Which side the texts are on."""

    QUERY = "query"
    PASSAGE = "passage"


class Dtype(StrEnum):
    """How the numbers are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    BINARY = "binary"


class InputFormat(StrEnum):
    """How a table is read."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    TEXT = "text"


class OnError(StrEnum):
    """What becomes of a row that cannot be embedded."""

    STOP = "stop"
    SKIP = "skip"


class Encoding(StrEnum):
    """How lines of JSON hold vectors."""

    FLOAT = "float"
    BASE64 = "base64"


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
    task: Annotated[TaskName, typer.Option(help="What the vectors are for.")],
    base_url: Annotated[
        str | None,
        typer.Option(
            help="The address of the server or gateway; with --ray several, by commas.", show_default=BASE_URL
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Embed on this Ray cluster: HOST:PORT, auto, or local for one of its own. OUTPUT is a folder then.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With --ray: start servers of this merged checkpoint, on every node."),
    ] = None,
    server_args: Annotated[
        str, typer.Option(help="With --ray: arguments of jina-v4-serve, as in '--dtype bfloat16'.")
    ] = "",
    prompt_name: Annotated[PromptName, typer.Option(help="What is put before each text.")] = PromptName.PASSAGE,
    dimensions: Annotated[
        int | None, typer.Option(help=f"{', '.join(map(str, TRUNCATE_DIMS))}; all that the model has without it.")
    ] = None,
    multivector: Annotated[bool, typer.Option("--multivector", help="A vector a token, of 128 dimensions.")] = False,
    pool_factor: Annotated[
        int | None, typer.Option(min=2, help="With --multivector: so many rows become one, on average.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the numbers written; int8, and binary, a bit a number, in .parquet only.")
    ] = Dtype.FLOAT32,
    text_column: Annotated[
        str | None, typer.Option(help='Of texts, in tables. "text" where no --image-column is given.')
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Of images: paths, URLs, data URIs or files.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Of ids; FILE#NUMBER without it.")] = None,
    input_format: Annotated[
        InputFormat | None, typer.Option(help="Of files whose name does not tell it; of the standard input jsonl.")
    ] = None,
    pdf_scale: Annotated[float, typer.Option(min=0.1, max=20, help="Pixels a point; 1 is 72 dpi.")] = 2.0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Requests in flight; with --ray actors.", show_default="4; with --ray one a GPU"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Texts a request.")] = 16,
    image_batch_size: Annotated[int, typer.Option(min=1, max=2048, help="Images a request.")] = 4,
    max_length: Annotated[
        int, typer.Option(min=1, max=MAX_LENGTH, help="Tokens of a text that are read, the prompt included.")
    ] = MAX_LENGTH,
    max_pixels: Annotated[int | None, typer.Option(min=MIN_PIXELS, help="Larger images are scaled down.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The name of the served model, where the task does not say.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(envvar="JINA_V4_API_KEY_FILE", help="Holds the server's key; JINA_V4_API_KEY without it."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Of a request.")] = 600.0,
    max_retries: Annotated[int, typer.Option(min=0, max=100, help="Of a request; 6 bridge about 20 seconds.")] = 6,
    on_error: Annotated[OnError, typer.Option(help="What becomes of a row that cannot be embedded.")] = OnError.STOP,
    encoding: Annotated[Encoding, typer.Option(help="Of vectors in lines of JSON.")] = Encoding.FLOAT,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier run has done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Embed a corpus. A run that was ended goes on when the same command is given again."""
    with _ended_in_words(None if output == STDIN else output):
        if dimensions is not None and dimensions not in TRUNCATE_DIMS:
            raise UsageError(f"--dimensions {dimensions} is not offered; choose {', '.join(map(str, TRUNCATE_DIMS))}")
        if dimensions is not None and multivector:
            raise UsageError("--dimensions does not go with --multivector: multi-vectors always have 128")
        if pool_factor is not None:
            _check_pooling(multivector=multivector)
        if dtype.value in QUANTIZED and (ray is not None or output == STDIN):
            raise UsageError(f"--dtype {dtype.value} is for an OUTPUT.parquet without --ray; use float32 or float16")
        options: dict[str, object] = {
            "task": task.value,
            "prompt-name": prompt_name.value,
            "dimensions": dimensions,
            "multivector": multivector,
            "pool-factor": pool_factor,
            "max-length": max_length,
            "max-pixels": max_pixels,
            "model": model,
            "pdf-scale": pdf_scale,
        }
        columns = {
            "text-column": "text" if text_column is None and image_column is None else text_column,
            "image-column": image_column,
            "id-column": id_column,
            "input-format": None if input_format is None else input_format.value,
        }
        job_options = {**options, "dtype": dtype.value, **columns}
        table_columns = Columns(columns["text-column"], image_column, id_column)
        batch_sizes: dict[Kind, int] = {"text": batch_size, "image": image_batch_size}
        client = {
            "api_key": _read_key(api_key_file),
            "task": task.value,
            "model": model,
            "timeout_s": timeout_s,
            "max_retries": max_retries,
            "priority": 999,  # the last: queries that come meanwhile go before a corpus
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
                server=[task.value, "--checkpoint", str(Path(checkpoint or "").absolute()), *_split(server_args)],
                client=client,
                batch_sizes=batch_sizes,
                options=job_options,
                skip=on_error is OnError.SKIP,
                quiet=quiet,
            )
            raise typer.Exit(SKIPPED if run_on_ray(plan, force=force, restart=restart) else 0)
        if checkpoint is not None or server_args:
            raise UsageError("--checkpoint and --server-args go with --ray; give one, or neither of these")
        run = Run(
            inputs=open_inputs(inputs, table_columns, columns["input-format"], pdf_scale),
            shape=Shape(dtype.value, multivector, _facts(options, dtype.value)),
            options=job_options,
            settings=Settings(workers or 4, batch_sizes, on_error is OnError.SKIP),
            as_base64=encoding is Encoding.BASE64,
            quiet=quiet,
        )
        with _client(base_url or BASE_URL, client) as calls:
            encode = make_encode(calls, options)
            if output == STDIN:
                outcome = run.to_lines(encode, calls.revision)
            else:
                outcome = run.to_file(encode, calls.revision, Path(output), force=force, restart=restart)
        _tell_skipped(outcome, output)


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


def _facts(options: Mapping[str, object], dtype: str) -> dict[str, object]:
    """What the output says of its vectors: the options that were given, and how quantized ones are read."""
    facts = {name: value for name, value in options.items() if value is not None} | {"dtype": dtype}
    return {**facts, "quantization": QUANTIZED[dtype]} if dtype in QUANTIZED else facts


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
    # Imported no sooner than here: it takes about a second, and mistaken options shall answer at once.
    from jina_v4_client import EmbeddingsClient

    try:
        return EmbeddingsClient(base_url, **arguments)
    except ArgumentError as error:
        raise UsageError(str(error)) from error


def _tell_skipped(outcome: Outcome, output: str) -> None:
    where = "their lines say why" if output == STDIN else f"{output}.errors.jsonl says why"
    if outcome.n_failed:
        sys.stderr.write(f"{outcome.n_failed:,} of {outcome.n_rows:,} rows were skipped; {where}\n")
    if outcome.left_out.count:
        files = "1 file was" if outcome.left_out.count == 1 else f"{outcome.left_out.count:,} files were"
        sys.stderr.write(f"{files} left out; {where}: {outcome.left_out}\n")
    if outcome.n_failed or outcome.left_out.count:
        raise typer.Exit(SKIPPED)


@contextmanager
def _ended_in_words(output: str | None) -> Iterator[None]:
    """Say in one line why a run ends, and how it goes on; without a traceback."""
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
    return f"; what is done is kept in {output}.partial: give the same command again to go on"


def _end(line: str, code: int) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    raise typer.Exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted
