"""The routes of the page. Errors are `{"error": {"code", "message"}}`, with a status that fits."""

import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathPart
from jina_v4_client import EmbeddingsClient
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse

from document_search import searching
from document_search.errors import UsageError
from document_search.page.errors import PageError, answer_errors
from document_search.page.guard import HOSTS, SameOrigin
from document_search.page.jobs import Jobs
from document_search.page.uploads import MAX_FILE_BYTES, MAX_PICTURE_BYTES, Uploads, read_body
from document_search.searching import By
from document_search.store import PROBE_TEXT, Found, Store

STATIC = Path(__file__).parent / "static"
FILES = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
N_CANDIDATES = 50  # by cosine; all of them are listed, so that they can be ordered either way
MAX_MAPS = 32  # words that get a map of their own
MAX_QUERY = 2000  # letters
_QUERIES_KEPT = 32  # whose vectors are there for maps
_JPEG_QUALITY = 85

Digest = Annotated[str, PathPart(pattern="^[0-9a-f]{64}$")]
Number = Annotated[int, PathPart(ge=1)]


class TextQuery(BaseModel):
    """A query in words."""

    text: str = Field(max_length=MAX_QUERY)


class Queries:
    """The last queries, so that maps can be made of them."""

    def __init__(self) -> None:
        self._queries: OrderedDict[int, searching.Query] = OrderedDict()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def keep(self, query: searching.Query) -> int:
        """Keep a query; return its number."""
        with self._lock:
            number = next(self._ids)
            self._queries[number] = query
            while len(self._queries) > _QUERIES_KEPT:
                self._queries.popitem(last=False)
        return number

    def get(self, number: int) -> searching.Query:
        """Return a query by its number."""
        with self._lock:
            if number not in self._queries:
                raise PageError(404, "NO_QUERY", "this search is no longer known: search again")
            return self._queries[number]


def make_app(client: EmbeddingsClient, base_url: str, index: Path, folder: Path) -> FastAPI:
    """Make the app.

    Args:
        client: of a server of the retrieval task, which need not run yet.
        base_url: its address, to be shown.
        index: the folder of the index.
        folder: for files that are dropped on the page.
    """
    uploads, queries = Uploads(folder), Queries()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.jobs = jobs = Jobs(client, index)
        yield
        await run_in_threadpool(jobs.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    app.add_middleware(SameOrigin)
    answer_errors(app)

    def jobs() -> Jobs:
        found: Jobs = app.state.jobs
        return found

    def static(name: str) -> None:
        @app.get(f"/{name}")
        def file() -> FileResponse:
            return FileResponse(STATIC / FILES[name], headers={"cache-control": "no-cache"})

    for name in FILES:
        static(name)

    @app.get("/api/index")
    def facts() -> dict[str, object]:
        """What is in the index, and the limits. The embedding server is not asked."""
        limits = {"max_file_bytes": MAX_FILE_BYTES, "max_picture_bytes": MAX_PICTURE_BYTES, "max_query": MAX_QUERY}
        if not index.exists():
            return {"n_files": 0, "n_pages": 0, **limits}
        store = Store.open(index)
        return {"n_files": store.count_files(), "n_pages": len(store), **limits}

    @app.get("/api/server")
    def server() -> dict[str, object]:
        """Whether the embedding server answers, and has the model of the index; else an error that says why."""
        probe = client.encode_text(PROBE_TEXT)
        if index.exists():
            Store.open(index).check_model(probe)
        return {"base_url": base_url}

    @app.get("/api/files")
    def files() -> list[dict[str, object]]:
        """The files that were dropped, in order, and how far each is."""
        return [job.shown() for job in jobs().all()]

    @app.post("/api/files", status_code=202)
    async def add(request: Request, name: Annotated[str, Query(max_length=1000)]) -> dict[str, object]:
        """Take a file, which is the body."""
        content = await read_body(request.stream(), MAX_FILE_BYTES)
        upload = await run_in_threadpool(uploads.keep, name, content)
        return jobs().add(upload).shown()

    @app.post("/api/files/{job_id}/retry", status_code=202)
    def retry(job_id: int) -> dict[str, object]:
        """Index a file again that failed."""
        return jobs().retry(job_id).shown()

    @app.post("/api/samples", status_code=202)
    def samples() -> list[dict[str, object]]:
        """Take the two sample files."""
        from document_search.sample import write_samples  # matplotlib takes a second

        paths = write_samples(folder.parent / "sample")
        kept = [uploads.keep(path.name, path.read_bytes()) for path in paths]
        return [jobs().add(upload).shown() for upload in kept]

    @app.post("/api/search")
    def search_text(query: TextQuery) -> dict[str, object]:
        """Search by words."""
        if not query.text.strip():
            raise PageError(422, "BAD_QUERY", "the query is empty")
        store = open_store()
        return ranked(store, searching.embed_text(client, store, query.text, MAX_MAPS))

    @app.post("/api/search/picture")
    async def search_picture(request: Request) -> dict[str, object]:
        """Search by a picture, which is the body."""
        content = await read_body(request.stream(), MAX_PICTURE_BYTES)

        def search() -> dict[str, object]:
            store = open_store()
            return ranked(store, searching.embed_picture(client, store, content))

        return await run_in_threadpool(search)

    def open_store() -> Store:
        if not index.exists():
            raise UsageError("nothing is indexed yet: add files first")
        return Store.open(index)

    def ranked(store: Store, query: searching.Query) -> dict[str, object]:
        found = searching.find(store, query, By.BOTH, N_CANDIDATES, N_CANDIDATES)
        return {
            "query": queries.keep(query),
            "n_tokens": len(query.multivector),
            "n_pages": len(store),
            "pages": [shown(page) for page in found],
        }

    def shown(page: Found) -> dict[str, object]:
        return {
            "digest": page.source.digest,
            "number": page.number,
            "name": uploads.name_of(page.source.file),
            "dense": page.dense,
            "maxsim": page.maxsim,
        }

    def page_of(digest: str, number: int) -> Found:
        page = open_store().page(digest, number)
        if page is None:
            raise PageError(404, "NO_PAGE", "the index has no such page")
        return page

    @app.get("/api/pages/{digest}/{number}/picture")
    def picture(digest: Digest, number: Number, width: Annotated[int, Query(ge=16, le=3000)]) -> Response:
        """A page, no wider than `width` pixels."""
        image = searching.render_found(page_of(digest, number))
        image.thumbnail((width, 4 * width))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
        # The address has the digest, so what is behind it never changes.
        return Response(file.getvalue(), media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    @app.get("/api/queries/{query}/pages/{digest}/{number}/map")
    def similarity_map(query: int, digest: Digest, number: Number) -> dict[str, object]:
        """Where on a page a query is found: first the whole of it, then word by word."""
        page = page_of(digest, number)
        maps = searching.find_on_page(open_store(), queries.get(query), page)
        words = [
            {
                "name": word.name,
                "score": word.score,
                "values": [[round(float(v), 4) for v in row] for row in word.values],
            }
            for word in maps
        ]
        return {"rows": page.grid[0], "columns": page.grid[1], "words": words}

    return app
