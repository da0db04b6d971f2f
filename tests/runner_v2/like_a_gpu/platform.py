"""vLLM's CPU platform, with asynchronous scheduling where it was asked for."""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LikeAGpu(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted
