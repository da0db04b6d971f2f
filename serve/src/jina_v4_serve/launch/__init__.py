"""From a checkpoint to a server that keeps running. Nothing here imports vLLM.

`server` says what one server is started with and checks it; `arguments` writes vLLM's options; `sizing` has all sums of
memory; `cpu` and `gpu` look at the machine; `supervisor` keeps a server's process running; `fleet` runs three of them
behind the gateway; `stopping` says when they end.
"""
