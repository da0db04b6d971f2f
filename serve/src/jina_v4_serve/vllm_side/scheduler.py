"""Which prompts a step computes: urgent ones alone, while others are under way.

vLLM's scheduler continues what has begun, and fills what an urgent prompt leaves of a step with others: a short query
beside a corpus waits for the step that runs, and then for a full one of its own. Here its own step is short. Urgent
prompts get an eighth of a step's tokens before the next step for all, so the corpus continues whatever else comes.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

_URGENT_SHARE = 8


class UrgentAlone(Scheduler):
    """vLLM's scheduler, but for the steps of urgent prompts."""

    _urgent_tokens = 0  # that urgent prompts may still begin a step of their own with, before the next one for all

    def schedule(self, *arguments: Any) -> SchedulerOutput:
        """Choose what the next step computes."""
        urgent = self._urgent()
        most_tokens = self.max_num_scheduled_tokens
        if urgent:
            for request in self.running:
                if request not in urgent:  # vLLM's way to pass over one that runs; its blocks can still be taken
                    request.next_decode_eligible_step = self.current_step + 2
            longest = self.scheduler_config.long_prefill_token_threshold or most_tokens  # that one prompt gets
            left = (request.num_tokens - request.num_computed_tokens for request in urgent)
            self.max_num_scheduled_tokens = min(most_tokens, sum(min(longest, n_tokens) for n_tokens in left))
        try:
            step = super().schedule(*arguments)
        finally:
            self.max_num_scheduled_tokens = most_tokens
        n_tokens = step.total_num_scheduled_tokens
        if not urgent:
            self._urgent_tokens = most_tokens // _URGENT_SHARE
        else:  # without any token, room for keys and values is missing: a step for all makes some
            self._urgent_tokens = self._urgent_tokens - n_tokens if n_tokens else 0
        return step

    def _urgent(self) -> set[Request]:
        """Return the requests that the next step is for; none if it is for all."""
        if self._urgent_tokens <= 0 or len({request.priority for request in self.requests.values()}) < 2:
            return set()
        left = [request for request in self.requests.values() if request.num_computed_tokens < request.num_tokens]
        first = min((request.priority for request in left), default=0)
        urgent = {request for request in left if request.priority == first}
        is_room = len(self.running) < self.max_num_active_reqs or not urgent.isdisjoint(self.running)
        return urgent if is_room and len(urgent) < len(left) else set()


class _AsyncUrgentAlone(UrgentAlone, AsyncScheduler):
    pass


def make_scheduler(vllm_config: VllmConfig, **facts: Any) -> Scheduler:
    """Make the scheduler of an engine; vLLM calls it as the class that `--scheduler-cls` names."""
    made = _AsyncUrgentAlone if vllm_config.scheduler_config.async_scheduling else UrgentAlone
    return made(vllm_config=vllm_config, **facts)
