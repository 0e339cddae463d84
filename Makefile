# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Without dependencies, which would bring torchvision and with it another torch; the extra experiments has what it needs.
CURVLINOPS ?= "curvlinops-for-pytorch>=3,<4"
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-machines lint docs package release clean
.DELETE_ON_ERROR:

demo: $(VENV)/.lab
	$(BIN)/asgo demo --out runs/demo --resume

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# A minute on two cores: while you write.
test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# One row of benchmarks/machines.py, as a second processor.
test-machines: $(VENV)/.dev
	$(BIN)/python benchmarks/machines.py --rows "MKL without vectors" --suites roots structures --pytest="-n 2"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A source distribution and, from it, a wheel, of asgo and of asgo-lab, with the checks that an index makes of them.
package: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --outdir dist src/asgo/lab
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m zipfile -l dist/asgo-*.whl | grep asgo/py.typed
	$(BIN)/python -m zipfile -l dist/asgo_lab-*.whl | grep asgo/lab/compare/report.html.j2

# make release VERSION=0.2.0: writes the version where it stands, commits, tags v0.2.0 and builds what is uploaded.
release: $(VENV)/.dev
	@test -n "$(VERSION)" || { echo "write: make release VERSION=0.2.0" >&2; exit 1; }
	@git diff --quiet HEAD || { echo "commit or put away what has changed first" >&2; exit 1; }
	sed -i 's/^__version__ = .*/__version__ = "$(VERSION)"/' src/asgo/__init__.py
	sed -i 's/^version = .*/version = "$(VERSION)"/; s/asgo\[lab\]==[^"]*/asgo[lab]==$(VERSION)/' src/asgo/lab/pyproject.toml
	sed -i 's/^version: .*/version: $(VERSION)/' CITATION.cff
	sed -i "s/^## Unreleased$$/## Unreleased\n\n## $(VERSION), $$(date +%F)/" CHANGELOG.md
	git commit --quiet --all --message "Release $(VERSION)"
	git tag --annotate v$(VERSION) --message "Release $(VERSION)"
	$(MAKE) package

# torch first and by exact version: a range would take the newest build with all its CUDA packages.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[lab]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(CURVLINOPS)
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
