"""The three tasks as deployments of Ray Serve: replicas of `jina-v4-serve`, and an ingress that is their gateway.

`settings` says what is deployed, `child` runs a server as a child process, `replica` hands it bytes and lives exactly
as long as it, `ingress` finds the task of a request and answers where no replica does. `deploy/ray/serve_app.py` puts
them together. Nothing else of this package imports these: Ray is an extra, `jina-v4-serve[ray]`.
"""
