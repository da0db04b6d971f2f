"""`python -m jina_v4_client.embed` is `jina-v4-embed`."""

from jina_v4_client.embed import main

main()
