# Each target is one or two plain commands that can be typed as well; the README shows them.
# `make demo` and `make test` make the virtual environment themselves, in .venv.

PYTHON = .venv/bin/python

demo: .venv/installed
	$(PYTHON) tools/demo.py

test: .venv/installed-dev lint
	$(PYTHON) -m pytest

lint: .venv/installed-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

figures: .venv/installed
	$(PYTHON) tools/make_figures.py

benchmark: .venv/installed
	$(PYTHON) tools/benchmark.py

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

.PHONY: demo test lint figures benchmark
