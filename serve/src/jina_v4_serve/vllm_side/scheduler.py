"""Which prompts a step computes: urgent ones alone, while others are under way.

vLLM's scheduler goes on with what has begun, and fills what an urgent prompt leaves of a step with others: a short
query beside a corpus waits for the step that runs, and for a full one of its own. Here its own step is short. Every
other step is vLLM's, so that the corpus goes on however many queries come.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class UrgentAlone(Scheduler):
    """vLLM's scheduler, but for the steps of urgent prompts."""

    _was_alone = False  # whether the last step was for urgent prompts alone

    def schedule(self, *arguments: Any) -> SchedulerOutput:
        """Choose what the next step computes."""
        urgent = self._urgent()
        self._was_alone = bool(urgent)
        most_tokens = self.max_num_scheduled_tokens
        if urgent:
            for request in self.running:
                if request not in urgent:  # vLLM's way to pass over one that runs; its blocks can still be taken
                    request.next_decode_eligible_step = self.current_step + 2
            longest = self.scheduler_config.long_prefill_token_threshold or most_tokens  # that one prompt gets
            left = (request.num_tokens - request.num_computed_tokens for request in urgent)
            self.max_num_scheduled_tokens = min(most_tokens, sum(min(longest, n_tokens) for n_tokens in left))
        try:
            return super().schedule(*arguments)
        finally:
            self.max_num_scheduled_tokens = most_tokens

    def _urgent(self) -> set[Request]:
        """Return the requests that the next step is for; none if it is for all."""
        if self._was_alone or len({request.priority for request in self.requests.values()}) < 2:
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
