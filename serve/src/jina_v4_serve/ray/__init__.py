"""The three tasks as deployments of Ray Serve: replicas of `jina-v4-serve`, and an ingress that is their gateway.

`settings` has the settings of a deployment, `child` runs a server as a child process, `replica` forwards requests to it
and ends with it, `ingress` finds the task of a request. `deploy/ray/serve_app.py` combines them. The rest of this
package imports none of them, as Ray is an extra: `jina-v4-serve[ray]`.
"""
