"""`python -m jina_v4_client.integrations.mteb`."""

from jina_v4_client.integrations.mteb import main

main()
