"""Chooses the prompts of a step: urgent prompts get a step of their own while others are running.

vLLM's scheduler continues running prompts, and fills the step of an urgent prompt up with others. So a short query next
to bulk work waits for the running step and then for a full step. Here the second one is short. Urgent prompts may use
an eighth of a step's tokens before the next step for all, so bulk work continues however many queries come.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

_URGENT_SHARE = 8  # an eighth


class UrgentAlone(Scheduler):
    """vLLM's scheduler, with steps that compute urgent prompts only."""

    _urgent_tokens = 0  # that steps of urgent prompts may still hold before the next step for all

    def schedule(self, *arguments: Any) -> SchedulerOutput:
        """Choose what the next step computes."""
        urgent = self._urgent()
        most_tokens = self.max_num_scheduled_tokens
        if urgent:
            for request in self.running:
                if request not in urgent:  # makes vLLM skip a running prompt, whose blocks can still be preempted
                    request.next_decode_eligible_step = self.current_step + 2
            longest = self.scheduler_config.long_prefill_token_threshold or most_tokens  # tokens of one prompt
            left = (request.num_tokens - request.num_computed_tokens for request in urgent)
            self.max_num_scheduled_tokens = min(most_tokens, sum(min(longest, n_tokens) for n_tokens in left))
        try:
            step = super().schedule(*arguments)
        finally:
            self.max_num_scheduled_tokens = most_tokens
        n_tokens = step.total_num_scheduled_tokens
        if not urgent:
            self._urgent_tokens = most_tokens // _URGENT_SHARE
        else:  # a step without tokens lacks memory for keys and values; a step for all frees some
            self._urgent_tokens = self._urgent_tokens - n_tokens if n_tokens else 0
        return step

    def _urgent(self) -> set[Request]:
        """Return the requests to compute alone in the next step; none if the step is for all."""
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
    """Make the scheduler of an engine; vLLM calls this like the class that `--scheduler-cls` names."""
    scheduler = _AsyncUrgentAlone if vllm_config.scheduler_config.async_scheduling else UrgentAlone
    return scheduler(vllm_config=vllm_config, **facts)
