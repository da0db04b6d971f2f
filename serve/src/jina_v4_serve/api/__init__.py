"""One server's HTTP. Nothing here uses vLLM; `vllm_side.endpoints` adds these routes to vLLM's server.

A request passes `guard` (before every route: `door`, `keys`), `routes`, `forms` (reads the body), `service` (`budget`,
`images`, `pdf` and `prompts`, then the engine), and `forms` again (writes the reply). `record` holds the facts of a
request for `metrics` and `log`; `errors` are raised everywhere. `canary`, `start_check` and `liveness` check the
server.
"""
