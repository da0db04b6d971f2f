"""A page for the browser: drop files, watch them being indexed, search, and see where on a page a word was found.

``app`` has the routes, ``uploads`` keeps the files, ``jobs`` indexes them in the background, ``guard`` keeps other
web pages out, ``errors`` are what the page shows. ``static`` has the page itself: one HTML file, one style, one script.
"""

import socket
from pathlib import Path

import uvicorn
from jina_v4_client import EmbeddingsClient

from document_search.errors import UsageError
from document_search.page.app import make_app

HOST = "127.0.0.1"
_GRACE_S = 5  # for requests that are under way when Ctrl-C is pressed


def serve(client: EmbeddingsClient, base_url: str, index: Path, uploads: Path, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        client: of a server of the retrieval task, which need not run yet.
        base_url: its address, to be shown.
        index: the folder of the index.
        uploads: the folder for files that are dropped on the page.
        port: on 127.0.0.1; 0 for any that is free.

    Raises:
        UsageError: the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()  # whoever follows the address below is answered as soon as the page is ready
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error
        app = make_app(client, base_url, index.resolve(), uploads.resolve())
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
        print(f"open http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
