"""The gateway: one address for all tasks. It routes by task or model name and streams bytes; the servers do the rest.

`routing` finds the task of a body, `servers` knows which server is ready, `forward` sends a request to it, `bodies`
limits the memory of bodies, `pages` and `metrics` merge the servers' pages, `connection` reads HTTP, `app` answers
requests, `run` starts and stops the gateway, and watches the file of servers.
"""

from jina_v4_serve.gateway.run import GatewaySettings, parse_servers, run_gateway

__all__ = ["GatewaySettings", "parse_servers", "run_gateway"]
