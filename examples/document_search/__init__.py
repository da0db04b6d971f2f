"""A search in the pages of PDF files: they are embedded as pictures, kept in LanceDB, and found by what can be seen.

``documents`` renders pages, ``indexing`` embeds them, ``store`` keeps and finds their vectors, ``searching`` embeds
queries and finds where on a page they match, ``words`` counts which rows of a query's multi-vector belong to which of
its words, ``picture`` draws that, ``sample`` makes files to try it with. ``cli`` is the command line, and ``page`` a
page for the browser. It needs fastapi, lancedb, matplotlib, pypdfium2, typer and uvicorn beside the client.
"""
