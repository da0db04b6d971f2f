# One command each; `make` lists them. Python 3.11 to 3.13 and a package index are all that has to be there.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
STARTED := $(shell date +%s)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
TWINE_VERSION := 6.2.0
DIST ?= dist
# The hardware decides which build of vLLM is installed; KIND=cpu or KIND=gpu decides otherwise.
KIND ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
INSTALLED := $(VENV)/.installed-$(KIND)
# Other people's clients, which the tests run against our servers; their pins and ours do not go together.
CLIENTS := .venv-clients
CLIENTS_INSTALLED := $(CLIENTS)/.installed
# The vector stores of docs/stores.md, whose recipes the tests run.
STORES := .venv-stores
STORES_INSTALLED := $(STORES)/.installed

# Debian's tcmalloc, which the launcher preloads into an engine that computes on a CPU; fetched, not installed.
TCMALLOC := $(VENV)/lib/tcmalloc

# Debian's Prometheus, which the tests let scrape real servers; fetched, not installed.
PROMETHEUS := .prometheus

# Debian's Chromium, with which the tests use the search page; fetched, not installed.
CHROMIUM := .chromium

# JavaScript clients, where there is npm.
NODE_CLIENTS := .node-clients

TASKS := retrieval text-matching code
# Where the weights come from: a hub id, a folder, or "standin" (random weights that need no hub).
BASE ?= jinaai/jina-embeddings-v4
# Merged checkpoints lie in a folder named after their base, so that one base's are never taken for another's.
CHECKPOINTS ?= checkpoints
# Quantized ones (QUANTIZE=int8 or fp8) lie in a folder of their own kind; a base's name has no slash here.
MERGED = $(CHECKPOINTS)/$(addsuffix /,$(QUANTIZE))$(subst /,--,$(BASE))
MISSING = $(strip $(foreach task,$(or $(TASK),$(TASKS)),$(if $(wildcard $(MERGED)/jina-embeddings-v4-$(task)),,--task $(task))))
STANDIN = $(CHECKPOINTS)/standin-base
# The base once, and an adapter a task: what `serve` takes where three merged checkpoints do not fit the memory.
EXPORTED = $(CHECKPOINTS)/$(subst /,--,$(BASE))-one-base

.PHONY: install
install: $(INSTALLED) ## make .venv: vLLM for this machine, the three projects, the test tools

$(INSTALLED): requirements/$(KIND).txt requirements/install requirements/fetch-debian merge/pyproject.toml serve/pyproject.toml client/pyproject.toml
	@echo "installing into $(VENV), vLLM for $(KIND): 8 GB, a minute or more"
	@if [ '$(KIND)' = gpu ]; then PYTHONPATH=serve/src $(PYTHON) -m jina_v4_serve.launch.driver; fi
	@rm -f $(VENV)/.installed-*
	@requirements/install $(PYTHON) $(VENV) requirements/$(KIND).txt 8 $(UV_VERSION)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e merge -e serve -e client
	@if [ '$(KIND)' = cpu ]; then requirements/fetch-debian $(TCMALLOC) './usr/lib/*/libtcmalloc_minimal.so.4*' libtcmalloc-minimal4 libtcmalloc-minimal4t64 \
	  || echo "so vLLM's engine keeps glibc's allocator (docs/operations.md)"; fi
	@touch $@

$(CLIENTS_INSTALLED): requirements/clients.txt | $(INSTALLED)
	@echo "installing the clients that the tests run into $(CLIENTS)"
	@rm -f $@
	@test -x $(CLIENTS)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(CLIENTS)
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(CLIENTS)/bin/python requirements/clients.txt
	@touch $@

$(STORES_INSTALLED): requirements/stores.txt client/pyproject.toml | $(INSTALLED)
	@echo "installing the vector stores that the tests run into $(STORES): 0.7 GB"
	@rm -f $@
	@test -x $(STORES)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(STORES)
	@$(BIN)/uv pip sync --quiet --python $(STORES)/bin/python requirements/stores.txt
	@$(BIN)/uv pip install --quiet --python $(STORES)/bin/python --no-deps -e client
	@touch $@

