#!/usr/bin/env bash
# Do the package's promises about its dependencies hold? A throw-away environment with the lowest versions that
# settings.ini allows (the lowest with a wheel for this Python), or with the newest; in it, the tests of the public names,
# recipes, export and bad input, or with --pages the pages of four rooms and two more. 10 to 20 minutes and 7 GB.
#   bash tools/bounds.sh lowest|newest [--pages]      PYTHON names the interpreter, as python3.13
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  lowest) resolution=lowest-direct;;
  newest) resolution=highest;;
  *) echo "give lowest or newest" >&2; exit 2;;
esac
# Pages with a cell that holds for the newest torch alone: an error of another kind, a slope at a point where there is
# none, a walk over the graph, a curve that ends elsewhere; and two that compile (31, 40), which the lowest cannot. All
# else that they export is run by the tests.
newest_only="02_numerics 09_grassmann 13_frequency_selector 31_fourier 34_logit_trajectory 51_basd 39_layers 40_taps"
needed() { sed -n "s/^$1 = //p" settings.ini | tr ' ' '\n' | grep -E "^(${2:-.*})"; }
tests='pytest|hypothesis|jsonschema|shtab'                          # nbdev 2, for pages, wants fastcore 1
[ "${2:-}" != --pages ] || tests="$tests|nbdev|execnb|fastcore|datasets"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"${PYTHON:-python3}" -m venv "$work/env"
. "$work/env/bin/activate"
python -m pip install -q --disable-pip-version-check uv
uv pip install -q --only-binary :all: --resolution "$resolution" -r <(needed requirements)
uv pip install -q -r <(needed dev_requirements "$tests") setuptools nbclient ipykernel
mkdir "$work/repo"                                                  # a copy: pages that are run are written back
git ls-files -z --cached --others --exclude-standard \
  | xargs -0 sh -c 'for f; do [ ! -f "$f" ] || printf "%s\0" "$f"; done' sh \
  | tar --null -cf - -T - | tar -xf - -C "$work/repo"
cd "$work/repo" && git init -q                                      # runs record a commit
git -c user.name=bounds -c user.email=bounds@example.org commit -q --allow-empty -m bounds
uv pip install -q --no-deps -e .
python -V
uv pip list 2> /dev/null | grep -E "^($(needed requirements | sed 's/[<>=].*//' | paste -sd '|')|numpy) "

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
if [ "${2:-}" = --pages ]; then
  for page in nbs/geometry/*.ipynb nbs/losses/*.ipynb nbs/methods/*.ipynb nbs/models/*.ipynb nbs/data/46*.ipynb nbs/runs/61*.ipynb; do
    if [ "$1" = lowest ] && [[ " $newest_only " == *" $(basename "$page" .ipynb) "* ]]; then continue; fi
    python tools/run_notebooks.py "$page" || [ $? = 2 ]             # 2: it ran, with warnings of these versions
  done
else
  python -m pytest -q -W ignore tests/test_{release,face,keys,recipes,export,classes,bad_input,fuzz,shell}.py
fi
echo "$1: all is well"
