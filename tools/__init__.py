"""What the tests and `make` need: a PostgreSQL server, a kind cluster, command line tools, generated documents.

- `tools.steps`: long steps: one at a time, progress, waiting with a timeout, no partial results.
- `tools.paths`: where the checkout, the chart, the virtual environment and the cache are.
- `tools.network`: free loopback ports; connections without a proxy.
- `tools.checkout`: this checkout's commits.
- `tools.postgres`: a temporary PostgreSQL server on loopback.
- `tools.binaries`: helm, ct, kubectl, kind ... from PATH, else built from the Go modules in this folder.
- `tools.debian`: programs from Debian packages, extracted into the cache.
- `tools.cluster`: the kind cluster. `make cluster` starts here.
- `tools.fixtures`: what is in the cluster: PostgreSQL, a git and package server, ConfigMaps and Secrets.
- `tools.offline_cluster`: a private container engine and local images, when no image can be pulled; see its README.md.
- `tools.demo`: `make demo`.
- `tools.target`: a database that is only read, and its copy on the embedded server.
- `tools.drift`: `make drift`; `tools.impact`: `make impact`.
- `tools.markdown`: texts and tables as Markdown.
- `tools.docs`: `make docs`: the generated documents; `tools.schema`: docs/schema.md.

The folders helm, kube-score, toxiproxy and checkov hold only the pinned versions of these tools.
"""
