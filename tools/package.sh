#!/usr/bin/env bash
# What a user gets: the sdist and, made from it, the wheel; that alone in an empty environment; there, in an empty folder,
# one epoch of each stage of the quickstart, and what is done with its runs.
#   bash tools/package.sh [PYTHON [FOLDER]]     e.g. python3.13; without FOLDER nothing is left
set -euo pipefail
python=${1:-python3}
repo=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 1 ]; then mkdir -p "$2"; there=$(cd "$2" && pwd); else there=$(mktemp -d); trap 'rm -rf "$there"' EXIT; fi
unset PYTHONPATH

"$python" -m venv "$there/tools"
"$there/tools/bin/python" -m pip install -q --disable-pip-version-check build
"$there/tools/bin/python" -m build -o "$there/dist" "$repo" | tail -n 1
"$python" - "$repo" "$there"/dist/*.whl <<'PYTHON'
import sys
from pathlib import Path
from zipfile import ZipFile
repo, held = Path(sys.argv[1]), {n for n in ZipFile(sys.argv[2]).namelist() if ".dist-info/" not in n}
kinds = ".py", ".pyi", ".typed", ".yaml", ".json", ".mplstyle"
wanted = {"basd_distill.py", *(p.relative_to(repo).as_posix() for p in (repo/"basd").rglob("*") if p.suffix in kinds)}
sys.exit(f"in the package or in the wheel alone: {', '.join(sorted(wanted ^ held))}" if wanted ^ held else 0)
PYTHON

"$python" -m venv "$there/env"
export PATH="$there/env/bin:$PATH"
python -m pip install -q --disable-pip-version-check "$there"/dist/*.whl
python -m pip check
mkdir "$there/empty" && cd "$there/empty"
python - <<'PYTHON'
import importlib
import pkgutil
from importlib.metadata import version

import basd
for m in pkgutil.walk_packages(basd.__path__, "basd."):
    if not m.name.endswith("__main__"): importlib.import_module(m.name)
print("fastcore", version("fastcore"), "torch", version("torch"))
PYTHON
basd --version
basd train quickstart train.epochs=1 train.warmup_epochs=0 --run-dir run
basd evaluate run/basd --corrupted 100
basd analyze run/basd --images 64
basd bench quickstart --reps 3 --out bench
echo "the wheel does what the quickstart says"
