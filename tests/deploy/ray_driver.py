"""Deploys deploy/ray/serve_app.py on a Ray of its own, as told by lines of JSON settings; ends with its standard input.

It answers with a line that begins with `> `: that a deployment is done, or to "status" the replicas by state.
"""

import json
import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"  # the autoscaler hears of load so often

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy/ray"))

import ray
from jina_v4_serve.ray.settings import RaySettings
from ray import serve
from serve_app import app

OBJECT_STORE_BYTES = 100 * 2**20


def say(line: str) -> None:
    print(f"> {line}", flush=True)  # Ray, too, says things here


def main() -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    for line in sys.stdin:
        if line.strip() == "status":
            deployments = serve.status().applications["default"].deployments
            say(json.dumps({name: dict(found.replica_states) for name, found in deployments.items()}))
        else:
            serve.run(app(RaySettings.model_validate_json(line)))
            say("deployed")
    serve.shutdown()
    ray.shutdown()


main()
