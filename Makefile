# Every target makes .venv itself, from any Python >= 3.11, under constraints/.
#   make demo      few-step digits: search step sizes, straighten (table, report)
#   make test      the default test suite; PYTEST_ARGUMENTS="FILES -k ..." runs a part
#   make lint      format, lint, types
#   make docs      the documentation, checked, into build/site
#   make nightly   long runs, kills and full disks, peer libraries, planted faults
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint $$($(BIN)/python -c 'import sys; print("constraints/py311.txt" \
	if sys.version_info < (3, 12) else "constraints/py312.txt")')

.PHONY: demo test lint docs nightly clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m experiments.run --config=configs/boss.py:cpu

# files stay whole, and the dearest start first (tests/price.py)
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# these compile as users do, in a process of their own; see tests/conftest.py
OPTIMISED := $(wildcard tests/optimised)

test: $(VENV)/dev.installed
	$(PYTEST) $(PYTEST_ARGUMENTS)
	$(if $(PYTEST_ARGUMENTS),,$(if $(OPTIMISED),$(PYTEST) $(OPTIMISED)))

lint: $(VENV)/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error

docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

nightly: $(VENV)/oracle.installed
	$(PYTEST) -m "slow or nightly"
	$(if $(OPTIMISED),$(PYTEST) $(OPTIMISED) -m "slow or nightly" || test $$? -eq 5)
	$(BIN)/python -m tests.harness.kill_campaign
	$(BIN)/python tests/mutations.py
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -p no:xdist --nbmake \
		--nbmake-timeout=900 --timeout=1800 colabs -m ""

$(VENV)/%.installed: pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "tmdjax needs Python 3.11, 3.12 or 3.13; \
	none was found (set PYTHON=...)."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable '.[$(if $(filter oracle,$*),dev$(comma)oracle$(comma)notebooks,$*)]'
	touch $@

comma := ,

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
