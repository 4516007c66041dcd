# make demo    from images to a validated ONNX model, in minutes
# make test    all tests
# make fuzz    odd and hostile input for every reader, a minute each (FUZZ_SECONDS=60)
# make docs    the site of docs/, into build/site
# make lint    ruff, mypy, import contracts
# make clean   removes the environment, builds and caches; runs/ stays
#
# The first of them creates the environment VENV with PYTHON and installs what pyproject.toml says.
.POSIX:
.PHONY: demo test fuzz docs lint install clean

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60
INSTALLED = $(VENV)/.installed
RECENT = import sys; sys.exit(sys.version_info < (3, 11))

demo: install
	@"$(VENV)/bin/wasi-export" run

test: install
	@"$(VENV)/bin/python" -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

fuzz: install
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev,fuzz]'
	@"$(VENV)/bin/python" benchmarks/fuzzing.py --seconds $(FUZZ_SECONDS)

docs: install
	@NO_MKDOCS_2_WARNING=1 "$(VENV)/bin/mkdocs" build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "build/site/index.html"

lint: install
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/mypy"
	@"$(VENV)/bin/lint-imports" --no-cache --no-logo

install: $(INSTALLED)

# The stamp is written last, so that an install that was cut short is done again.
$(INSTALLED): pyproject.toml
	@"$(VENV)/bin/python" -c 'import pip; $(RECENT)' 2>/dev/null && exit 0; \
	for python in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
	    "$$python" -c 'import ensurepip; $(RECENT)' 2>/dev/null && exec "$$python" -m venv "$(VENV)"; \
	done; \
	echo "no Python 3.11 or newer with venv found, tried $(PYTHON): install one, or name it with PYTHON=" >&2; \
	exit 2
	@echo "Installing into $(VENV), once: PyTorch is a large download, allow some minutes." >&2
	@"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch "$@"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
