"""`jina-v4-embed` that says at its end how many bytes of objects Ray has brought to the driver: `> BYTES`."""

import sys

from jina_v4_client.embed.cli import app
from ray._private.worker import Worker

N_BYTES = [0]
DESERIALIZE = Worker.deserialize_objects


def count(self, serialized_objects, *arguments, **more):
    N_BYTES[0] += sum(len(one[0]) for one in serialized_objects if one[0] is not None)
    return DESERIALIZE(self, serialized_objects, *arguments, **more)


if __name__ == "__main__":
    Worker.deserialize_objects = count
    try:
        app()
    finally:
        print(f"> {N_BYTES[0]}", file=sys.stderr, flush=True)
