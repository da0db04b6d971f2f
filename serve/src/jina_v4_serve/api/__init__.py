"""`POST /v1/embeddings` in the forms of OpenAI and Jina, and the few other routes of a server.

From request to vectors, a module a step: `schema` (what may be asked), `request` (what was asked, all conflicts
settled), `images` and `prompts` (what goes into the model), `work` (through the engine), `answer` (what comes out),
`endpoint` (the routes). `guard` stands before all of it; `errors` is what any of them may raise.
"""
