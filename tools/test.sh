#!/usr/bin/env bash
# Set up if need be, then everything that must hold: notebooks and package in step and clean, every notebook's
# tests, the tests that need processes, the docs with every link resolved, README equal to index.ipynb.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
python -m pip check
unset PYTHONDONTWRITEBYTECODE           # a hundred processes import the same modules, which are compiled once, before the lanes start
python -c "import basd.cli, basd.training.build, matplotlib.pyplot, pytest, sklearn.datasets, timm, torchmetrics, torchvision"

before=$(git status --porcelain)
nbdev_export && nbdev_clean
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "notebooks and package are out of step: run nbdev_export and nbdev_clean, and commit"; exit 1
}

# six lanes at once: tests of processes mostly wait for starts and stops, pages differ much in length, and so no core idles
processes="tests/test_kill.py tests/test_labeled.py tests/test_ranks.py tests/test_shell.py tests/test_sizes.py tests/test_unlabeled.py"
numbers="tests/test_bad_input.py tests/test_frames.py tests/test_options.py tests/test_properties.py tests/test_selectors.py"
runs="tests/test_cka.py tests/test_face.py tests/test_knn.py tests/test_nodes.py tests/test_precision.py tests/test_recipes.py tests/test_reproducible.py"
log=$(mktemp -d)
lanes=()
trap 'for p in "${lanes[@]:-}"; do kill "$p" 2> /dev/null || true; done' EXIT
pytest -q --durations=10 $processes > "$log/processes" 2>&1 & lanes+=($!)
pytest -q --durations=10 $numbers > "$log/numbers" 2>&1 & lanes+=($!)
pytest -q --durations=10 $runs > "$log/runs" 2>&1 & lanes+=($!)
pytest -q --durations=10 tests $(printf -- '--ignore=%s ' $processes $numbers $runs) > "$log/others" 2>&1 & lanes+=($!)
python tools/docs.py > "$log/docs" 2>&1 & lanes+=($!)
python tools/test_pages.py
for lane in processes numbers runs others docs; do
  wait "${lanes[0]}" || { cat "$log/$lane"; exit 1; }
  lanes=("${lanes[@]:1}")
  echo "$lane:"; tail -n 14 "$log/$lane"
done
[ "$(git status --porcelain)" = "$before" ] || {
  git status --short; echo "README.md and index.ipynb are out of step: run python tools/docs.py, and commit"; exit 1
}
echo "all is well"
