# Each target is one or two plain commands, which can be typed as well.
# Targets make the virtual environment themselves, in .venv, where they need it.

PYTHON = .venv/bin/python
SOURCES = *.py tools tests notebooks
DEMO =  # parameters of tools/demo.py, such as DEMO="--minutes=1"
FIGURES =  # parameters of tools/make_figures.py, such as FIGURES="--pages_only=True"
GPU_CHECK =  # parameters of tools/gpu_check.py, such as GPU_CHECK="--parts=tests,speed"

demo: .venv/installed
	$(PYTHON) tools/demo.py $(DEMO)

test: .venv/installed-dev lint
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint: .venv/installed-dev
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)

figures: .venv/installed-dev
	$(PYTHON) tools/make_figures.py $(FIGURES)

benchmark: .venv/installed
	$(PYTHON) tools/benchmark.py

gpu-check: .venv/installed-dev
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK)

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

.PHONY: demo test lint figures benchmark gpu-check
