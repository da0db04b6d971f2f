"""The environment: our settings, the key, and variables of vLLM's and of proxies that do harm."""

import difflib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from jina_v4_serve.api.settings import KEY, KEY_FILE, read_key, read_settings
from jina_v4_serve.doctor.finding import Finding
from jina_v4_serve.errors import OptionError

PREFIX = "JINA_V4_"
KNOWN = frozenset(
    PREFIX + name
    for name in (
        "API_KEY",
        "API_KEY_FILE",
        "BODY_TIMEOUT_S",
        "FETCH_TIMEOUT_S",
        "IMAGE_HOSTS",
        "LOG",
        "MAX_BODY_BYTES",
        "MAX_IMAGE_BYTES",
        "MAX_IMAGE_PIXELS",
        "MAX_ITEMS",
        "MAX_TOKENS_IN_FLIGHT",
        "SERVED_REVISIONS",
        "SERVED_TASKS",
    )
)
MIN_KEY_LENGTH = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What each of vLLM's variables does when it is on, and how bad that is.
HARMFUL = {
    "VLLM_SERVER_DEV_MODE": "routes that reset and sleep the engine",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "routes that load adapters from anywhere",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "pickle between processes: whoever reaches a socket runs code",
}
NOTEWORTHY = {
    "VLLM_API_KEY": f"vLLM asks for this key beside ours; use {KEY} or {KEY_FILE} alone",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "every answer is written to the log",
    "VLLM_TORCH_PROFILER_DIR": "the profiler can be started, and slows the engine",
    "VLLM_CPU_KVCACHE_SPACE": "it decides about the memory for keys and values, not the launcher",
    "VLLM_CPU_OMP_THREADS_BIND": "threads are as you set them, and vLLM's own executor runs",
    "OMP_NUM_THREADS": "threads are as you set them, and vLLM's own executor runs",
}
_OFF = ("", "0", "false", "False")


def check_settings(host: str) -> Iterator[Finding]:
    """Look at the environment.

    Args:
        host: that is to be listened on.
    """
    yield from check_names()
    yield check_values()
    yield from check_key(host)
    yield from check_vllm_variables()
    yield check_proxies()


def check_names() -> Iterator[Finding]:
    """Find variables that look like ours and are none: nobody would read them."""
    named = sorted(name for name in os.environ if name.startswith(PREFIX))
    for name in named:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1)
            advice = f"perhaps {near[0]} is meant" if near else "docs/serve.md has the list"
            yield Finding("FAIL", "variables", f"{name} is no setting: nobody reads it", advice)
    if all(name in KNOWN for name in named):
        yield Finding("ok", "variables", f"of ours set: {', '.join(named) or 'none'}")


def check_values() -> Finding:
    """Read the settings as a server does."""
    try:
        settings = read_settings("retrieval")
    except OptionError as error:
        return Finding("FAIL", "settings", str(error), "mend it or unset it: a server would not start")
    tokens = settings.max_tokens_in_flight or "32 steps of"
    found = f"{settings.max_items} items, {settings.max_body_bytes} bytes a request; {tokens} tokens in flight"
    return Finding("ok", "settings", found)


def check_key(host: str) -> Iterator[Finding]:
    """See who may call a server, and who may read the key.

    Args:
        host: that is to be listened on.
    """
    try:
        key = read_key()
    except OptionError:  # told by `check_values`
        return
    if key is None:
        if host in LOOPBACK:
            yield Finding("ok", "key", f"none: every program of this machine may call ({host})")
        else:
            advice = f"write one into a file of mode 600 and name it in {KEY_FILE}"
            yield Finding("warn", "key", f"none: whoever reaches {host} may call", advice)
        return
    if len(key) < MIN_KEY_LENGTH:
        yield Finding("warn", "key", f"of {len(key)} characters: it can be guessed", "openssl rand -hex 32")
        return
    if not (path := os.environ.get(KEY_FILE)):
        yield Finding("ok", "key", f"from {KEY}: others of this user see it in /proc; a file is better")
        return
    if os.environ.get(KEY):
        advice = f"unset {KEY}: the file's is what counts"
        yield Finding("warn", "key", f"both {KEY} and {KEY_FILE} are set", advice)
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if mode & stat.S_IROTH:
        yield Finding("warn", "key", f"{path} has mode {mode:o}: every user may read it", f"chmod 600 {path}")
    else:
        yield Finding("ok", "key", f"from {path}, mode {mode:o}")


def check_vllm_variables() -> Iterator[Finding]:
    """Find variables by which vLLM would do what this deployment does not want."""
    n_found = 0
    for name, effect in HARMFUL.items():
        if os.environ.get(name, "") not in _OFF:
            n_found += 1
            yield Finding("FAIL", "vLLM's", f"{name}={os.environ[name]}: {effect}", f"unset {name}")
    for name, effect in NOTEWORTHY.items():
        if os.environ.get(name, "") not in _OFF:
            n_found += 1
            yield Finding("warn", "vLLM's", f"{name} is set: {effect}", "unset it unless you mean it")
    others = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name not in ("", "jina_v4")]
    if others:
        n_found += 1
        found = f"VLLM_PLUGINS: {', '.join(others)} will be loaded beside ours"
        yield Finding("warn", "vLLM's", found, "unset it unless you trust these with every request")
    if not n_found:
        yield Finding("ok", "vLLM's", "no variable of vLLM's that does harm")


def check_proxies() -> Finding:
    """See whether programs of this machine would send a request for this machine to a proxy."""
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    if not proxies:
        return Finding("ok", "proxies", "none for http")
    excepted = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "").split(",")
    if "*" in excepted or any(host in excepted for host in LOOPBACK):
        return Finding("ok", "proxies", f"{', '.join(proxies)}; not for this machine")
    found = f"{', '.join(proxies)}: curl and many clients send requests for 127.0.0.1 there too"
    return Finding("warn", "proxies", found, "export NO_PROXY=127.0.0.1,localhost")
