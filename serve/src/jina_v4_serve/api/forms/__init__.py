"""The forms of requests and replies, a file each.

A form reads a body into the inner request (`api.request`), where all conflicts are settled, and writes its reply.
`embeddings` is the form of OpenAI and Jina, `cohere` is Cohere's; `rerank` and `score` are rankings, `pairs` has what
they share. `schema` has the fields of the first; `items`, `parts` and `messages` read what is to be embedded; `names`
settles what fields of several forms say; `foreign` knows other servers' fields; `reply` writes vectors, `errors` writes
errors; `examples` has a request of each kind for /docs.
"""
