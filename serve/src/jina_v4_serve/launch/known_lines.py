"""What single lines of vLLM's log mean: which are shown, which call for nothing, and what to do about some."""

import re

# Of this model and these options, on every start: there is nothing to do about them, or the launcher has decided so.
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
    r"no matching PunicaWrapper is found; visual\.",  # the adapters are of the language model alone
    "deprecated support for supporting different tokenizers",
    # Printed past vLLM's logging: these are left out of what is shown of a server that has ended.
    "Triton is installed, but doesn't include CPU backend",
    "No CUDA runtime is found",
    "Found ulimit of",
    "NUMA binding: Using MEMBIND policy",
    r"dispatcher\.py:\d+: FutureWarning",
    "Loading safetensors checkpoint shards: ",
)
ADVICE = {
    "No space left on device": "free some space for temporary files and caches (TMPDIR, ~/.cache)",
    "[Oo]ut of memory|MemoryError|[Cc]an(?:'t|not) allocate|(?:No a|A)vailable memory|Free memory on device": (
        "it needs more memory: docs/operations.md#memory; three tasks need least with `all --one-base`"
    ),
    "unrecognized arguments|: error: argument": "look at the options behind the --, which are those of `vllm serve`",
}
_KILLED = 137
_KILLED_ADVICE = "something killed it, perhaps the kernel for want of memory (dmesg)"
_ELSE = "`jina-v4-serve doctor` examines this machine; --verbose shows vLLM's log here"

# vLLM 0.26 to 0.31 put the process before each line that is printed, and all versions before what they log.
_PREFIX = re.compile(r"^(?:\[[\w-]+\] )?(?:\([\w ]+ pid=\d+\) )?")
_BAD = re.compile(r"(?:^|\) )(?:WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[|^(?:ERROR|CRITICAL): ")
_GOOD = re.compile(r"(?:^|\) )(?:INFO|DEBUG) \d\d-\d\d [\d:]{8} \[|^INFO: ")
_HARMLESS = re.compile("|".join(HARMLESS))
_EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)$")


def without_process(line: str) -> str:
    """Return a line without the name of the process that printed it."""
    return _PREFIX.sub("", line)


def is_routine(line: str) -> bool:
    """Tell whether a line calls for nothing."""
    return bool(_GOOD.search(line) or _HARMLESS.search(line))


def is_warning(line: str) -> bool:
    """Tell whether a line is a logged warning or error that may call for something."""
    return bool(_BAD.search(line)) and not is_routine(line)


def exception_of(line: str) -> str:
    """Return the exception that a line of a traceback names, logged or printed; empty where it names none."""
    found = _EXCEPTION.search(without_process(line))
    return found[1] if found else ""


def advice_of(line: str) -> str:
    """Return what to do where a server ended after a line; empty where the line does not tell."""
    return next((advice for sign, advice in ADVICE.items() if re.search(sign, line)), "")


def advice_after(code: int) -> str:
    """Return what to do where a server ended with an exit code, and no line of its log tells."""
    return _KILLED_ADVICE if code == _KILLED else _ELSE