$(PROMETHEUS):
	@echo 'fetching Prometheus into $(PROMETHEUS)'
	@requirements/fetch-debian $(PROMETHEUS) './usr/bin/*' prometheus || echo 'there is no Prometheus here: the tests with one are skipped'

$(NODE_CLIENTS): requirements/javascript/package.json requirements/javascript/package-lock.json
	@echo 'installing the JavaScript clients that the tests run into $(NODE_CLIENTS)'
	@mkdir -p $@ && cp $^ $@ && npm ci --silent --no-audit --no-fund --ignore-scripts --prefix $@ \
	  || { rm -rf $@/node_modules; echo 'there is no npm here, or no package index: the tests of JavaScript clients are skipped'; }
	@touch $@

$(CHROMIUM):
	@echo 'fetching Chromium into $(CHROMIUM)'
	@requirements/fetch-debian --tree $(CHROMIUM) chromium-headless-shell || echo 'there is no Chromium here: the tests with one are skipped'

.PHONY: demo
demo: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
demo: $(INSTALLED) ## fold, serve and embed once, on random weights (BASE= for real ones)
	@$(MAKE) --no-print-directory merge BASE='$(BASE)'
	@$(BIN)/python examples/demo.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval --started $(STARTED)

.PHONY: merge
merge: $(INSTALLED) ## fold BASE into checkpoints/ (TASK= for one task, QUANTIZE=int8 or fp8 for half the weights)
	@if [ '$(BASE)' = standin ] && [ ! -e $(STANDIN) ]; then $(BIN)/jina-v4-merge standin $(STANDIN); fi
	@if [ -n '$(MISSING)' ]; then \
	  $(BIN)/jina-v4-merge fold --base $(if $(filter standin,$(BASE)),$(STANDIN),$(BASE)) --out $(MERGED) $(MISSING) $(addprefix --quantize ,$(QUANTIZE)); \
	else echo '$(MERGED) holds the merged checkpoints already'; fi

.PHONY: verify
verify: $(INSTALLED) ## check the merged checkpoints whole, and give each its canary (BASE=)
	@$(BIN)/jina-v4-merge verify $(MERGED) --canary

.PHONY: serve-retrieval serve-text-matching serve-code
serve-retrieval: ## serve the retrieval task on port 8001 (PORT=, BASE=, ARGS='-- any vLLM option')
serve-text-matching: ## serve the text-matching task on port 8002
serve-code: ## serve the code task on port 8003
serve-retrieval serve-text-matching serve-code: serve-%: $(INSTALLED)
	@$(MAKE) --no-print-directory merge TASK=$*
	@exec $(BIN)/jina-v4-serve $* --checkpoint $(MERGED)/jina-embeddings-v4-$* $(if $(PORT),--port $(PORT)) $(ARGS)

.PHONY: export
export: $(INSTALLED) ## write the base and the three adapters of BASE, for one server of all tasks
	@if [ '$(BASE)' = standin ] && [ ! -e $(STANDIN) ]; then $(BIN)/jina-v4-merge standin $(STANDIN); fi
	@if [ ! -e $(EXPORTED) ]; then \
	  $(BIN)/jina-v4-merge export-adapters --base $(if $(filter standin,$(BASE)),$(STANDIN),$(BASE)) --out $(EXPORTED) --with-base; \
	else echo '$(EXPORTED) holds the base and its adapters already'; fi

.PHONY: serve
serve: $(INSTALLED) ## serve all three tasks behind a gateway on port 8000 (PORT=, BASE=, ONE_BASE=1, ARGS='-- any vLLM option')
	@one_base='$(ONE_BASE)'; if [ -z "$$one_base" ]; then \
	  $(MAKE) --no-print-directory merge; \
	  code=0; $(BIN)/jina-v4-serve fits --checkpoints $(MERGED) || code=$$?; \
	  if [ $$code = 1 ]; then one_base=1; echo 'so one base is served with the three adapters beside it'; \
	  elif [ $$code != 0 ]; then exit $$code; fi; fi; \
	if [ -n "$$one_base" ]; then \
	  $(MAKE) --no-print-directory export; \
	  exec $(BIN)/jina-v4-serve all --one-base --checkpoints $(EXPORTED) $(if $(PORT),--port $(PORT)) $(ARGS); \
	else exec $(BIN)/jina-v4-serve all --checkpoints $(MERGED) $(if $(PORT),--port $(PORT)) $(ARGS); fi

