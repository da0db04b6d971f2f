"""The whole way once: serve a merged checkpoint, embed texts and pictures with the client, show what came back.

`make demo` folds the checkpoint first and runs this. The server is a process group of its own on a free port of
127.0.0.1; it ends with this program, however this program ends (but for `kill -9`).
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jina_v4_client import EmbeddingsClient
from numpy.typing import NDArray
from PIL import Image, ImageDraw

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0

# The sentences of the model card: one sunset in nine languages, then its climate query and passage.
SUNSETS = {
    "Arabic": "غروب جميل على الشاطئ",
    "Chinese": "海滩上美丽的日落",
    "French": "Un beau coucher de soleil sur la plage",
    "German": "Ein wunderschöner Sonnenuntergang am Strand",
    "Greek": "Ένα όμορφο ηλιοβασίλεμα πάνω από την παραλία",
    "Hindi": "समुद्र तट पर एक खूबसूरत सूर्यास्त",
    "Italian": "Un bellissimo tramonto sulla spiaggia",
    "Japanese": "浜辺に沈む美しい夕日",
    "Korean": "해변 위로 아름다운 일몰",
}
QUERY = "Overview of climate change impacts on coastal cities"
NEXT = """
Next: make serve-retrieval BASE=standin    the same server, to send requests to
      make serve-retrieval                 the real model, 8 GB from the hub
      README.md                            five lines of Python, and every page"""
PASSAGE = (
    "The impacts of climate change on coastal cities are significant: rising sea levels, more frequent extreme weather"
    " events, and growing damage to infrastructure and homes."
)


def draw_sunset() -> Image.Image:
    """Draw a sun going down over the sea."""
    picture = Image.new("RGB", (560, 420))
    draw = ImageDraw.Draw(picture)
    for y in range(260):
        draw.line([(0, y), (560, y)], fill=(255, 90 + y // 2, 40 + y // 3))
    draw.ellipse([210, 180, 350, 320], fill=(255, 230, 120))
    draw.rectangle([0, 260, 560, 360], fill=(20, 60, 120))
    draw.rectangle([0, 360, 560, 420], fill=(220, 190, 130))
    return picture


def draw_chart() -> Image.Image:
    """Draw a page with a chart of the sea level."""
    picture = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((40, 24), "Sea level, mm above 1993", fill="black", font_size=28)
    draw.line([(60, 420), (600, 420)], fill="black", width=2)
    for i, height in enumerate((8, 24, 39, 52, 78, 99)):
        draw.rectangle([90 + 85 * i, 420 - 3 * height, 140 + 85 * i, 420], fill=(40, 90, 160))
        draw.text((90 + 85 * i, 430), str(1995 + 5 * i), fill="black", font_size=18)
    return picture


def free_port() -> int:
    """Return a free port of 127.0.0.1, below those that the system gives to connections while the server starts."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    sys.exit("no free port found between 20000 and 30000")


@contextmanager
def serving(checkpoint: Path, log: Path) -> Iterator[str]:
    """Run `jina-v4-serve retrieval` on a free port until the block ends; give its address once it answers."""
    port = free_port()
    command: list[str | Path] = [Path(sys.executable).parent / "jina-v4-serve", "retrieval"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--checkpoint", checkpoint, "--port", str(port), "--verbose"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for the first good answer; leave with the end of the log if the server gives up."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to 127.0.0.1
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(OSError, http.client.HTTPException):
            direct.open(url, timeout=5).close()
            return
        time.sleep(0.5)
    lines = log.read_text(errors="replace").splitlines()[-25:]
    sys.exit("the server did not start; the end of its log:\n" + "\n".join(lines))


def has_random_weights(checkpoint: Path) -> bool:
    """Tell from the manifest whether the checkpoint was folded from a stand-in."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return "standin" in manifest["sources"]["base"]


def show(name: str, vectors: list[NDArray[np.float32]], seconds: float) -> None:
    """Print what came back of one call."""
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    shapes = " ".join(sorted({str(vector.shape) for vector in vectors}))
    print(
        f"  {name:<34} {len(vectors)} x {shapes:<8} {vectors[0].dtype}, norm {min(norms):.6f} to {max(norms):.6f},"
        f" {1000 * seconds:.0f} ms"
    )


def timed(call: object, *args: object, **kwargs: object) -> tuple[list[NDArray[np.float32]], float]:
    """Call a method of the client; return its vectors and the seconds it took."""
    begin = time.perf_counter()
    vectors = call(*args, **kwargs)  # type: ignore[operator]
    return vectors, time.perf_counter() - begin


def main() -> None:
    """Serve, embed, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--started", type=float, default=time.time(), help="when `make demo` began, seconds since 1970")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    with tempfile.TemporaryDirectory(prefix="jina-v4-demo-") as folder:
        log = Path(folder) / "server.log"
        print("starting vLLM on the retrieval checkpoint: half a minute to two minutes on a CPU", flush=True)
        begin = time.perf_counter()
        with serving(options.checkpoint, log) as base_url, EmbeddingsClient(base_url=base_url) as client:
            print(f"it answers on {base_url} after {time.perf_counter() - begin:.0f} s\n")
            embed(client)
    print()
    if has_random_weights(options.checkpoint):
        print("These weights are RANDOM (the stand-in's): everything works, and the numbers mean nothing.")
        print("With the real ones: make demo BASE=jinaai/jina-embeddings-v4 (or a folder that holds them).")
    print(f"server stopped; the whole demo took {time.time() - options.started:.0f} s")
    print(NEXT)


def embed(client: EmbeddingsClient) -> None:
    """Embed the texts and pictures and print what came back."""
    pictures = {"picture: sunset": draw_sunset(), "picture: chart": draw_chart()}
    sunsets, seconds = timed(client.encode_text, list(SUNSETS.values()), task="retrieval", prompt_name="passage")
    show("one sunset in nine languages", sunsets, seconds)
    query, seconds = timed(client.encode_text, [QUERY], task="retrieval", prompt_name="query")
    show("the climate query", query, seconds)
    passage, seconds = timed(client.encode_text, [PASSAGE], task="retrieval", prompt_name="passage")
    show("the climate passage", passage, seconds)
    images, seconds = timed(client.encode_image, list(pictures.values()), task="retrieval")
    show("two pictures", images, seconds)
    short, seconds = timed(client.encode_text, [QUERY], task="retrieval", truncate_dim=128)
    show("the query, truncate_dim=128", short, seconds)

    rows = {f"sunset, {name}": vector for name, vector in zip(SUNSETS, sunsets, strict=True)}
    rows |= {"climate passage": passage[0]} | dict(zip(pictures, images, strict=True))
    print(f"\n  {'cosine with':<22} {'climate query':>14} {'sunset, French':>15}")
    for name, vector in rows.items():
        print(f"  {name:<22} {float(vector @ query[0]):>14.3f} {float(vector @ rows['sunset, French']):>15.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the server is stopped")
