"""Checks the ports: free, or which program answers there."""

import contextlib
import http.client
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from multidict import CIMultiDict

from jina_v4_serve.api.door import revisions_in
from jina_v4_serve.api.keys import Keys
from jina_v4_serve.doctor.finding import Finding, Verdict
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.launch.checks import check_port
from jina_v4_serve.launch.server import json_object, server_url
from jina_v4_serve.settings import read_settings

TIMEOUT_S = 1.0
_NO_ANSWER = (OSError, ValueError, http.client.HTTPException)


def check_ports(host: str, port: int, more_ports: Sequence[int], digests: Mapping[str, str]) -> Iterator[Finding]:
    """Check ports, all at the same time.

    `port` of the host must be free. `more_ports` of 127.0.0.1 are for the servers of `all`, which uses other ports if
    these are not free. `digests` are those of the checkpoints to serve, by task.
    """
    with ThreadPoolExecutor(1 + len(more_ports)) as pool:
        first = pool.submit(check_one_port, host, port, False, digests)
        others = [pool.submit(check_one_port, "127.0.0.1", other, True, digests) for other in more_ports]
        yield from (check.result() for check in (first, *others))


def check_one_port(host: str, port: int, movable: bool, digests: Mapping[str, str]) -> Finding:
    """Check whether a port is free, or what answers there. A `movable` port need not be free."""
    subject = f"port {port}"
    taken: Verdict = "warn" if movable else "FAIL"
    advice_taken = "`all` uses another one" if movable else "stop it, or choose another port: --port"
    try:
        check_port(host, port)
    except PortError as error:
        reason = str(error)
    else:
        return Finding("ok", subject, "free")
    url = server_url(host, port)
    try:
        status, headers, _ = _get(url, "/v1/models")
    except TimeoutError:
        advice = "if it is jina-v4-serve, see its log; else choose another port: --port"
        return Finding(taken, subject, f"in use, and no answer for {TIMEOUT_S:g} s", advice)
    except _NO_ANSWER:
        return Finding(taken, subject, f"{reason.partition('. ')[0]}; no HTTP there", advice_taken)
    kind = headers.get("server", "")
    if "x-jina-v4-task" not in headers and kind != "jina-v4-gateway":
        found = f"another program answers ({kind or 'unnamed'}, status {status})"
        return Finding(taken, subject, found, advice_taken)
    if status == 401:
        advice = "set its key in JINA_V4_API_KEY_FILE to find out more"
        return Finding("warn", subject, "jina-v4-serve runs there, with another key", advice)
    return _check_ours(subject, url, headers, digests)


def _check_ours(subject: str, url: str, headers: Mapping[str, str], digests: Mapping[str, str]) -> Finding:
    revisions = revisions_in(headers)
    served = ", ".join(f"{task} {revision}" for task, revision in revisions.items())
    status, body = 0, b""
    with contextlib.suppress(*_NO_ANSWER):
        status, _, body = _get(url, "/ready")
    if status == 404:
        # vLLM ignores a plugin that it cannot load, and its own routes answer: no prompts, no checks.
        advice = "see its log (Failed to load plugin); stop it, install again, start it again"
        return Finding("FAIL", subject, f"{served}: our routes are not loaded, vLLM's own answer", advice)
    for task, revision in revisions.items():
        if task in digests and not revision.startswith(digests[task][:16]):
            advice = "restart it to serve the new fold; all vectors of an index must have one revision"
            return Finding("warn", subject, f"{task} runs with revision {revision}, the folder has another", advice)
    if status == 200:
        return Finding("ok", subject, f"runs already, ready: {served or 'no task'}")
    advice = "wait for its start, or see its log and docs/operations.md#when-something-fails"
    return Finding("warn", subject, f"runs already, not ready{_reason(body)}: {served or 'no task'}", advice)


def _reason(body: bytes) -> str:
    """Return a server's reason for not being ready, cut to 200 characters."""
    content = json_object(body)
    states = content.get("tasks") or content.get("reason") or content.get("error")
    return f" ({str(states)[:200]})" if states else ""


def _get(url: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
    headers = {}
    with contextlib.suppress(OptionError):
        if key := Keys(read_settings()).first:
            headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, CIMultiDict(response.getheaders()), response.read(65536)
    finally:
        connection.close()
