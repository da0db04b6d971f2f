"""A small Ray of the tests' own: `python ray_cluster.py` says where it is, and ends with its standard input."""

import os
import sys

import ray

OBJECT_STORE_BYTES = 200 * 2**20

if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # There is no GPU: Ray takes our word for it.
    resources = {"num_cpus": 6, "num_gpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init("local", include_dashboard=False, log_to_driver=False, **resources)
    print(f"> {ray.get_runtime_context().gcs_address}", flush=True)
    sys.stdin.read()
    ray.shutdown()
