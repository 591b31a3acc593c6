"""One folder for each door: the chart, the migrations, the project itself, an installation on a cluster."""
