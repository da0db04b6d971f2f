"""Checks the environment: our settings, the keys, and harmful variables of vLLM and of proxies."""

import difflib
import os
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jina_v4_serve.api.keys import Keys
from jina_v4_serve.doctor.finding import Finding
from jina_v4_serve.errors import OptionError
from jina_v4_serve.heartbeat import HEARTBEAT
from jina_v4_serve.launch.server import LOOPBACK
from jina_v4_serve.launch.variables import harmful
from jina_v4_serve.phases import STARTED
from jina_v4_serve.settings import (
    PREFIX,
    SERVED_REVISIONS,
    SERVED_TASKS,
    VARIABLES,
    Settings,
    read_settings,
    variable_of,
)

KEY, KEY_FILE, IMAGE_HOSTS = (variable_of(name) for name in ("api_key", "api_key_file", "image_hosts"))
KNOWN = frozenset((*VARIABLES, SERVED_TASKS, SERVED_REVISIONS, HEARTBEAT, STARTED))
MIN_KEY_LENGTH = 16
# The effects of variables of vLLM: these are refused, the others are worth a warning.
HARMFUL = {
    "VLLM_SERVER_DEV_MODE": "routes that reset and sleep the engine",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "routes that load adapters from anywhere",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "pickle between processes: whoever reaches a socket can run code",
}
NOTEWORTHY = {
    "VLLM_API_KEY": f"vLLM requires this key in addition to ours; use only {KEY} or {KEY_FILE}",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "every reply is written to the log",
    "VLLM_TORCH_PROFILER_DIR": "the profiler can be started, and slows the engine",
    "VLLM_CPU_KVCACHE_SPACE": "it sets the memory for keys and values, not the launcher",
    "VLLM_CPU_OMP_THREADS_BIND": "it sets the threads, and vLLM's own executor runs",
    "OMP_NUM_THREADS": "it sets the threads, and vLLM's own executor runs",
}
_OFF = ("", "0", "false", "False")


def check_settings(host: str) -> Iterator[Finding]:
    """Check the environment of a server that will listen on a host."""
    yield from check_names()
    try:
        settings = read_settings()
        keys = Keys(settings)
    except OptionError as error:
        yield Finding("FAIL", "settings", str(error), "correct or unset it: a server would not start")
    else:
        work = f"{settings.max_tokens_in_flight} tokens" if settings.max_tokens_in_flight else "10 s of work"
        found = f"{settings.max_items} items, {settings.max_body_bytes / 2**20:g} MiB per request; {work} in flight"
        yield Finding("ok", "settings", found)
        yield from check_keys(keys, settings, host)
        yield from check_image_hosts(settings)
    yield from check_vllm_variables()
    yield check_proxies()


def check_names() -> Iterator[Finding]:
    """Find variables with our prefix that are not settings: they have no effect."""
    names = sorted(name for name in os.environ if name.startswith(PREFIX))
    for name in names:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1)
            advice = f"did you mean {near[0]}?" if near else "docs/serve.md has the list"
            yield Finding("FAIL", "variables", f"{name} is not a setting and has no effect", advice)
    if KNOWN.issuperset(names):
        yield Finding("ok", "variables", f"set: {', '.join(names) or 'none'}")


def check_keys(keys: Keys, settings: Settings, host: str) -> Iterator[Finding]:
    """Check who may call a server that listens on a host, and who may read the keys."""
    if keys.open:
        if host in LOOPBACK:
            yield Finding("ok", "key", f"none: every program on this machine may call ({host})")
        else:
            advice = f"write one into a file of mode 600 and set {KEY_FILE} to its path"
            yield Finding("warn", "key", f"none: whoever reaches {host} may call", advice)
        return
    if short := [name for name, key in keys.all.items() if len(key) < MIN_KEY_LENGTH]:
        found = f"{', '.join(short)}: a key under {MIN_KEY_LENGTH} characters can be guessed"
        yield Finding("warn", "key", found, "openssl rand -hex 32")
        return
    if not settings.api_key_file:
        yield Finding("ok", "key", f"from {KEY}: programs of this user can read it in /proc; a file is safer")
        return
    if settings.api_key:
        advice = f"unset {KEY}: only the file counts"
        yield Finding("warn", "key", f"both {KEY} and {KEY_FILE} are set", advice)
    path = Path(settings.api_key_file)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IROTH:
        yield Finding("warn", "key", f"{path} has mode {mode:o}: every user may read it", f"chmod 600 {path}")
    else:
        yield Finding("ok", "key", f"{len(keys.all)} from {path}, mode {mode:o}")


def check_image_hosts(settings: Settings) -> Iterator[Finding]:
    """Look up the private hosts that image URLs may lead to."""

    def look_up(host: str) -> Finding:
        try:
            addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
        except (OSError, UnicodeError) as error:
            advice = f"write it as this machine can resolve it, or remove it from {IMAGE_HOSTS}"
            return Finding("warn", "image hosts", f"{host} has no address here: {error}", advice)
        return Finding("ok", "image hosts", f"{host}: {', '.join(addresses)}")

    with ThreadPoolExecutor() as pool:
        yield from pool.map(look_up, sorted(settings.image_hosts))


def check_vllm_variables() -> list[Finding]:
    """Find variables that make vLLM do what this deployment excludes."""
    values = {name: value for name, value in os.environ.items() if value not in _OFF}
    findings = [
        Finding("FAIL", "vLLM variables", f"{name}={values[name]}: {effect}", f"unset {name}")
        for name, effect in HARMFUL.items()
        if name in values
    ]
    findings += [
        Finding("FAIL", "vLLM variables", f"{name}={os.environ[name]}: {effect}; no server starts", f"unset {name}")
        for name, effect in harmful(os.environ)
    ]
    findings += [
        Finding("warn", "vLLM variables", f"{name} is set: {effect}", "unset it unless you mean it")
        for name, effect in NOTEWORTHY.items()
        if name in values
    ]
    if others := [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name not in ("", "jina_v4")]:
        found = f"VLLM_PLUGINS: {', '.join(others)} will be loaded in addition to ours"
        findings.append(Finding("warn", "vLLM variables", found, "unset it unless you trust these with every request"))
    return findings or [Finding("ok", "vLLM variables", "none that does harm is set")]


def check_proxies() -> Finding:
    """Check whether programs on this machine would send requests for 127.0.0.1 to a proxy."""
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    if not proxies:
        return Finding("ok", "proxies", "none for http")
    excepted = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "").split(",")
    if "*" in excepted or any(host in excepted for host in LOOPBACK):
        return Finding("ok", "proxies", f"{', '.join(proxies)}; not for this machine")
    found = f"{', '.join(proxies)}: curl and many clients send requests for 127.0.0.1 there too"
    return Finding("warn", "proxies", found, "export NO_PROXY=127.0.0.1,localhost")
