# Two commands on a fresh machine with Python 3.12: `make quickstart` and `make test`.
# Everything goes into .venv; another interpreter: `make test PYTHON=/path/to/python3.12`.

PYTHON ?= $(shell for p in python3.12 python3.13 python3 "$$(pyenv prefix 2>/dev/null)/bin/python3"; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
ZOO = .venv/bin/zoo
READY = .venv/.ready
COMPILERS = .venv/compilers

.PHONY: quickstart test test-deep test-devices test-all lint bench site compile-kernels pins clean

quickstart: $(READY)  ## train five families and attention on one task, and put them side by side
	$(ZOO) compare quickstart

test: $(READY)  ## the tests of every round of work
	.venv/bin/python -m pytest -n 2 -m "not deep"

test-deep: $(READY)  ## bfloat16, extreme gates, 65,536 tokens, sharding, resumed training; PART=1/3 for a third
	.venv/bin/python -m pytest -n 2 -m "deep and not devices" $(if $(PART),--part $(PART))

test-devices: $(READY)  ## every layer over simulated devices, training on meshes and by several processes
	.venv/bin/python -m pytest -n 2 -m devices $(if $(PART),--part $(PART))

test-all: test test-deep test-devices  ## the whole test suite

lint: $(READY)  ## style, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(READY)  ## speed and memory of every layer, written to experiments/results
	.venv/bin/python -m experiments.bench layers

site: $(READY)  ## the documentation, in runs/site: open runs/site/index.html
	.venv/bin/python -m experiments.site

compile-kernels: $(COMPILERS)/.ready  ## every kernel through the compilers of TPUs and GPUs, on the CPU
	PYTHONPATH=$(COMPILERS) .venv/bin/python -m experiments.compile_kernels

# Beside the environment, not in it: jax would look for a TPU and a GPU wherever it finds their compilers.
$(COMPILERS)/.ready: constraints-compile.txt $(READY)
	rm -rf $(COMPILERS)
	.venv/bin/python -m pip install --quiet --no-deps --require-hashes --target $(COMPILERS) -r $<
	touch $@

$(READY): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.12 or newer is needed; name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --require-hashes -r constraints.txt
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

PIN = pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host

pins:  ## renew constraints.txt from pyproject.toml, and the compilers of that jax (needs pip-tools)
	$(PIN) --extra test --extra lint --extra ray --extra digits --extra notebooks --extra site \
		--build-deps-for editable --output-file constraints.txt pyproject.toml
	jax=$$(sed -n 's/^jax==\([^ ]*\).*/\1/p' constraints.txt) && printf '%s\n' \
		'libtpu==0.0.50.*' jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax \
		| $(PIN) --output-file constraints-compile.txt -

clean:
	rm -rf .venv build *.egg-info
