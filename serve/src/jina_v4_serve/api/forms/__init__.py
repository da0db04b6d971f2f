"""The forms of requests and replies: a form has its fields, `settle` and `write`.

`settle` reads the fields of a body into the inner request (`api.request`), where all conflicts are settled; `write`
makes the content of its JSON reply. `embeddings` is the form of OpenAI and Jina, `cohere` is Cohere's, `rankings` are
rerank and score. `schema` parses bodies and has the fields of the first; `items` and `messages` read what is to be
embedded; `common` settles what fields of several forms say; `foreign` knows other servers' fields; `reply` writes
vectors, `errors` writes errors; `examples` has a request of each kind for /docs.
"""
