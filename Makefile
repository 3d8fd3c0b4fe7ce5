# make test is the README's second command; CI (.ci/run) runs every target but bench.
PY = .venv/bin/python
PYTEST = PYTHONPATH=. CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -q

.PHONY: setup test check unit parallel e2e te slow compare bench

setup:
	@./launch/setup.sh

test: check  ## lint, types and all quick tests, under 10 minutes; suites run two at a time
	@echo "unit, parallel and end-to-end tests; each reports when it is done"
	@$(MAKE) --no-print-directory -j2 -Otarget unit parallel e2e

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

unit: setup
	$(PYTEST) tests/unit -m "not slow and not gpu"

parallel: setup
	$(PYTEST) tests/parallel -m "not slow and not gpu"

e2e: setup
	$(PYTEST) tests/e2e -m "not slow and not gpu"

te: setup  ## Transformer Engine's classes without a GPU; skips where its overlay is missing
	$(PYTEST) tests/te

slow: setup  ## what make test leaves out: torch.compile, golden losses, launcher from scratch
	$(PYTEST) tests -m "slow and not gpu"

compare: setup  ## baseline, LA, one, bi, qd on the tiny recipe: table and picture
	$(PY) tools/compare_runs.py --train tiny-moe $(ARGS)

bench: setup
	$(PY) tools/bench.py $(ARGS)
