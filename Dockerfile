# An image with the Job's dependencies pre-installed: the cluster needs neither pip nor a package index.
#
#     docker build -t registry.example.org/hcm-db-migrations:1 . && docker push registry.example.org/hcm-db-migrations:1
#
# and in the values:
#
#     requirements: ""
#     image: {repository: registry.example.org/hcm-db-migrations, tag: "1"}
#
# A tag can be moved, a digest cannot: --build-arg PYTHON=docker.io/library/python@sha256:... fixes the base image.
ARG PYTHON=docker.io/library/python:3.13-slim
# Empty, unless --build-context wheels=FOLDER names a folder of wheels, for a build without a package index: with
# "no-index = true" and "find-links = /wheels" in pip.conf.
FROM scratch AS wheels
FROM ${PYTHON}
COPY requirements.txt /tmp/
# Allow pip to install although Debian marks its python3 as externally managed.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# Behind a mirror: --secret id=pip.conf,src=pip.conf, a file with "[global]" and "index-url = https://...". It is mounted
# for this command only: a token in the URL is neither in the image nor in its history, as a build argument would be.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=bind,from=wheels,target=/wheels \
    pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r /tmp/requirements.txt
USER 65533:65533
