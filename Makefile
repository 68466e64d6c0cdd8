# Every target sets up what it needs. `make demo` and `make test` are all a newcomer has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check
WORKERS ?= 2
OUT ?= out
MINUTES ?= 600
DENSITIES ?= 0.4 0.3 0.2 0.5
PORT ?= 7860
TIME ?= 600

.PHONY: help app test-app test-ray demo scoreboard ablation demo-model test test-slow test-gpu test-oracles test-versions test-wheel fuzz matrix lint type fmt check bench bench-gpu bench-latency bench-check soak clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.core: constraints.txt pyproject.toml
	@echo "[1/3] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing torch (the largest download)"
	@$(PIP) install --progress-bar on -q -c constraints.txt torch
	@echo "[3/3] installing dittools and what it needs"
	@$(PIP) install --progress-bar on -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "installing the test and development tools"
	@$(PIP) install --progress-bar on -q -c constraints.txt -e ".[test,dev,triton,app]"
	@touch $@

demo: $(VENV)/.core  ## dense and accelerated clip of the embedded model, with a report, on CPU
	@$(BIN) -m dittools generate --model demo --compare --out $(OUT)/demo

$(VENV)/.app: $(VENV)/.core
	@echo "installing what the studio needs"
	@$(PIP) install --progress-bar on -q -c constraints.txt -e ".[app]"
	@touch $@

app: $(VENV)/.app  ## the studio in the browser, at http://127.0.0.1:$(PORT)
	@$(BIN) app.py --port $(PORT) --runs $(OUT)/studio

$(VENV)/.browser: $(VENV)/.test
	@$(PIP) install --progress-bar on -q -c constraints.txt -e ".[app,browser]"
	@touch $@

test-app: $(VENV)/.browser  ## the studio end to end in Chromium, which must be on the PATH
	@$(BIN) -m pytest -m browser

test: $(VENV)/.test  ## the whole CPU suite
	@$(BIN) -m pytest -n $(WORKERS) --dist loadscope -m "not slow and not gpu and not oracle and not browser and not ray and not wheel"

test-slow: $(VENV)/.test  ## tests that take minutes
	@$(BIN) -m pytest -n $(WORKERS) -m "slow and not gpu and not oracle and not browser and not ray and not wheel"

test-gpu: $(VENV)/.test  ## the kernel and attach tests on a CUDA device
	@$(BIN) -m pytest -m gpu

# natten has no CPU wheel; without CUDA its source installs as pure Python and serves as the oracle
$(VENV)/.oracles: $(VENV)/.test
	@$(PIP) install -q "setuptools<81" wheel
	@$(PIP) install -q --no-deps --no-build-isolation natten==0.21.7 tomesd==0.1.3
	@touch $@

test-oracles: $(VENV)/.oracles  ## comparison with other packages' implementations
	@$(BIN) -m pytest -m oracle

$(VENV)/.ray: $(VENV)/.test
	@$(PIP) install -q -c constraints.txt -e ".[ray]"
	@touch $@

test-ray: $(VENV)/.ray  ## prompt lists on a local Ray cluster
	@$(BIN) -m pytest -m ray

test-wheel: $(VENV)/.test  ## build, install into an empty environment, run the README from another folder
	@$(BIN) -m pytest -p no:xdist -m wheel --durations=5

# the fuzzer has no wheel for every Python; it gets an environment of its own
.fuzz/.done: $(VENV)/.core
	@$(PYTHON) -m venv .fuzz
	@.fuzz/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt atheris -e ".[app]" opencv-python-headless scikit-image
	@touch $@

fuzz: .fuzz/.done  ## coverage-guided fuzzing of every loader, TIME seconds in all
	@.fuzz/bin/python bench/fuzz_atheris.py --time $(TIME)

test-versions: $(VENV)/.test  ## attach tests on diffusers 0.36, 0.39 and the newest, one table at the end
	@$(BIN) bench/versions.py

matrix: $(VENV)/.test  ## run every test of the compatibility matrix, slow ones too, and write it anew
	@rm -f docs/results/compatibility.json
	@$(BIN) -m pytest -p no:xdist -m "cell and not gpu" --matrix docs/results/compatibility.json
	@$(BIN) bench/readme.py

lint: $(VENV)/.test  ## ruff
	@$(BIN) -m ruff check .
	@$(BIN) -m ruff format --check .

type: $(VENV)/.test  ## mypy --strict on dittools
	@$(BIN) -m mypy

fmt: $(VENV)/.test  ## format and sort imports
	@$(BIN) -m ruff format .
	@$(BIN) -m ruff check --fix .

check: lint type test  ## what CI runs

bench: $(VENV)/.core  ## CPU kernels against dense SDPA
	@$(BIN) bench/kernels.py --head-dim 64,128

bench-gpu: $(VENV)/.test  ## CUDA kernels against dense, FlexAttention and peers
	@$(BIN) bench/gpu.py

bench-latency: $(VENV)/.test  ## end to end by part: released configs on a GPU, one block and the demo on a CPU
	@$(BIN) bench/latency.py

bench-check: $(VENV)/.test  ## ratios against the committed reference
	@$(BIN) bench/check.py

soak: $(VENV)/.core  ## 500 short generations in one process: memory, files, threads, results
	@$(BIN) bench/soak.py --out docs/results/soak.json

.PHONY: scaling
scaling: $(VENV)/.core  ## one clip on 1 to 64 GPUs from formulas, bytes checked on 2 and 4 CPU processes
	@$(BIN) bench/scaling.py

scoreboard: $(VENV)/.core  ## every method on the embedded model at matched densities; MINUTES=12 bounds it
	@for d in $(DENSITIES); do $(BIN) -m dittools search --prompts bench/search_prompts.txt \
		--target-density $$d --work $(OUT)/scoreboard/search --out $(OUT)/scoreboard/$$d/plan.json || exit 1; done
	@$(BIN) bench/scoreboard.py $(foreach d,$(DENSITIES),--density $(d) --plan $(OUT)/scoreboard/$(d)/plan.json) \
		--minutes $(MINUTES) --work $(OUT)/scoreboard --out docs

ablation: $(VENV)/.test  ## metered attention part by part on the embedded model, docs/metered.md (an hour)
	@$(BIN) bench/ablation.py --minutes $(MINUTES) --out docs

demo-model: $(VENV)/.test  ## retrain the embedded model from nothing and print its score
	@$(BIN) -m dittools.pipelines.demo.train --out $(OUT)/demo-model

clean:  ## remove build products, keep the environment
	rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache
