# make demo   set up and run the main job          make test   set up and run every test
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test check bench clean

demo: .venv/installed
	$(BIN)/bigray run examples/digits/job.toml --search tuning/lr_batch.toml --serve serve/local.yaml --exit

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	scripts/check

bench: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	for name in thousand_trials sweep_overhead controller_cost node_cost grid_accuracy checkpoint_stall input_pipeline \
		launch image_decoding example_figures recovery reporting training_throughput serve_throughput serve_latency \
		serve_autoscale serve_swaps serve_kills serve_overload serve_hostile; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bigray needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs dist
