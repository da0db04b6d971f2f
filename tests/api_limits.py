"""A server's limits, for tests of what a request means."""

from jina_v4_merge.prompts import IMAGE_PROMPT, text_prefixes
from jina_v4_serve.api.request import Limits
from jina_v4_serve.checkpoint import Prompts


def limits(*tasks: str) -> Limits:
    return Limits(
        tasks=tasks,
        prompts={task: Prompts(text_prefixes(task), IMAGE_PROMPT) for task in tasks},
        model_names=frozenset({"our-name"}),
        max_length=1000,
        min_pixels=3136,
        max_pixels=602_112,
        max_dimensions=256,
        max_items=4,
    )
