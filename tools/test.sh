#!/usr/bin/env bash
# Set up if need be, then everything that must hold: notebooks and package in step and clean, every notebook's
# tests, the tests that need processes, the docs with every link resolved, README equal to index.ipynb.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
python -m pip check

before=$(git status --porcelain)
nbdev_export && nbdev_clean
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "notebooks and package are out of step: run nbdev_export and nbdev_clean, and commit"; exit 1
}

nbdev_test --n_workers 2 --timing
# the tests of processes beside all others, as each waits for the other's starts and stops;
# half of the time on two cores
processes="tests/test_kill.py tests/test_ranks.py tests/test_shell.py tests/test_sizes.py"
said=$(mktemp)
pytest -q $processes > "$said" 2>&1 & of_processes=$!
pytest -q tests $(printf -- '--ignore=%s ' $processes) || { kill $of_processes; exit 1; }
wait $of_processes || { cat "$said"; exit 1; }
tail -n 1 "$said"
python tools/docs.py
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "README.md and index.ipynb are out of step: run python tools/docs.py, and commit"; exit 1
}
echo "all is well"
