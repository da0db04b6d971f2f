"""Steps of the real scheduler: those of urgent prompts alone, and those for all. No model computes them."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports

STEP, PART, LONGEST = 2048, 1024, 32_768  # tokens
BLOCK, N_BLOCKS = 16, 2 * LONGEST // 16  # of keys and values
LAST = 999
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 1,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}  # a layer of the published model
COSTLY_CONTEXT = 9408  # tokens, after which one takes twice as long


class Steps:
    """A scheduler, and what happens to its requests."""

    def __init__(
        self, folder: Path, *, is_async: bool = False, most_running: int = 256, n_blocks: int = N_BLOCKS
    ) -> None:
        from jina_v4_serve.vllm_side.scheduler import make_scheduler
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        (folder / "config.json").write_text(json.dumps(MODEL))
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=False)
        config = VllmConfig(
            model_config=ModelConfig(
                str(folder), runner="pooling", skip_tokenizer_init=True, dtype="float32", max_model_len=LONGEST
            ),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=STEP,
                long_prefill_token_threshold=PART,
                max_num_seqs=most_running,
                max_model_len=LONGEST,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
                policy="priority",
                async_scheduling=is_async,
                runner_type="pooling",
            ),
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
        )
        cache.num_gpu_blocks = n_blocks
        attention = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = make_scheduler(
            config,
            kv_cache_config=KVCacheConfig(n_blocks, [], [KVCacheGroupSpec(["layer"], attention)]),
            structured_output_manager=None,
            block_size=BLOCK,
            log_stats=False,
        )
        self.n_preempted = 0

    def add(self, name: str, n_tokens: int, priority: int = 0) -> None:
        from vllm.pooling_params import PoolingParams
        from vllm.v1.request import Request

        self.scheduler.add_request(
            Request(name, [1] * n_tokens, None, PoolingParams(task="embed"), arrival_time=0.0, priority=priority)
        )

    def step(self) -> dict[str, int]:
        """Take a step; return how many tokens of each request it holds."""
        from vllm.v1.outputs import ModelRunnerOutput

        planned = self.scheduler.schedule()
        self.n_preempted += len(planned.preempted_req_ids or ())
        names = list(planned.num_scheduled_tokens)
        found = [self.scheduler.requests[name] for name in names]
        outputs = [torch.zeros(1) if each.num_computed_tokens >= each.num_tokens else None for each in found]
        places = {name: place for place, name in enumerate(names)}
        self.scheduler.update_from_output(planned, ModelRunnerOutput(names, places, pooler_output=outputs))
        return planned.num_scheduled_tokens

    def until_done(self, name: str) -> int:
        """Return how many steps a request takes."""
        n_steps = 0
        while name in self.scheduler.requests:
            self.step()
            n_steps += 1
        return n_steps


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("n_tokens", [16, 128])
def test_queries_have_four_steps_of_their_own_or_an_eighth_of_one_for_all(
    is_async: bool, n_tokens: int, tmp_path: Path
) -> None:
    steps = Steps(tmp_path, is_async=is_async)
    for number in range(40):
        steps.add(f"corpus {number}", 512, LAST)
    for _ in range(2):
        assert sum(steps.step().values()) in (STEP, STEP - 1)  # less one as a text is half-way
        for number in range(min(2, STEP // 8 // n_tokens)):
            steps.add(f"query {number}", n_tokens)
            assert steps.step() == {f"query {number}": n_tokens}
        steps.add("one more", 16)
        of_all = steps.step()
        assert ("one more" in of_all, sum(of_all.values()) >= STEP - 1) == (True, True)


def test_a_query_that_lacks_memory_waits_for_a_step_that_makes_some(tmp_path: Path) -> None:
    steps = Steps(tmp_path, n_blocks=4 * PART // BLOCK + 1)  # one block is vLLM's own
    for number in range(2):
        steps.add(f"long {number}", 2 * PART, LAST)
    steps.step()
    steps.add("query", 2 * PART + BLOCK)
    assert [sum(steps.step().values()) > PART for _ in range(2)] == [False, True]


def test_a_long_query_passes_long_texts_and_begins_no_others(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    for number in range(6):
        steps.add(f"long {number}", 32_000, LAST)
    steps.step()
    for number in range(20):
        steps.add(f"query {number}", 1100)
        assert steps.until_done(f"query {number}") <= 4  # two steps of its own, each behind one for all
    half_way = [each for each in steps.scheduler.running if each.priority]
    assert (len(half_way), steps.n_preempted) == (2, 0)  # what the memory of keys and values is sized for


def test_bulk_work_far_into_long_texts_makes_no_longer_steps(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    for number in range(2):
        steps.add(f"long {number}", 32_000, LAST)
    totals = []
    while steps.scheduler.requests:
        before = {name: request.num_computed_tokens for name, request in steps.scheduler.requests.items()}
        tokens = steps.step()
        cost = sum(n_tokens * (1 + before[name] / COSTLY_CONTEXT) for name, n_tokens in tokens.items())
        totals.append(sum(tokens.values()))
        assert cost <= 1.2 * STEP  # a prompt alone also gets what is left for others
    assert (totals[0], min(totals[:-1]) > STEP / 5) == (STEP, True)


def test_one_priority_alone_is_scheduled_as_by_vllm(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    for number in range(300):
        steps.add(f"text {number}", 16)
    assert len(steps.step()) == STEP // 16


def test_a_query_that_no_place_is_free_for_waits_without_an_empty_step(tmp_path: Path) -> None:
    steps = Steps(tmp_path, most_running=2)
    for number in range(4):
        steps.add(f"long {number}", 3000, LAST)
    steps.step()
    steps.add("query", 16)
    while "query" in steps.scheduler.requests:
        assert steps.step()
