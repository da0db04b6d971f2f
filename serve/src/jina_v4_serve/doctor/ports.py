"""The ports: free, or who answers there, and what with."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message

from jina_v4_serve.api.settings import read_key
from jina_v4_serve.doctor.finding import Finding, Verdict
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.launcher import check_port
from jina_v4_serve.supervisor import server_url

TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Answer:
    """What came of a GET; status 0 where nothing came, late where that was for lack of time."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    late: bool = False


def check_ports(host: str, port: int, more_ports: Sequence[int], digests: Mapping[str, str]) -> Iterator[Finding]:
    """Look at ports, all at one time.

    Args:
        host: to listen on.
        port: that must be free.
        more_ports: of 127.0.0.1, of the servers of `all`, which takes others where these are not free.
        digests: of the checkpoints that are to be served, by task.
    """
    with ThreadPoolExecutor(1 + len(more_ports)) as pool:
        first = pool.submit(check_one_port, host, port, False, digests)
        others = [pool.submit(check_one_port, "127.0.0.1", other, True, digests) for other in more_ports]
        yield from (check.result() for check in (first, *others))


def check_one_port(host: str, port: int, movable: bool, digests: Mapping[str, str]) -> Finding:
    """See whether a port is free, or what answers there.

    Args:
        host: to listen on.
        port: of a server or gateway.
        movable: whether another port is taken where this one is not free.
        digests: of the checkpoints that are to be served, by task.
    """
    subject = f"port {port}"
    taken: Verdict = "warn" if movable else "FAIL"
    advice_taken = "`all` takes another one" if movable else "end it, or choose another port: --port"
    try:
        check_port(host, port)
    except PortError as error:
        reason = str(error)
    else:
        return Finding("ok", subject, "free")
    url = server_url(host, port)
    models = _get(f"{url}/v1/models")
    kind = models.headers.get("server", "")
    ours = "x-jina-v4-task" in models.headers or kind == "jina-v4-gateway"
    if models.late:
        advice = "a server of ours would be stuck: see its log; else choose another port: --port"
        return Finding(taken, subject, f"in use, and silent for {TIMEOUT_S:g} s", advice)
    if not models.status:
        return Finding(taken, subject, f"{reason.partition('. ')[0]}; no HTTP there", advice_taken)
    if not ours:
        found = f"another program answers ({kind or 'unnamed'}, status {models.status})"
        return Finding(taken, subject, found, advice_taken)
    return _check_ours(subject, url, models, digests)


def _check_ours(subject: str, url: str, models: Answer, digests: Mapping[str, str]) -> Finding:
    if models.status == 401:
        advice = "set its key in JINA_V4_API_KEY_FILE to be told more"
        return Finding("warn", subject, "a server of ours runs there, with another key", advice)
    tasks = [task for task in models.headers.get("x-jina-v4-task", "").split(", ") if task]
    revisions = models.headers.get("x-jina-v4-revision", "").split(", ")
    served = ", ".join(f"{task} {revision}" for task, revision in zip(tasks, revisions, strict=False))
    ready = _get(f"{url}/ready")
    if ready.status == 404:
        # vLLM goes on without a plugin that it could not load, and answers by itself: no prompts, no checks.
        advice = "its log says why (Failed to load plugin); stop it, install anew, start it again"
        return Finding("FAIL", subject, f"{served}: our routes are not loaded, vLLM's own answer", advice)
    for task, revision in zip(tasks, revisions, strict=False):
        if task in digests and not revision.startswith(digests[task][:16]):
            advice = "restart it if the new fold is to be served; indexes must be of one revision"
            return Finding("warn", subject, f"{task} runs with revision {revision}, the folder holds another", advice)
    if ready.status == 200:
        return Finding("ok", subject, f"runs already, ready: {served or 'no task'}")
    advice = "wait for its start; else its log, or docs/operations.md#when-something-fails"
    return Finding("warn", subject, f"runs already, not ready{_reason(ready.body)}: {served or 'no task'}", advice)


def _reason(body: bytes) -> str:
    """Return what a server says about not being ready, as far as it is short."""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    if isinstance(content, dict):
        states = content.get("tasks") or content.get("reason") or content.get("error") or ""
        return f" ({str(states)[:200]})" if states else ""
    return ""


def _get(url: str) -> Answer:
    request = urllib.request.Request(url)  # noqa: S310 - an address of this machine
    try:
        key = read_key()
    except OptionError:
        key = None
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy there is: it is this machine
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return Answer(response.status, _lower(response.headers), response.read(65536))
    except urllib.error.HTTPError as error:
        return Answer(error.code, _lower(error.headers), error.read(65536))
    except TimeoutError:
        return Answer(0, {}, b"", late=True)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Answer(0, {}, b"", late=isinstance(getattr(error, "reason", None), TimeoutError))


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
