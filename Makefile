# All commands of a developer. Prerequisites: Linux, Python 3.10+ with venv, git, make.
SHELL := /bin/sh
PYTHON ?= python3
ROUNDS ?= 1000
BIN := .venv/bin
# uv ignores pip's settings. (An empty variable is none to uv.)
UV = SSL_CERT_FILE="$${SSL_CERT_FILE:-$$PIP_CERT}" UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}" $(BIN)/uv
UV_COMPILE = $(UV) pip compile -q --universal --python-version 3.10 --no-python-downloads --generate-hashes --only-binary :all: --emit-build-options --no-emit-index-url --no-header
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# What Python compiles is kept: each of a run's hundreds of processes would otherwise compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo migrate drift impact test test-fast test-e2e soak bench cluster install cluster-down bundle lint lock docs clean git

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: git .venv/ready ## set up .venv for development and tests

git:
	@command -v git >/dev/null || { echo "git is missing: install it (Debian: apt-get install git)" >&2; exit 1; }

# The programs in .venv have its path in them: one that was moved is set up again.
ifneq ($(shell cd ./.venv 2>/dev/null && pwd -P),$(shell cat .venv/ready 2>/dev/null))
.PHONY: .venv/ready
endif

.venv/ready: requirements-dev.txt | git
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(PYTHON) is missing or older than 3.10: install Python 3.10 or newer, or set one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "setting up .venv (about 30 s, once)"
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --require-hashes --only-binary :all: -r requirements-dev.txt || { echo "pip could not install requirements-dev.txt, for the reason above: behind a proxy, set HTTPS_PROXY; for a mirror of PyPI, PIP_INDEX_URL; for its CA, PIP_CERT (docs/machines.md)" >&2; exit 1; }
	@cd ./.venv && pwd -P >ready

demo: venv ## upgrade an empty database and downgrade it again, in under a minute
	@$(BIN)/python -m tools.demo

migrate: venv ## migrate the database of DATABASE_URL, DB_* or .env
	@$(BIN)/alembic upgrade head

drift: venv ## compare that database with what its revisions make, read only (EXCLUDE='keycloak eg_*' leaves out other services' objects)
	@$(BIN)/python -m tools.drift

impact: venv ## show what this branch's revisions lock, rewrite and read (REVISIONS=002:head names others; with DATABASE_URL: that database's pending ones)
	@$(BIN)/python -m tools.impact

test: venv ## run every test, with a real PostgreSQL and a real Kubernetes
	@$(BIN)/pytest -n 7

test-fast: venv ## run the tests that need no cluster
	@$(BIN)/pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 2)) tests/project tests/chart tests/migrations tests/faults

test-e2e: venv ## run the tests that install the chart on a real cluster
	@$(BIN)/pytest -n 7 tests/gitops tests/e2e

soak: venv ## 1,000 rounds of ten concurrent runs with random kills (about 17 minutes; ROUNDS=n for another number)
	@$(BIN)/pytest -s tests/faults/test_random_kills.py --rounds $(ROUNDS)

bench: venv ## measure deploying, revisions and the chart, also against other tools; writes docs/benchmarks.md (about 40 minutes)
	@$(BIN)/python -m bench --write

cluster: venv ## create a local Kubernetes cluster (kind) with a database, a git server and a package index (GITOPS=1: and with Argo CD and Flux)
	@$(BIN)/python -m tools.cluster up $(if $(GITOPS),--gitops)

install: venv ## install the chart on that cluster (created if there is none), print the log and the table
	@$(BIN)/python -m tools.cluster install

cluster-down: venv ## delete that cluster and everything that it started
	@$(BIN)/python -m tools.cluster down

bundle: venv ## write dist/hcm-db-migrations-<version>-bundle.tar: all that a restricted network needs (docs/restricted-network.md)
	@$(BIN)/python -m tools.bundle

lint: venv ## run only the linters (they are tests as well)
	@$(BIN)/pytest tests/project/test_lint.py tests/project/test_architecture.py tests/project/test_words.py

lock: venv ## compile every requirements*.in into its .txt (UPGRADE=--upgrade upgrades all pins)
	@for name in requirements requirements-dev tools/checkov/requirements tools/go/requirements bench/peers/requirements; do $(UV_COMPILE) $(UPGRADE) $$name.in -o $$name.txt || exit; done

docs: venv ## write what is generated: the chart's README, schema descriptions and defaults.json, docs/schema.md, docs/troubleshooting.md
	@$(BIN)/python -m tools.docs

clean: ## delete .venv and the tests' caches in the tree
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