.PHONY: doctor
doctor: $(INSTALLED) ## say what is wrong with this machine, checkpoints or settings (BASE=, ARGS=)
	@$(BIN)/jina-v4-serve doctor $(if $(wildcard $(MERGED)),--checkpoints $(MERGED)) $(ARGS)

.PHONY: search
search: export QUERY ?= bar chart of the sea level
search: $(INSTALLED) ## index PDF files and pictures, and search their pages (PDF=, QUERY=, BASE_URL=)
	@$(if $(PDF),,$(BIN)/python examples/document_search sample)
	@$(BIN)/python examples/document_search index $(if $(BASE_URL),--base-url $(BASE_URL)) $(or $(PDF),document-search/sample)
	@$(BIN)/python examples/document_search search $(if $(BASE_URL),--base-url $(BASE_URL)) -- "$$QUERY"

.PHONY: search-page
search-page: $(INSTALLED) ## serve a page to index and search with in a browser, on port 8010 (PORT=, BASE_URL=)
	@exec $(BIN)/python examples/document_search page $(if $(BASE_URL),--base-url $(BASE_URL)) $(if $(PORT),--port $(PORT))

.PHONY: eval
eval: BASE_URL ?= http://127.0.0.1:8000
eval: $(INSTALLED) ## run MTEB tasks against a running server (TASKS='NanoBEIR STS12', BASE_URL=, ARGS=--multivector)
	@$(if $(filter-out file,$(origin TASKS)),,echo 'name tasks or benchmarks of mteb, with a server running: make eval TASKS="NanoBEIR STS12" BASE_URL=http://127.0.0.1:8000'; exit 2)
	@$(BIN)/python -m jina_v4_client.integrations.mteb $(TASKS) --base-url $(BASE_URL) $(ARGS)

# Where the benchmarks put their JSON and pictures; what is kept lies in benchmarks/results.
RESULTS ?= results

.PHONY: bench
bench: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench: $(INSTALLED) ## measure throughput beside stock vLLM, vLLM in-process, transformers, sentence-transformers, llama.cpp if installed: 12 minutes
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/throughput.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval --results $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/_plots.py $(RESULTS)/throughput.json >&2

.PHONY: bench-gpu
bench-gpu: BASE := $(if $(filter file,$(origin BASE)),checkpoints/standin-full,$(BASE))
bench-gpu: $(INSTALLED) ## the same on a GPU, golden rows first: every size, output, concurrency, 30 minutes; BASE= for real weights
	@test -e '$(BASE)' -o '$(BASE)' != checkpoints/standin-full || $(BIN)/jina-v4-merge standin '$(BASE)' --size full
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/pytest -q -m 'not slow' tests/end_to_end/fleet/test_golden.py -k engine
	@$(BIN)/python benchmarks/throughput.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval --full --long --minutes 25 \
	  --results $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/_plots.py $(RESULTS)/throughput.json >&2

.PHONY: bench-gate
bench-gate: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-gate: $(INSTALLED) ## fail when a ratio to vLLM in-process or transformers fell by over 15 % (ARGS=--update)
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/gate.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: bench-goodput
bench-goodput: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-goodput: $(INSTALLED) ## find the highest arrival rate at which p99 stays within a bound
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/goodput.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: bench-live
bench-live: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-live: $(INSTALLED) ## measure p99 of short queries alone, beside a corpus, and beside one of the last priority
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/live.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval --results $(RESULTS) $(ARGS)

.PHONY: bench-vllm
bench-vllm: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-vllm: $(INSTALLED) ## let vLLM's own load generator measure the server, our client beside it
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/vllm_bench.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: soak
soak: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
soak: $(INSTALLED) ## send mixed load for half an hour and watch memory, files and vectors (ARGS='--minutes 600')
	@$(MAKE) --no-print-directory merge BASE='$(BASE)'
	@$(BIN)/python benchmarks/soak.py --checkpoints $(MERGED) --results $(RESULTS) $(ARGS)
	@$(BIN)/python benchmarks/_plots.py $(RESULTS)/soak.json >&2

