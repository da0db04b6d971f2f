"""The meaning of lines of vLLM's log: which to show, which are harmless, and what to do about some errors."""

import re

# Every start of this model with these options logs them. They need no action.
HARMLESS = (
    "Enforce eager set, disabling torch.compile",
    "Using custom scheduler class",
    "Inductor compilation was disabled by user settings",
    "Triton is not installed",
    "Reset SSM cache type",
    "Model Runner V2 requires Triton",
    "libiomp is not found in LD_PRELOAD",
    "CPU backend doesn't allow to use `torch.set_num_threads`",
    r"OMP_NUM_THREADS=\d+ is set; leaving Torch threads",
    "Chat template rejected the request",
    r"no matching PunicaWrapper is found; visual\.",  # the adapters are for the language model only
    "deprecated support for supporting different tokenizers",
    # These are printed without vLLM's logging. They are left out when the last lines of a failed server are shown.
    "Triton is installed, but doesn't include CPU backend",
    "No CUDA runtime is found",
    "Found ulimit of",
    "NUMA binding: Using MEMBIND policy",
    r"dispatcher\.py:\d+: FutureWarning",
    "Passing `min_pixels` and `max_pixels` to a processor call is deprecated",
    "Loading safetensors checkpoint shards: ",
)
ADVICE = {
    "No space left on device": "free some space for temporary files and caches (TMPDIR, ~/.cache)",
    "[Oo]ut of memory|MemoryError|[Cc]an(?:'t|not) allocate|(?:No a|A)vailable memory|Free memory on device": (
        "it needs more memory: docs/operations.md#memory; three tasks need least with `all --one-base`"
    ),
    "unrecognized arguments|: error: argument": "check the options after the --, which are those of `vllm serve`",
}
_KILLED = 137
_KILLED_ADVICE = "something killed it, perhaps the kernel for lack of memory (dmesg)"
_ELSE = "`jina-v4-serve doctor` checks this machine; --verbose shows vLLM's log here"

# All versions of vLLM put the process before each line they log; 0.26 to 0.31 also before each line they print.
_PREFIX = re.compile(r"^(?:\[[\w-]+\] )?(?:\([\w ]+ pid=\d+\) )?")
_BAD = re.compile(r"(?:^|\) )(?:WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[|^(?:ERROR|CRITICAL): ")
_GOOD = re.compile(r"(?:^|\) )(?:INFO|DEBUG) \d\d-\d\d [\d:]{8} \[|^INFO: ")
_HARMLESS = re.compile("|".join(HARMLESS))
_EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)$")


def without_process(line: str) -> str:
    """Remove the name of the process that printed a line."""
    return _PREFIX.sub("", line)


def is_routine(line: str) -> bool:
    """Tell whether a line needs no action."""
    return bool(_GOOD.search(line) or _HARMLESS.search(line))


def is_warning(line: str) -> bool:
    """Tell whether a line is a logged warning or error that may need action."""
    return bool(_BAD.search(line)) and not is_routine(line)


def exception_of(line: str) -> str:
    """Return the exception in the last line of a traceback, logged or printed; "" for other lines."""
    match = _EXCEPTION.search(without_process(line))
    return match[1] if match else ""


def advice_of(line: str) -> str:
    """Return what to do if a server ended after a line; "" if the line does not explain it."""
    return next((advice for sign, advice in ADVICE.items() if re.search(sign, line)), "")


def advice_after(code: int) -> str:
    """Return what to do if a server ended with an exit code, and no line of its log explains it."""
    return _KILLED_ADVICE if code == _KILLED else _ELSE
