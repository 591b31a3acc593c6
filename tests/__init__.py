"""One folder for each subject; tests/support has what they share.

project       the sources, the tools, the documents
chart         the rendered chart and its scripts, without a cluster
migrations    the runner, on a real PostgreSQL
faults        the runner with a broken network, disk, server or process
e2e           the chart, installed on a real cluster
"""
