"""The process that runs vLLM: the same as `vllm serve`, with our arguments and after our checks.

The supervisor starts it: `python -m jina_v4_serve.vllm_side.worker ARGUMENTS OPTIONS`. (The `vllm` command itself does
not work with the CPU build.) It leads its own process group, and its standard input is a pipe. When that pipe ends, the
supervisor is gone (killed, perhaps), and the whole group ends too.
"""

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from jina_v4_serve import heartbeat
from jina_v4_serve.checkpoint import BASE, read_checkpoint
from jina_v4_serve.errors import ServeError
from jina_v4_serve.exported import read_adapters
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.arguments import check_options
from jina_v4_serve.launch.revision import precision, revision
from jina_v4_serve.launch.stopping import when_stdin_ends
from jina_v4_serve.phases import reached
from jina_v4_serve.settings import read_served, read_settings, served_environment, variable_of
from jina_v4_serve.vllm_side.versions import find_vllm, moved


def end_with_parent() -> None:
    """Kill the process group when standard input ends."""
    when_stdin_ends(lambda: os.killpg(0, signal.SIGKILL))


def run_vllm(arguments: Sequence[str], options: Sequence[str]) -> None:
    """Run what `vllm serve` runs.

    Args:
        arguments: ours.
        options: the user's, which win over ours.

    Raises:
        OptionError: an option of the user's would change the vectors.
        CheckpointError: the checkpoint has become incomplete.
    """
    # Ctrl-C during these imports would look like an error of the module that is being imported.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    # vLLM ignores a plugin that it cannot load; imported here, it stops the start.
    import jina_v4_serve.vllm_side.endpoints
    import jina_v4_serve.vllm_side.model  # noqa: F401

    signal.signal(signal.SIGINT, handler)
    moved("cli_env_setup")()
    reached("vLLM imported")
    merged = read_options(arguments, options)
    # Our guard answers browsers, as it also refuses requests that vLLM's own middleware never sees.
    os.environ[variable_of("allowed_origins")] = ",".join(merged.allowed_origins)
    merged.allowed_origins = []
    read_settings()
    # Read again at every restart, as a new fold may have replaced the folder.
    tasks = read_served().tasks
    checkpoint = read_checkpoint(Path(merged.model_tag), BASE if len(tasks) > 1 else tasks[0])
    adapters = read_adapters(checkpoint)
    max_pixels = (merged.mm_processor_kwargs or {}).get("max_pixels")
    computed_in = precision(vars(merged), checkpoint.quantized)
    revisions = [revision(checkpoint, computed_in, max_pixels, adapters.get(task)) for task in tasks]
    os.environ |= served_environment(tasks, revisions)
    if find_vllm():
        os.environ |= cpu.allocator()
    heartbeat.create()
    moved("validate_parsed_serve_args")(merged)
    ServeSubcommand.cmd(merged)


def read_options(arguments: Sequence[str], options: Sequence[str]) -> Namespace:
    """Return vLLM's settings from our arguments and the user's options.

    Raises:
        OptionError: an option would change the vectors.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser = moved("make_arg_parser")
    # No abbreviations, as our own code reads the full names only.
    empty = FlexibleArgumentParser("jina-v4-serve ... --", "any option of `vllm serve`", allow_abbrev=False)
    parser = make_arg_parser(empty)
    ours: Namespace = parser.parse_args(list(arguments))
    replaced = {option.split("=")[0].replace("_", "-") for option in options}
    kept = [argument for argument in arguments if argument.split("=")[0] not in replaced]
    merged: Namespace = parser.parse_args([*kept, *options])
    check_options(vars(ours), vars(merged))
    return merged


def main() -> int:
    """Run vLLM until it ends; return the exit code."""
    arguments, options = (json.loads(text) for text in sys.argv[1:])
    end_with_parent()
    try:
        run_vllm(arguments, options)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the user's screen
        return 1
    except KeyboardInterrupt:  # vLLM raises it for SIGTERM while it starts
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
