"""Reading the user's options of vLLM, as far as ours depend on them."""

import re
from collections.abc import Sequence

from jina_v4_serve.errors import OptionError

# What vLLM lets follow a number: 16k is 16,000 tokens, 16K is 16,384.
_UNITS = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate("kmgt", 1)},
    **{unit: 1024**n for n, unit in enumerate("KMGT", 1)},
}

# Options of data parallelism have vLLM choose the number of API processes, or forbid to name one.
_DATA_PARALLEL = ("--data-parallel", "-dp", "--headless")

# Options by which one GPU holds less than the sums say.
_HOLDING_LESS = ("--quantization", "-q", "--cpu-offload", "--offload", "--kv-cache-memory-bytes")


def check_readable(options: Sequence[str]) -> None:
    """Refuse a file of options: ours would win over it, and our sums would not see it.

    Raises:
        OptionError: saying what to do.
    """
    if any(option.split("=")[0] == "--config" for option in options):
        raise OptionError("--config is not offered: write the options of the file behind the --")


def says_tls(options: Sequence[str]) -> bool:
    """Tell whether by the options a server speaks HTTPS."""
    return any(option.replace("_", "-").startswith("--ssl-") for option in options)


def value_of(options: Sequence[str], name: str) -> str | None:
    """Return the value of the last option of a name; None where there is none.

    Args:
        options: the user's, as `--name=value` or `--name value`.
        name: with its dashes, written with hyphens.
    """
    found = None
    for i, option in enumerate(options):
        said, equals, value = option.partition("=")
        if said.replace("_", "-") == name:
            found = value if equals else next(iter(options[i + 1 : i + 2]), None)
    return found


def count_of(options: Sequence[str], name: str) -> int | None:
    """Return the number that an option holds, read as vLLM reads it; None where there is no number."""
    number = re.fullmatch(r"(\d+(?:\.\d+(?=[kmgt]))?)([kmgtKMGT]?)", (value_of(options, name) or "").strip())
    return int(float(number[1]) * _UNITS[number[2]]) if number else None


def says_parallel(options: Sequence[str]) -> bool:
    """Tell whether the options spread a server over several devices or machines."""
    # -tp, -dp, -dcp, -pp and others; argparse takes -t for -tp.
    return any("parallel" in option or option[:2] in ("-t", "-d", "-p") or option == "--headless" for option in options)


def says_data_parallel(options: Sequence[str]) -> bool:
    """Tell whether the options start several engines in one server, or an engine without API processes."""
    return any(option.replace("_", "-").startswith(_DATA_PARALLEL) for option in options)


def says_holding_less(options: Sequence[str]) -> bool:
    """Tell whether by the options one GPU holds less than a server's weights, keys and values come to."""
    return says_parallel(options) or any(
        option.replace("_", "-").startswith(_HOLDING_LESS) for option in options if option.startswith("-")
    )
