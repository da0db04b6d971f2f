"""Reads those of the user's vLLM options on which our own options depend."""

import re
from collections.abc import Sequence

from jina_v4_serve.errors import OptionError

# The units that vLLM allows after a number: 16k is 16,000 tokens, 16K is 16,384.
_UNITS = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate("kmgt", 1)},
    **{unit: 1024**n for n, unit in enumerate("KMGT", 1)},
}

# With these, vLLM chooses the number of API processes, or does not allow to set it.
_DATA_PARALLEL = ("--data-parallel", "-dp", "--headless")

# With these, one GPU holds less than `sizing` computes.
_HOLDING_LESS = ("--quantization", "-q", "--cpu-offload", "--offload", "--kv-cache-memory-bytes")


def check_readable(options: Sequence[str]) -> None:
    """Refuse a file of options: our options would win over it, and `sizing` would not see it.

    Raises:
        OptionError: the message says what to do.
    """
    if any(option.split("=")[0] == "--config" for option in options):
        raise OptionError("--config is not offered: write the options of the file after the --")


def says_tls(options: Sequence[str]) -> bool:
    """Tell whether the options make a server speak HTTPS."""
    return any(option.replace("_", "-").startswith("--ssl-") for option in options)


def value_of(options: Sequence[str], name: str) -> str | None:
    """Return the value of an option; None if it is not set. The last one counts.

    Args:
        options: as `--name=value` or `--name value`, with hyphens or underscores.
        name: such as `--max-model-len`.
    """
    result = None
    for i, option in enumerate(options):
        key, equals, value = option.partition("=")
        if key.replace("_", "-") == name:
            result = value if equals else next(iter(options[i + 1 : i + 2]), None)
    return result


def count_of(options: Sequence[str], name: str) -> int | None:
    """Return the number in an option, read as vLLM reads it; None if there is no number."""
    number = re.fullmatch(r"(\d+(?:\.\d+(?=[kmgt]))?)([kmgtKMGT]?)", (value_of(options, name) or "").strip())
    return int(float(number[1]) * _UNITS[number[2]]) if number else None


def says_parallel(options: Sequence[str]) -> bool:
    """Tell whether the options spread a server over several devices or machines."""
    # -tp, -dp, -dcp, -pp and others; argparse also accepts -t for -tp.
    return any("parallel" in option or option[:2] in ("-t", "-d", "-p") or option == "--headless" for option in options)


def says_data_parallel(options: Sequence[str]) -> bool:
    """Tell whether the options start several engines in one server, or an engine without API processes."""
    return any(option.replace("_", "-").startswith(_DATA_PARALLEL) for option in options)


def says_holding_less(options: Sequence[str]) -> bool:
    """Tell whether the options make one GPU hold less than all weights, keys and values of a server."""
    return says_parallel(options) or any(
        option.replace("_", "-").startswith(_HOLDING_LESS) for option in options if option.startswith("-")
    )
