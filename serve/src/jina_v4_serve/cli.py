"""The command `jina-v4-serve`: a command for each task, `all` of them behind a gateway, and the `gateway` alone."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jina_v4_serve.errors import ServeError
from jina_v4_serve.facts import GATEWAY_PORT, PORTS, TASKS
from jina_v4_serve.settings import Settings, variable_of


class Commands(TyperGroup):
    """The commands; the error for any other name lists them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command by its name."""
        if cmd_name not in self.commands:
            raise typer.BadParameter(f"{cmd_name!r} is not one of {', '.join(map(repr, self.commands))}", ctx)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's, or float32 where a CPU is slow in that), bfloat16, float16, float32."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(help="Largest image area; larger images are scaled down.", show_default="the checkpoint's"),
]
DefaultTask = Annotated[
    str | None,
    typer.Option(
        help="Of requests that name no task. The hosted API takes text-matching.",
        show_default="none",
    ),
]
VllmOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[-- VLLM_OPTION]...", help="Any option of `vllm serve`.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show all of vLLM's log here, where it goes to a file otherwise.")
]
MaxBodyBytes = Annotated[
    int,
    typer.Option(help="Largest request body.", envvar=variable_of("max_body_bytes"), show_envvar=False, min=1),
]


@app.callback()
def main() -> None:
    """Serve jina-embeddings-v4 on OpenAI-compatible addresses."""


def _add_task(task: str) -> None:
    @app.command(task, help=f"Serve the {task} task.")
    def serve_task(
        checkpoint: Annotated[Path, typer.Option(help="Folder of the merged checkpoint of that task.")],
        host: Host = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen on.")] = PORTS[task],
        dtype: Dtype = "auto",
        max_pixels: MaxPixels = None,
        supervised: Annotated[
            bool,
            typer.Option("--supervised", help="Another program watches: end with the standard input, restart nothing."),
        ] = False,
        verbose: Verbose = False,
        vllm_options: VllmOptions = None,
    ) -> None:
        from jina_v4_serve.launch.checks import prepare
        from jina_v4_serve.launch.screen import Screen, example, open_logs, say_checked
        from jina_v4_serve.launch.server import ServerSettings
        from jina_v4_serve.launch.stopping import when_stdin_ends
        from jina_v4_serve.launch.supervisor import Policy, Supervisor, supervise

        settings = ServerSettings(task, checkpoint, host, port, dtype, max_pixels, tuple(vllm_options or ()))

        def run() -> Coroutine[Any, Any, int]:
            began = time.monotonic()
            launch = prepare(settings)
            typer.echo(launch.banner)
            (log,) = open_logs([settings], verbose)
            say_checked(began)
            screen = Screen(task, log, example=example(launch.url, task), began=began)
            if supervised:
                when_stdin_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
            policy = Policy(max_restarts=0) if supervised else None
            return supervise(Supervisor(task, launch.command, launch.url, launch.environment, policy, screen=screen))

        _run(run)


for _task in TASKS:
    _add_task(_task)


@app.command("all")
def serve_all(
    checkpoints: Annotated[
        Path, typer.Option(help="Folder that holds the three merged checkpoints, or with --one-base an export.")
    ],
    one_base: Annotated[
        bool, typer.Option("--one-base", help="One server with the base once and the three adapters beside it.")
    ] = False,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway.")] = GATEWAY_PORT,
    dtype: Dtype = "auto",
    max_pixels: MaxPixels = None,
    max_body_bytes: MaxBodyBytes = Settings.max_body_bytes,
    default_task: DefaultTask = None,
    verbose: Verbose = False,
    vllm_options: VllmOptions = None,
) -> None:
    """Serve all three tasks on one address, with a server each on this machine, or with one for all."""
    from jina_v4_serve.gateway import GatewaySettings
    from jina_v4_serve.launch.fleet import serve_fleet
    from jina_v4_serve.launch.server import ServerSettings

    if one_base and default_task:
        raise typer.BadParameter("--default-task is of several servers: with --one-base every request names its task")
    common = ServerSettings("", checkpoints, dtype=dtype, max_pixels=max_pixels, vllm_options=tuple(vllm_options or ()))
    gateway = GatewaySettings(host=host, port=port, max_body_bytes=max_body_bytes, default_task=default_task)
    _run(lambda: serve_fleet(common, gateway, one_base, verbose))


@app.command("fits")
def fits(
    checkpoints: Annotated[Path, typer.Option(help="Folder that holds the three merged checkpoints.")],
    dtype: Dtype = "auto",
) -> None:
    """Say whether `all` has room on this machine: exit code 0 if so, 1 if --one-base is to be used, 2 for an error."""
    from jina_v4_serve.launch.checks import check_dtype
    from jina_v4_serve.launch.sizing import fit

    try:
        check_dtype(dtype)
        found = fit(checkpoints, dtype)
    except ServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(found.line)
    raise typer.Exit(0 if found.fits else 1)


@app.command("gateway")
def serve_gateway(
    server: Annotated[
        list[str] | None, typer.Option(metavar="TASK=URL", help="A server and its task; once for each task.")
    ] = None,
    servers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TASK=URL lines instead; read again when they change and on SIGHUP."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = GATEWAY_PORT,
    max_body_bytes: MaxBodyBytes = Settings.max_body_bytes,
    default_task: DefaultTask = None,
) -> None:
    """Put one address before servers that already run."""
    from jina_v4_serve.gateway import GatewaySettings, parse_servers, run_gateway

    if bool(server) == bool(servers):
        raise typer.BadParameter("give --server once for each task, or --servers with a file, not both")

    _run(
        lambda: run_gateway(
            GatewaySettings(
                parse_servers(server or []),
                host,
                port,
                max_body_bytes,
                servers_file=servers,
                default_task=default_task,
            )
        )
    )


@app.command("doctor")
def examine_machine(
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder that holds the three merged checkpoints, as for `all`.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of one merged checkpoint, as for a task.")] = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="8000, and 8001 to 8003 of the tasks")
    ] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    programs: Annotated[
        bool, typer.Option("--programs", help="Say what to type into Open WebUI, Dify and others, and end.")
    ] = False,
) -> None:
    """Say what is wrong with this machine, checkpoints or settings; start nothing."""
    from jina_v4_serve import doctor

    if programs:
        from jina_v4_serve.doctor.programs import what_to_type

        typer.echo(what_to_type())
        return
    if checkpoints and checkpoint:
        raise typer.BadParameter("give --checkpoints or --checkpoint, not both")
    findings = doctor.examine(checkpoints, checkpoint, host, port, dtype)
    width = shutil.get_terminal_size((100, 24)).columns
    typer.echo(doctor.as_json(findings) if as_json else doctor.as_text(findings, width))
    raise typer.Exit(any(finding.verdict == "FAIL" for finding in findings))


def _run(prepare_run: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a program; an error in its settings is one line on the screen."""

    async def run() -> int:
        return await prepare_run()

    try:
        code = asyncio.run(run())
    except ServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="jina-v4-serve")
