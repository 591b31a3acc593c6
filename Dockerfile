# An image with the Job's dependencies pre-installed: the cluster needs neither pip nor a package index.
#
#     docker build -t registry.example.org/hcm-db-migrations:1 . && docker push registry.example.org/hcm-db-migrations:1
#
# and in the values:
#
#     requirements: ""
#     image: {repository: registry.example.org/hcm-db-migrations, tag: "1"}
ARG PYTHON=python:3.13-slim
FROM ${PYTHON}
# Behind a mirror: --build-arg PIP_INDEX_URL=https://mirror.example.org/simple
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements.txt /tmp/
# Allow pip to install although Debian marks its python3 as externally managed.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r /tmp/requirements.txt
USER 65533:65533
