"""The command `jina-v4-serve`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jina_v4_serve.errors import ServeError
from jina_v4_serve.launcher import PORTS, Settings, serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Task(StrEnum):
    """The tasks that the model has adapters for."""

    RETRIEVAL = "retrieval"
    TEXT_MATCHING = "text-matching"
    CODE = "code"


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    task: Annotated[Task, typer.Argument(help="The task to serve.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the merged checkpoint of that task.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="8001, 8002, 8003 by task")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = "auto",
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Largest image area; larger images are scaled down.", show_default="the checkpoint's"),
    ] = None,
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_OPTION]...", help="Any option of `vllm serve`.")
    ] = None,
) -> None:
    """Serve one task of jina-embeddings-v4 on an OpenAI-compatible address."""
    settings = Settings(
        task=task.value,
        checkpoint=checkpoint,
        host=host,
        port=PORTS[task.value] if port is None else port,
        dtype=dtype,
        max_pixels=max_pixels,
        vllm_options=tuple(vllm_options or ()),
    )
    try:
        serve(settings)
    except ServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
