"""What builds a real kind cluster and its command line tools where none can be downloaded.

- `tools.steps`: long steps: one cache folder, one process at a time, progress, nothing half done.
- `tools.binaries`: helm, ct, kubectl, kind ... from PATH, else built from the Go modules in this folder.
- `tools.engine`: a container engine of our own and the images that cannot be pulled.
- `tools.cluster`: the kind cluster with what the chart finds in a DIGIT cluster. `make cluster` starts here.
"""
