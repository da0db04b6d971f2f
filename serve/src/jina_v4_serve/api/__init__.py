"""One server's HTTP. Nothing here knows vLLM; `vllm_side.endpoints` puts it into vLLM's server.

A request's way: `guard` (before every route: `door`, `keys`), `routes`, `forms` (reads the body), `service` (`budget`,
`images`, `pdf` and `prompts`, then the engine), `forms` again (writes the reply). `record` holds the facts of a request
for `metrics` and `log`; all of them raise `errors`. `canary`, `start_check` and `liveness` watch the server.
"""
