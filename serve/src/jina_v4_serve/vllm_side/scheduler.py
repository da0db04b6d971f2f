"""Chooses the prompts of a step: urgent prompts get a step of their own while others are running.

vLLM's scheduler continues running prompts, and fills the step of an urgent prompt up with others. So a short query next
to bulk work waits for the running step and then for a full step. Here the second one is short. After two such steps,
or an eighth of a step's tokens, comes a step for all, so bulk work continues however many queries come.

A step of bulk work holds fewer tokens if they are far into long prompts, where each has more tokens to attend to. So it
takes no longer than a full step of short prompts.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jina_v4_serve.api.request import FIRST

_URGENT_SHARE = 8  # an eighth
_URGENT_STEPS = 2
ATTENTION_SLOWER = 2  # than matrix products, for as much arithmetic: measured on an EPYC


class UrgentAlone(Scheduler):
    """vLLM's scheduler, with steps that compute urgent prompts only, and steps of bulk work of even length."""

    _urgent_tokens = 0  # that steps of urgent prompts may still hold before the next step for all

    def schedule(self, *arguments: Any) -> SchedulerOutput:
        """Choose what the next step computes."""
        urgent = self._urgent()
        most_tokens = self.max_num_scheduled_tokens
        longest = self.scheduler_config.long_prefill_token_threshold or most_tokens  # tokens of one prompt
        if urgent:
            for request in self.running:
                if request not in urgent:  # makes vLLM skip a running prompt, whose blocks can still be preempted
                    request.next_decode_eligible_step = self.current_step + 2
            left = (request.num_tokens - request.num_computed_tokens for request in urgent)
            self.max_num_scheduled_tokens = min(most_tokens, sum(min(longest, n_tokens) for n_tokens in left))
        elif any(request.priority != FIRST for request in self.running):
            self.max_num_scheduled_tokens = self._tokens_of_bulk(longest)
        try:
            step = super().schedule(*arguments)
        finally:
            self.max_num_scheduled_tokens = most_tokens
        n_tokens = step.total_num_scheduled_tokens
        if not urgent:
            self._urgent_tokens = most_tokens // _URGENT_SHARE
        else:  # a step without tokens lacks memory for keys and values; a step for all frees some
            least = most_tokens // (_URGENT_SHARE * _URGENT_STEPS)  # the shortest step takes some time too
            self._urgent_tokens = self._urgent_tokens - max(n_tokens, least) if n_tokens else 0
        return step

    def _tokens_of_bulk(self, longest: int) -> int:
        """Return how many tokens the next step may hold to take as long as a full step of short prompts.

        Args:
            longest: how many tokens of one prompt a step holds at most.
        """
        context = costly_context(self.vllm_config.model_config.hf_text_config)
        left = float(self.max_num_scheduled_tokens)  # in tokens at the beginning of a prompt
        n_tokens = 0
        for request in self.running:  # which vLLM schedules first, in this order
            cost = 1 + request.num_computed_tokens / context
            part = min(longest, request.num_tokens - request.num_computed_tokens, int(left / cost))
            n_tokens += part
            left -= part * cost
        return n_tokens + int(left)

    def _urgent(self) -> set[Request]:
        """Return the requests to compute alone in the next step; none if the step is for all."""
        if self._urgent_tokens <= 0 or len({request.priority for request in self.requests.values()}) < 2:
            return set()
        left = [request for request in self.requests.values() if request.num_computed_tokens < request.num_tokens]
        first = min((request.priority for request in left), default=0)
        urgent = {request for request in left if request.priority == first}
        is_room = len(self.running) < self.max_num_active_reqs or not urgent.isdisjoint(self.running)
        return urgent if is_room and len(urgent) < len(left) else set()


def costly_context(config: Any) -> float:
    """Return after how many tokens of its prompt a token takes twice as long to compute as the first one.

    Its attention then takes as long as all else. It is 9,408 for the published model; `config` is the language model's.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)  # of a layer
    return float(weights / (2 * queries) / ATTENTION_SLOWER)


class _AsyncUrgentAlone(UrgentAlone, AsyncScheduler):
    pass


def make_scheduler(vllm_config: VllmConfig, **facts: Any) -> Scheduler:
    """Make the scheduler of an engine; vLLM calls this like the class that `--scheduler-cls` names."""
    scheduler = _AsyncUrgentAlone if vllm_config.scheduler_config.async_scheduling else UrgentAlone
    return scheduler(vllm_config=vllm_config, **facts)
