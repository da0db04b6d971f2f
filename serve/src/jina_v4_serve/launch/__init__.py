"""From a checkpoint to a server that keeps running. Nothing here imports vLLM.

`checks` checks everything before a start; `server` holds the settings of one server; `arguments` writes vLLM's options;
`sizing` computes memory; `cpu` and `gpu` examine the machine; `supervisor` keeps a server's process running; `fleet`
runs three of them behind the gateway; `stopping` ends them.
"""
