PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint docs clean

quickstart: .venv/installed
	$(BIN)/jaxtune train configs/quickstart.yaml output=runs/quickstart
	printf 'Where does the heron live?\n/reset\nWhere does the toad live?\n' | $(BIN)/jaxtune chat runs/quickstart --temperature 0
	@echo "plot: runs/quickstart/loss.png   tuned adapter: runs/quickstart/export"

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed-test
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-openai1 runs site .pytest_cache .mypy_cache .ruff_cache
