"""The only package that imports vLLM or uses its objects (tests/serve/test_rooms.py checks this).

`plugin` registers `model`, vLLM's Qwen2.5-VL with our pooler. `cpu_kernels`, `cpu_products` and `cpu_lora` replace
parts of it on a CPU, `scheduler` its scheduler. `worker` is the process that runs `vllm serve`; `endpoints` adds our
routes to its server, `capacity` measures how much it may accept, `engine` is its engine as the API sees it, `drain`
lets it stop without losing a request. `versions` has the supported versions of vLLM, and the names that moved in them.
"""
