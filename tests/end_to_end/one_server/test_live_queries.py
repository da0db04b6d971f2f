"""A query beside a corpus has a scheduling step of its own, however much of the corpus waits."""

import asyncio
import re

from conftest import Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient
from wire import TASK, Wire, golden_difference_of

BOUND = 1e-5
N_QUERIES = 16
QUERY_TOKENS = 32  # at most; a bucket of vLLM's histogram of tokens a step


def read(wire: Wire, metric: str) -> int:
    (value,) = re.findall(rf"^vllm:{metric}.*}} (\S+)$", wire.http.get("/metrics").text, re.MULTILINE)
    return round(float(value))


def n_small_steps(wire: Wire) -> int:
    return read(wire, rf'iteration_tokens_total_bucket{{.*le="{QUERY_TOKENS}\.0"')


def test_queries_beside_a_corpus_have_steps_of_their_own(wire: Wire, golden: Golden, figure: Figure) -> None:
    corpus = [" ".join(golden.texts)[:2000]] * 64

    async def embed() -> tuple[int, list[float]]:
        async with (
            AsyncEmbeddingsClient(wire.base_url, task=TASK) as live_client,
            AsyncEmbeddingsClient(wire.base_url, task=TASK, priority=999) as corpus_client,
        ):

            async def send_corpus() -> None:
                while True:
                    await corpus_client.encode_text(corpus)

            senders = [asyncio.create_task(send_corpus()) for _ in range(2)]
            async with asyncio.timeout(60):
                while read(wire, "num_requests_waiting{") == 0:
                    await asyncio.sleep(0.1)
            before = n_small_steps(wire)
            differences = [await golden_difference_of(live_client, golden, "query/0") for _ in range(N_QUERIES)]
            n_alone = n_small_steps(wire) - before
            assert not any(sender.done() for sender in senders)
            for sender in senders:
                sender.cancel()
            await asyncio.wait(senders)
            return n_alone, differences

    n_alone, differences = asyncio.run(embed())
    figure(f"{n_alone} of {N_QUERIES} queries in steps of their own")
    assert max(differences) <= BOUND
    assert n_alone > N_QUERIES / 2  # none where the corpus fills what a query leaves of its step
