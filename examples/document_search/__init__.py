"""A search in the pages of PDF files: they are embedded as pictures, kept in LanceDB, and found by what can be seen.

``documents`` renders pages, ``store`` keeps and finds their vectors, ``words`` tells which rows of a query's
multi-vector belong to which of its words, ``picture`` draws where on a page they were found, ``sample`` makes files to
try it with, ``cli`` joins them. It needs lancedb, matplotlib, pypdfium2 and typer beside the client.
"""
