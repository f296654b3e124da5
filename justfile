# The project's commands. `just` alone lists them.

# What `just quick` runs: losses, log-probs, the training step, the store, recipes, and one run from data to report.
quick := "tests/trainer/objectives/test_losses.py tests/trainer/scoring/test_logprobs.py tests/trainer/scoring/test_group_table.py " \
    + "tests/trainer/test_train.py::test_the_step_equals_that_of_a_naive_loop tests/data/test_examples.py " \
    + "tests/data/store/test_store.py tests/data/store/test_rows.py tests/data/store/test_damage.py " \
    + "tests/data/store/test_crashes.py tests/data/store/test_artifact.py tests/data/store/test_index.py tests/recipe " \
    + "tests/pipeline/rank/test_rank.py::test_the_order_is_falling_similarity_to_the_target " \
    + "tests/eval/statistics/test_bootstrap.py::test_the_interval_is_the_percentile_bootstrap " \
    + "tests/test_cli.py::test_run_makes_everything_and_a_second_run_nothing " \
    + "--deselect tests/data/store/test_damage.py::test_several_readers_may_find_the_same_damage_at_once " \
    + "--deselect tests/data/store/test_crashes.py::test_a_killed_process_resumes " \
    + "--deselect tests/data/store/test_crashes.py::test_two_processes_share_the_work " \
    + "--deselect tests/data/store/test_store.py::test_seeds_leave_room_for_samples_and_stay_below_the_limit"

default:
    @just --list

# Install the package with everything its tests need
setup:
    python -m pip install -e ".[dev]"

# The whole method on the documentation of the running Python
demo:
    cpo-pipe demo

# Tests of every behaviour, in two processes (those that need vLLM skip where it is not installed)
test *ARGS:
    python -m pytest -n 2 --dist worksteal {{ARGS}}

# The core, about a minute on two idle cores: losses, log-probs, the store, recipes, and one run from data to report
quick *ARGS:
    python -m pytest -n 2 --dist worksteal {{quick}} {{ARGS}}

# Further variants of what `test` covers, which CI runs: all architectures and recipes, Ray, kills and resumes
test-slow *ARGS:
    python -m pytest -n 2 --dist worksteal -m "slow and not soak" {{ARGS}}

# Style and the direction of imports
lint:
    ruff check .
    ruff format --check .
    lint-imports

# Static types
typecheck:
    mypy

# Speed, as ratios measured side by side in one run
bench: bench-pipeline bench-train

# Speed of negatives, ranking and the store at scale (half an hour; vLLM's part runs where vLLM is installed)
bench-pipeline:
    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks -o python_files="bench_*.py" -o python_functions="bench_*" -s

# The report in a browser: its size and loading time with 5,000 examples of 4 systems (needs chromium)
bench-report:
    python -m pytest tests/benchmarks/bench_report.py -o python_functions="bench_*" -s

# Tests that are too long for CI
soak:
    python -m pytest -m soak -s -rA

# Which attention backend is numerically equivalent for which architecture (a table)
exactness:
    python -m tests.benchmarks.exactness

# The training step beside TRL's DPOTrainer: time, memory, the loop (over an hour)
bench-train *ARGS:
    OMP_NUM_THREADS=1 python -m tests.benchmarks.train_step {{ARGS}}

# The demo on ten fresh seeds: verdicts, time and memory (most of an hour on two cores; a second call resumes)
demo-seeds *ARGS:
    python -m tests.benchmarks.demo_seeds {{ARGS}}

# Methods compared on a real model, seed by seed (hours; a second call resumes); --help names the files it needs
results-real *ARGS:
    python -m tests.benchmarks.results_real {{ARGS}}

# The papers' comparisons at the scale small, over five seeds: docs/results.md (over an hour on two cores; a second call resumes)
results *ARGS:
    python -m tests.benchmarks.results {{ARGS}}
