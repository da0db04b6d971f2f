"""The fence: all that imports vLLM or touches its objects. Nothing else may (tests/serve/test_rooms.py).

`plugin` registers `model`, vLLM's Qwen2.5-VL with our pooler; `cpu_kernels`, `cpu_products` and `cpu_lora` replace
parts of it on a CPU.
`worker` is the process that runs `vllm serve`; `endpoints` puts our routes into its server, `engine` is its engine as
the API sees it, `drain` lets it stop without losing a request. `versions` knows which vLLM fits, and what moved in it.
"""
