"""The forms of requests and replies: a form has its fields, `settle` and `write`.

`settle` turns the fields of a body into the inner request (`api.request`) and refuses contradictions; `write` makes the
content of the JSON reply. `embeddings` is the form of OpenAI and Jina, `cohere` is Cohere's, `rankings` are rerank and
score. `schema` parses bodies and has the fields of `embeddings`; `items` and `messages` read texts and images; `common`
has rules for fields of several forms; `foreign` has the fields of other servers; `reply` writes vectors, `errors`
writes errors; `examples` has a request of each kind for /docs.
"""
