"""The shared helpers and fixtures of the tests.

alembic_process    `alembic` as a forked process
canary             the secrets that nothing may print
chart              plugin: the chart, rendered with Helm 3 and 4
cluster            plugin: the Kubernetes cluster; a namespace, a git repository and releases for each test
database           plugin: the PostgreSQL server; a database and a role for each test
documents          the code blocks of all documents
fault_injection    plugin: toxiproxy, PgBouncer, mount and network namespaces
fault_marks        plugin: the mark `fault`, compared with what its test prints
git                git, isolated from the user's settings
kubernetes         the API server, commands on the node, killing a container
messages           expected parts of the runner's messages
packages           programs from Debian's packages
pod_scripts        plugin: the scripts of both containers, run without a cluster
programs           running a program; everything that a test observed
project            plugin: a copy of this project to add revisions to
release            releases of the chart, installed with Helm
released           the chart of the last release, and what changed since then
repository         git repositories on the cluster's server
revisions          revision files, and what the tests' revisions do
runs               the runs' sessions as the server shows them
servers            servers in a thread of the test
suite              plugin: options, cleanup, serialization, no skips in CI
waiting            waiting for a condition
"""
