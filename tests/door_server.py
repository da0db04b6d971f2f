"""A front door without a model: uvicorn, our guard, and routes without an engine.

`python door_server.py PORT [SECONDS]`: an idle connection is closed after so many seconds.
"""

import sys
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI, Request, Response
from jina_v4_serve.api.door import Door
from jina_v4_serve.api.guard import Guard
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.settings import read_settings

app = FastAPI()
app.add_middleware(Guard)
door = Door(read_settings())


@app.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    find_task(await door.read_body(request.headers, request.stream()), ["retrieval"])
    return Response(b'{"data": [{"embedding": [1.0]}]}', media_type="application/json")


@app.get("/v1/models")
def models() -> object:
    return {"object": "list", "data": [{"id": "jina-embeddings-v4-retrieval"}]}


@app.get("/health")
@app.get("/ready")
@app.get("/version")
def page() -> object:
    return {}


@app.get("/metrics")
def breaks() -> None:
    raise RuntimeError("a route that fails")


app.state.jina_v4 = SimpleNamespace()
port, keep_alive_s = (*map(int, sys.argv[1:]), 75)[:2]
app.state.server = server = uvicorn.Server(uvicorn.Config(app, port=port, timeout_keep_alive=keep_alive_s))
server.run()
