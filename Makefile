# Two commands do everything: `make repro` (environment, phantom data, every stage, tables) and `make test`.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE :=
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: repro test check drill clean

# DVC does one stage after another. JOBS of it share the data sets, then the trainings, two a process, in an order that
# starts the demo's long ones early, then what is done with the models. One that fails leaves the others be (255, DVC's
# status then, would end xargs). CXR_TURN numbers them: they take GPUs in turn. `dvc repro` alone makes the same files in
# one process.
JOBS ?= 2
SHARED := sed 's/ $$//' | xargs -r -P $(JOBS) --process-slot-var=CXR_TURN -L 1 sh -c 'dvc --wait-for-lock repro --keep-going --single-item "$$@" || exit 1' dvc
repro: export CXR_REPRO := make-$(shell date +%s)
repro: export CXR_JOBS := $(JOBS)
repro: .venv/ready
	dvc repro phantom
	dvc stage list --name-only > .dvc/tmp/stages
	grep '^ingest' .dvc/tmp/stages | paste -d ' ' - - | $(SHARED)
	dvc repro corpus
	(grep '^pretrain' .dvc/tmp/stages | sort -r | paste -d ' ' - -; echo audit) | $(SHARED)
	(grep -E '^(embed|zero_shot|retrieval)' .dvc/tmp/stages | paste -sd ' '; \
		grep -E '^(few_shot|regenerate)' .dvc/tmp/stages | paste -d ' ' - -) | $(SHARED)
	dvc repro
	python -m pipeline.tracking
	@cat reports/table1.md reports/table2.md reports/table3.md reports/table4.md
	@python -m stages.reference
	@echo "The page: reports/index.html    Every metric: mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: .venv/ready check
	pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready
	ruff check .
	ruff format --check .
	lint-imports
	mypy

# The long drills; then those of 200 kills and of a million damaged inputs, which go on where they were, MINUTES each.
MINUTES ?= 10
drill: .venv/ready
	pytest -m drill
	python -m tests.kills data/work/drill $(MINUTES)
	python -m tests.fuzz data/work/fuzz.json $(MINUTES)

# The environment: exactly what requirements.lock pins, hashes checked, and this package in place, nothing else. The
# import compiles the byte code that trainings need, once: they start in pairs. All the rest would take six times as long.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "import stages.pretrain, timm, transformers.models.roformer.modeling_roformer"
	touch $@

# After a change of dependencies in pyproject.toml.
.PHONY: lock
lock:
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-emit-index-url --no-annotate --quiet -o requirements.lock

clean:
	rm -rf .venv data/phantom data/shards data/index data/prompts data/corpus data/models data/audit data/work data/fingerprints \
		data/settings data/embeddings/* data/results/* reports
