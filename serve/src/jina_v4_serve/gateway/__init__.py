"""The gateway: one address for all tasks. It routes by task or model name and streams bytes; the rest is the servers'.

`routing` tells which task a body is for, `servers` knows which server is ready, `metrics` merges what they count,
`app` answers requests, `run` starts and stops it.
"""

from jina_v4_serve.gateway.run import GatewaySettings, parse_servers, run_gateway

__all__ = ["GatewaySettings", "parse_servers", "run_gateway"]
