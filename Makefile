# make test is the README's second command; CI (.ci/run) runs every target but gpu,
# gpu-bench, bench, compare and image.
PY = .venv/bin/python
PYTEST = PYTHONPATH=. CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -q

.PHONY: setup test check unit parallel kernels interpreted e2e te cluster
.PHONY: slow slow-parallel slow-runs slow-rest gpu gpu-bench compare bench image image-test

setup:  ## tests need the extra as well
	@./launch/setup.sh vision

test: check  ## lint, types and all quick tests, under 10 minutes; suites run two at a time
	@echo "parallel, unit, kernel and end-to-end tests; each reports when it is done"
	@$(MAKE) --no-print-directory -j2 -Otarget parallel unit kernels e2e

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

unit: setup
	$(PYTEST) tests/unit -m "not slow and not gpu"

parallel: setup
	$(PYTEST) tests/parallel -m "not slow and not gpu"

kernels: setup  ## C++ built and run; Triton compiled ahead of time and counted
	$(PYTEST) tests/kernels --ignore=tests/kernels/triton -m "not slow and not gpu"

interpreted: setup  ## Triton's kernels run on the CPU by its interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/triton -m "not gpu"

e2e: setup
	$(PYTEST) tests/e2e -m "not slow and not gpu"

te: setup  ## Transformer Engine without a GPU, around emulated kernels; skipped where its overlay is missing
	$(PYTEST) tests/te tests/gpu -m "not gpu"

cluster: setup  ## submitted to a real Slurm of two nodes on this host; skips without its daemons
	$(PYTEST) tests/launch -m "not slow and not gpu"

slow: interpreted slow-parallel slow-runs slow-rest  ## what make test leaves out; each may be run beside the others

slow-parallel: setup
	$(PYTEST) tests/parallel -m "slow and not gpu"

TWINS = tests/e2e/test_recipe_twins.py
slow-runs: setup  ## signals, golden losses, comparisons of runs
	$(PYTEST) tests/e2e --ignore=$(TWINS) -m "slow and not gpu"

slow-rest: setup  ## twins of the recipes, the launcher from scratch
	$(PYTEST) tests --ignore=tests/image --ignore=tests/parallel \
	  $(addprefix --ignore=,$(filter-out $(TWINS),$(wildcard tests/e2e/test_*.py))) -m "slow and not gpu"

gpu: setup  ## on a GPU, in 8 minutes: tests, losses in all number formats, experts; see tools/gpu_check.sh --help
	./tools/gpu_check.sh

gpu-bench: setup  ## on a GPU: moe-2b timed, in FP8 too, the op, a layer, images
	./tools/gpu_check.sh gpu-results/bench step fp8 op layer images

compare: setup  ## baseline, LA, one, bi, qd on the tiny recipe: table and picture
	$(PY) tools/compare_runs.py --train tiny-moe $(ARGS)

bench: setup  ## MoA over fixed: ARGS=--op, --layer, --static; default: whole runs of tiny-moe
	$(PY) tools/bench.py $(ARGS)

image:  ## the container image, by docker, podman or buildah: IMAGE=, BASE_IMAGE=, EXTRAS=, UNPIN=
	@./launch/container/build.sh $(ARGS)

image-test: setup  ## the Dockerfile on a base that stands in for NVIDIA's; skips without buildah, debootstrap, root
	$(PYTEST) tests/image
