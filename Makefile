# Two commands set everything up by themselves: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: quickstart quickstart-molecules test test-slow lint clean

# the marker says which pyproject.toml the environment was installed from
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("gengrad needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv || echo "uv is not to be had; plain pip installs instead, slower"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[test,fast]"; \
	else $(BIN)/python -m pip install --quiet -e ".[test,fast]"; fi
	touch .venv/installed

# one thread: for small networks two are hardly faster, and crawl as soon as the machine has other work
quickstart: export OMP_NUM_THREADS = 1
quickstart: .venv/installed
	$(BIN)/python train.py configs/toy/8gaussians_nsgf.yaml out=quickstart/8gaussians
	$(BIN)/python sample.py quickstart/8gaussians --n 2048 --nfe 5 --out quickstart/8gaussians/samples.npy --trajectory
	$(BIN)/gengrad evaluate quickstart/8gaussians --nfe 5
	$(BIN)/python train.py configs/images/digits_nsgf_pp.yaml out=quickstart/digits
	$(BIN)/python sample.py quickstart/digits --n 64 --nfe 5 --out quickstart/digits/samples.png
	$(BIN)/gengrad evaluate quickstart/digits --nfe 5 --features classifier
	@echo; echo "pictures and tables:"; ls -1 quickstart/*/pictures/*.png quickstart/*/*.png quickstart/*/*.gif quickstart/*/metrics.md

quickstart-molecules: export OMP_NUM_THREADS = 1
quickstart-molecules: .venv/installed
	$(BIN)/python train.py configs/molecules/quickstart.yaml out=quickstart/molecules
	$(BIN)/python sample.py quickstart/molecules --n 1000 --seed 1 --out quickstart/molecules/hits.csv
	$(BIN)/gengrad molecules report quickstart/molecules
	@echo; echo "look at quickstart/molecules/report.html, population_after.png, hits.csv"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

# what takes minutes or gigabytes: 20,000 points a transport problem, hundreds of kills, thousands of damaged files
test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv quickstart build *.egg-info
