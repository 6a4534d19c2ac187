# Recipes of ekfac_rs; each does the set-up it needs first, and does it only once.

python := ".venv/bin/python"

# Rust tests: dependencies as in a release, so that they are compiled once; our crate with assertions
checked := "--release --locked --config rust/tests.toml"

# Cargo with Clippy as the compiler of our crates, and a warning as an error: `cargo clippy` by itself
# would check all dependencies once more
clippy := "RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__ cargo"

# Python compiles what it imports, once: not everything at installation, not the same in each process
export PYTHONDONTWRITEBYTECODE := ""

# List the recipes
default:
    @just --list

# Make .venv with pinned dependencies
setup: (environment ".venv" "requirements.lock")

# Make an environment of what a lock file pins, again only when that changed
[private]
environment folder lock:
    #!/usr/bin/env bash
    set -euo pipefail
    [ -x {{folder}}/bin/python ] || python3 -m venv {{folder}}
    if ! cmp -s {{lock}} {{folder}}/requirements.installed; then
        # uv is three times as fast; pip knows what its own configuration says of mirrors.
        pip="{{folder}}/bin/python -m pip install --no-compile --quiet --disable-pip-version-check"
        $pip "$(grep ^uv== requirements.lock)"
        {{folder}}/bin/python -m uv pip install --quiet --python {{folder}} -r {{lock}} || $pip -r {{lock}}
        cp {{lock}} {{folder}}/requirements.installed
    fi

# Build the Rust core into .venv
dev: setup
    @PIP_QUIET=1 VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release --locked --quiet

# Lint, then all tests: Rust, then Python
test: fetch-and-compile build-and-check-types lint-and-test-rust test-python

# Python's dependencies come over the network while the Rust tests compile
[private]
fetch-and-compile:
    #!/usr/bin/env bash
    set -euo pipefail
    trap wait EXIT
    {{just_executable()}} setup & fetching=$!
    {{clippy}} test {{checked}} --no-run --quiet
    wait $fetching

# Types are checked on one core, and most of the core's compilation is on one, too
[parallel]
[private]
build-and-check-types: dev check-types

# Stubs are compared on one core
[private]
lint-and-test-rust: dev
    #!/usr/bin/env bash
    set -euo pipefail
    trap wait EXIT
    {{just_executable()}} lint-rust lint-python & linting=$!
    {{just_executable()}} test-rust
    wait $linting

# Tests of the Rust core; they need neither Python nor torch
test-rust:
    {{clippy}} test {{checked}}

# Tests of the Python package, files side by side (--thorough: long ones, and all combinations of
# options); those that need data find it through EKFAC_DATA or ../shared/data
test-python *args: dev
    {{python}} -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder {{args}}

# Tests that need Avalanche and Lightning, and their page, in an environment of their own
test-integrations *args: dev (environment ".venv-integrations" "tests/integrations/requirements.lock")
    PYTHONPATH=python .venv-integrations/bin/python -m pytest tests/integrations \
        "tests/docs/test_pages.py::test_the_python_of_a_page_runs_from_its_top_to_its_end[docs/integrations.md]" {{args}}

alias test-avalanche := test-integrations

# Tests of the Python package that need an NVIDIA GPU
test-gpu *args: dev
    {{python}} -m pytest -m cuda --thorough {{args}}

# The same under compute-sanitizer, which is part of the CUDA toolkit
sanitize-gpu *args: dev
    compute-sanitizer --report-api-errors no --error-exitcode 1 {{python}} -m pytest -m cuda tests/gpu {{args}}

# Check formatting, lints, types and stubs
lint: dev lint-rust lint-python check-types

# What the tests compile is looked at there; the module, here as a library that is linked to nothing
[private]
lint-rust:
    cargo fmt --all --check
    {{clippy}} test {{checked}} --no-run --quiet
    {{clippy}} rustc {{checked}} --quiet --package ekfac-python --crate-type rlib

[private]
lint-python:
    {{python}} -m ruff format --check python tests benchmarks scripts
    {{python}} -m ruff check python tests benchmarks scripts
    {{python}} -m mypy.stubtest ekfac_rs._core --mypy-config-file tests/stubtest.ini

[private]
check-types: setup
    {{python}} -m mypy

# Format everything
fmt: setup
    cargo fmt --all
    {{python}} -m ruff format python tests benchmarks scripts
    {{python}} -m ruff check --fix python tests benchmarks scripts

# Build the documentation's pages into site/; a warning is an error. `just docs serve` shows them
docs command="build": (environment ".venv-docs" "docs/requirements.lock")
    NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs {{command}} --strict

# Run an experiment: permuted MNIST, quick preset, unless told otherwise
experiments *args="permuted-mnist --preset quick": dev
    {{python}} -m ekfac_rs.experiments {{args}}

# Compare with torch in one run: factor passes, penalty, Gram matrices
bench *args: dev
    {{python}} benchmarks/bench.py {{args}}

# Time and bytes of a curvature of 1, 2 and 4 processes, and a model of what 1,000 would take
bench-distributed *args: dev
    {{python}} benchmarks/bench_distributed.py {{args}}

# Compare with torch on an NVIDIA GPU; --device cpu --quick for a dry run without one
bench-gpu *args: dev
    {{python}} benchmarks/bench_gpu.py {{args}}

# Make target/gpu-bundle, for a machine with a GPU and neither network nor Rust: there scripts/gpu.sh OUT
gpu-bundle *args: setup
    {{python}} scripts/gpu_bundle.py {{args}}

# Compare with other libraries in one run, into docs/results/speed; --quick for a try, --check for
# whether all compute the same factors
bench-peers *args: dev (environment ".venv-peers" "benchmarks/peers.lock")
    PYTHONPATH=python .venv-peers/bin/python benchmarks/bench_peers.py {{args}}

# Run Avalanche's benchmarks with its strategies and with ours, into results/avalanche: ten minutes
avalanche *args: dev (environment ".venv-integrations" "tests/integrations/requirements.lock")
    OMP_NUM_THREADS=1 PYTHONPATH=python .venv-integrations/bin/python benchmarks/bench_avalanche.py {{args}}

# Benchmarks of the Rust core alone
bench-rust:
    cargo bench --locked -p ekfac-benches

# Pin the Python dependencies anew, those of the documentation's pages apart
lock: setup
    {{python}} -m uv pip compile --quiet --universal --extra dev --no-emit-index-url --no-header --no-annotate --output-file requirements.lock pyproject.toml
    {{python}} -m uv pip compile --quiet --universal --group docs --no-emit-index-url --no-header --no-annotate --output-file docs/requirements.lock

# Pin the libraries of bench-peers anew, beside the same torch
lock-peers: setup
    {{python}} -m uv pip compile --quiet --universal --extra experiments --constraints requirements.lock --no-emit-index-url --no-emit-package ekfac-rs --no-header --no-annotate --output-file benchmarks/peers.lock pyproject.toml benchmarks/peers.in

# Pin what test-integrations needs anew, beside the same torch
lock-integrations: setup
    {{python}} -m uv pip compile --quiet --universal --extra test --extra avalanche --extra lightning --constraints requirements.lock --no-emit-index-url --no-emit-package ekfac-rs --no-header --no-annotate --output-file tests/integrations/requirements.lock pyproject.toml
