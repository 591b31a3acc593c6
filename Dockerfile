# An image that brings the Job's dependencies: no pip runs in the cluster, and no package index is needed there.
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
# pip may change this system although Debian's own python3 marks it as Debian's.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r /tmp/requirements.txt
USER 65533:65533
