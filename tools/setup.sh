# Sourced by the scripts beside it: an environment with the package and its development tools, made once.
# An active virtual environment is used as it is; otherwise `.venv` in the repository is made and filled.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.basd-installed"
if [ ! -f "$stamp" ] || [ settings.ini -nt "$stamp" ]; then
  echo "installing basd and its development tools into $(basename "$VIRTUAL_ENV") (a minute or two, once)"
  # uv downloads and unpacks in parallel, in a third of pip's time; where it finds no index, pip with its configuration does
  python -m pip install -q --disable-pip-version-check uv && python -m uv pip install -q -e '.[dev]' ||
    python -m pip install -q --disable-pip-version-check -e '.[dev]'
  touch "$stamp"
fi
