"""The command line: `jina-v4-serve TASK` serves one task, `all` serves three behind a gateway; and some more."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jina_v4_serve.errors import ServeError
from jina_v4_serve.facts import GATEWAY_PORT, PORTS, TASKS
from jina_v4_serve.settings import Settings, variable_of

MAX_FILES = 65535  # as vLLM wants it; the user's limit may be less


class Commands(TyperGroup):
    """The commands. The error for an unknown name lists them."""

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
    typer.Option(help="auto (the checkpoint's, or float32 on a CPU that is faster in it), bfloat16, float16, float32."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(help="Largest image area; larger images are scaled down.", show_default="the checkpoint's"),
]
DefaultTask = Annotated[
    str | None,
    typer.Option(
        help="The task of requests that name none. The hosted API uses text-matching.",
        show_default="none",
    ),
]
VllmOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[-- VLLM_OPTION]...", help="Any option of `vllm serve`.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show all of vLLM's log here instead of writing it to a file.")
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
            typer.Option("--supervised", help="For use by another program: end with standard input, restart nothing."),
        ] = False,
        verbose: Verbose = False,
        vllm_options: VllmOptions = None,
    ) -> None:
        from jina_v4_serve.launch.checks import prepare
        from jina_v4_serve.launch.screen import Screen, example, open_logs, say, say_checked
        from jina_v4_serve.launch.server import ServerSettings
        from jina_v4_serve.launch.stopping import when_stdin_ends
        from jina_v4_serve.launch.supervisor import Policy, Supervisor, supervise

        settings = ServerSettings(task, checkpoint, host, port, dtype, max_pixels, tuple(vllm_options or ()))

        async def run() -> int:
            started_at = time.monotonic()
            launch = prepare(settings)
            say(launch.banner)
            (log,) = open_logs([settings], verbose)
            say_checked(started_at)
            screen = Screen(task, log, example=example(launch.url, task), started_at=started_at)
            if supervised:
                when_stdin_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
            policy = Policy(max_restarts=0) if supervised else None
            supervisor = Supervisor(task, launch.command, launch.url, launch.environment, policy, screen=screen)
            return await supervise(supervisor)

        _run(run())


for _task in TASKS:
    _add_task(_task)


@app.command("all")
def serve_all(
    checkpoints: Annotated[
        Path, typer.Option(help="Folder that holds the three merged checkpoints, or with --one-base an export.")
    ],
    one_base: Annotated[
        bool, typer.Option("--one-base", help="Start one server that holds the base once and all three adapters.")
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
    """Serve all three tasks on one address. Each task has a server on this machine, or one server has all."""
    from jina_v4_serve.gateway import GatewaySettings
    from jina_v4_serve.launch.fleet import serve_fleet
    from jina_v4_serve.launch.server import ServerSettings

    if one_base and default_task:
        raise typer.BadParameter("--default-task is not offered with --one-base: every request must name its task")
    common = ServerSettings("", checkpoints, dtype=dtype, max_pixels=max_pixels, vllm_options=tuple(vllm_options or ()))
    gateway = GatewaySettings(host=host, port=port, max_body_bytes=max_body_bytes, default_task=default_task)
    _run(serve_fleet(common, gateway, one_base, verbose))


@app.command("fits")
def fits(
    checkpoints: Annotated[Path, typer.Option(help="Folder that holds the three merged checkpoints.")],
    dtype: Dtype = "auto",
) -> None:
    """Check whether `all` fits this machine: exit code 0 if so, 1 if you should use --one-base, 2 for an error."""
    from jina_v4_serve.launch.checks import check_dtype
    from jina_v4_serve.launch.sizing import fit

    try:
        check_dtype(dtype)
        result = fit(checkpoints, dtype)
    except ServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(result.line)
    raise typer.Exit(0 if result.fits else 1)


@app.command("gateway")
def serve_gateway(
    server: Annotated[
        list[str] | None, typer.Option(metavar="TASK=URL", help="A server and its task; once for each task.")
    ] = None,
    servers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of TASK=URL lines; read again when it changes and on SIGHUP."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = GATEWAY_PORT,
    max_body_bytes: MaxBodyBytes = Settings.max_body_bytes,
    default_task: DefaultTask = None,
) -> None:
    """Serve one address for servers that already run."""
    from jina_v4_serve.gateway import GatewaySettings, parse_servers, run_gateway

    if bool(server) == bool(servers):
        raise typer.BadParameter("use --server once for each task, or --servers with a file, not both")

    async def run() -> int:
        urls = parse_servers(server or [])
        settings = GatewaySettings(urls, host, port, max_body_bytes, servers_file=servers, default_task=default_task)
        return await run_gateway(settings)

    _run(run())


@app.command("doctor")
def examine_machine(
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder that holds the three merged checkpoints, as for `all`.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of one merged checkpoint, as for a task.")] = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="8000; 8001 to 8003 for one task")
    ] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
    programs: Annotated[
        bool, typer.Option("--programs", help="Only show what to type into Open WebUI, Dify and others.")
    ] = False,
) -> None:
    """Report what is wrong with this machine, the checkpoints or the settings; start nothing."""
    from jina_v4_serve import doctor

    if programs:
        from jina_v4_serve.doctor.programs import what_to_type

        typer.echo(what_to_type())
        return
    if checkpoints and checkpoint:
        raise typer.BadParameter("use --checkpoints or --checkpoint, not both")
    findings = doctor.examine(checkpoints, checkpoint, host, port, dtype)
    width = shutil.get_terminal_size((100, 24)).columns
    typer.echo(doctor.as_json(findings) if as_json else doctor.as_text(findings, width))
    raise typer.Exit(any(finding.verdict == "FAIL" for finding in findings))


def _run(program: Coroutine[Any, Any, int]) -> None:
    """Run a program; show an error in its settings as one line."""
    # Services and containers often begin with 1,024 open files. A gateway has two connections for each request.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (hard, resource.RLIM_INFINITY):
        wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        with contextlib.suppress(OSError, ValueError):  # the kernel may allow fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        code = asyncio.run(program)
    except ServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="jina-v4-serve")