.PHONY: bench-one-base
bench-one-base: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-one-base: $(INSTALLED) ## measure one base with three adapters beside three servers: throughput and memory
	@$(MAKE) --no-print-directory merge BASE='$(BASE)'
	@$(MAKE) --no-print-directory export BASE='$(BASE)'
	@$(BIN)/python benchmarks/one_base.py --folded $(MERGED) --exported $(EXPORTED) $(ARGS)

.PHONY: bench-gateway
bench-gateway: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-gateway: $(INSTALLED) ## measure what the gateway costs: latency and throughput beside the server's own
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/gateway.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: bench-ceiling
bench-ceiling: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-ceiling: $(INSTALLED) ## measure the ceiling of everything but the model: CPU time an item of each process
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/ceiling.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval --results $(RESULTS) $(ARGS)

.PHONY: bench-client
bench-client: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-client: $(INSTALLED) ## measure what the client costs beside the plain openai package
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/client.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: bench-ranking
bench-ranking: BASE := $(if $(filter file,$(origin BASE)),standin,$(BASE))
bench-ranking: $(INSTALLED) ## measure a ranking of 50 pages beside embedding them and scoring in the client: time, bytes
	@$(MAKE) --no-print-directory merge TASK=retrieval BASE='$(BASE)'
	@$(BIN)/python benchmarks/ranking.py --checkpoint $(MERGED)/jina-embeddings-v4-retrieval $(ARGS)

.PHONY: bench-merge
bench-merge: $(INSTALLED) ## measure a full-size merge beside a plain copy and PEFT (45 GB of disk, 11 GB of memory)
	@$(BIN)/python benchmarks/merge.py --base $(CHECKPOINTS)/standin-full --work $(CHECKPOINTS)/merge-benchmark $(ARGS)

.PHONY: lint
lint: $(INSTALLED) ## check style, format and the length of what the pages say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/lint.py *.md */README.md docs/*.md

.PHONY: format
format: $(INSTALLED) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: typecheck
typecheck: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

PYTEST := $(BIN)/pytest -n 2 --no-loadscope-reorder
TESTS_NEED := $(INSTALLED) $(CLIENTS_INSTALLED) $(NODE_CLIENTS)

.PHONY: test
test: $(TESTS_NEED) | $(PROMETHEUS) ## prove what the README claims, with real vLLM servers on the CPU (TESTS= for some)
	$(PYTEST) -m '$(if $(TESTS),not slow,not long and not slow)' $(TESTS)

.PHONY: test-all
test-all: $(TESTS_NEED) $(STORES_INSTALLED) | $(PROMETHEUS) $(CHROMIUM) ## prove the rest: processors, runners, stops, browser, stores, Ray
	$(PYTEST) -m 'long and not slow' $$(grep -rl --include='test_*.py' mark.long tests)

.PHONY: test-fast
test-fast: $(TESTS_NEED) ## the quick ones without vLLM, for one's own work
	$(PYTEST) -m 'not proof and not long and not slow' --ignore tests/end_to_end \
	  $$(grep -rlE --include='test_*.py' '^pytestmark = .*mark.(proof|long|slow)' tests | sed 's/^/--ignore=/')

.PHONY: test-slow
test-slow: $(INSTALLED) $(STORES_INSTALLED) ## prove what CI has no time for: killed replicas of Ray, two workers, recall of stores: 14 minutes
	$(BIN)/pytest -m slow $(TESTS)

.PHONY: dist
dist: $(INSTALLED) ## build and check the three wheels and source archives, ready to upload (DIST=)
	@rm -rf $(DIST)
	@for project in client merge serve; do \
	  $(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python --out-dir $(DIST) $$project; done
	@$(BIN)/uv tool run --quiet --python $(BIN)/python twine@$(TWINE_VERSION) check --strict $(DIST)/*.whl $(DIST)/*.gz

.PHONY: requirements
requirements: $(INSTALLED) ## pin requirements/*.txt anew from requirements/*.in
	for kind in cpu gpu clients stores; do \
	  overrides=requirements/$$kind-overrides.txt; \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	    $$(test ! -f $$overrides || echo --override $$overrides) requirements/$$kind.in -o requirements/$$kind.txt; \
	done

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22
