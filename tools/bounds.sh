#!/usr/bin/env bash
# Do the package's promises about its dependencies hold? A throw-away environment with the lowest versions that
# settings.ini allows, and one with the newest; in each, the pages of four rooms, two more, and the tests of runs and
# bad input. About 15 minutes and 7 GB each.
#   bash tools/bounds.sh [floor|ceiling]      default: both, one after the other; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
# Pages with a cell that holds for the newest torch alone: an error of another kind, a slope at a point where there is
# none, a walk over the graph, a curve that ends elsewhere; and two that compile (31, 40), which the lowest cannot. All
# else that they export is run by the tests.
newest_only="02_numerics 09_grassmann 13_frequency_selector 31_fourier 34_logit_trajectory 51_basd 39_layers 40_taps"
read_line() { sed -n "s/^$1 = //p" settings.ini; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() {                                        # $1: name; then what to install
  local name=$1 place="$work/$1"; shift
  "${PYTHON:-python3}" -m venv "$place/env"
  . "$place/env/bin/activate"
  python -m pip install -q --disable-pip-version-check "$@"
  mkdir "$place/repo"                            # a copy: pages that are run are written back
  git -C "$here" ls-files -z --cached --others --exclude-standard \
    | (cd "$here" && xargs -0 sh -c 'for f; do [ -f "$f" ] && printf "%s\0" "$f"; done' sh) \
    | tar -C "$here" --null -cf - -T - | tar -xf - -C "$place/repo"
  cd "$place/repo"
  python -m pip install -q --disable-pip-version-check --no-deps -e .
  python -c "import torch, torchvision, timm; print(f'torch {torch.__version__}, \
torchvision {torchvision.__version__}, timm {timm.__version__}')"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
  for page in nbs/geometry/*.ipynb nbs/losses/*.ipynb nbs/methods/*.ipynb nbs/models/*.ipynb nbs/data/50*.ipynb \
      nbs/training/60*.ipynb; do
    if [ "$name" = floor ] && [[ " $newest_only " == *" $(basename "$page" .ipynb) "* ]]; then continue; fi
    python tools/run_notebooks.py "$page" || [ $? = 2 ]   # 2: it ran, with warnings of these versions
  done
  python -m pytest -q -W ignore tests/test_shell.py tests/test_bad_input.py tests/test_fuzz.py
  cd "$here"
  deactivate
  rm -rf "$place"
}

requirements=$(read_line requirements)
tests=$(read_line dev_requirements | tr ' ' '\n' \
  | grep -E '^(nbdev|execnb|fastcore|pytest|hypothesis|datasets)' | tr '\n' ' ')"nbclient ipykernel"
what=${1:-both}
if [ "$what" != ceiling ]; then check floor ${requirements//>=/==} $tests; echo "floor: all is well"; fi
if [ "$what" != floor ]; then
  check ceiling --upgrade $(tr ' ' '\n' <<< "$requirements" | sed 's/[>=<].*//') $tests; echo "ceiling: all is well"
fi
