#!/bin/sh
# Runs the tests on the newest jax when a Python >= 3.12 is found, and says so when none is.
set -eu
newest=""
for python in python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python python3.12 python3.13 python3.14 "${PYTHON_LATEST:-}"; do
  if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    newest=$python
  fi
done
if [ -z "$newest" ]; then
  echo "test-latest: no Python >= 3.12 found (the newest jax needs one); set PYTHON_LATEST=/path/to/python"
  exit 0
fi
echo "test-latest: $("$newest" --version)"
make --no-print-directory test VENV=.venv-latest PYTHON="$newest"
.venv-latest/bin/python -c 'import jax, sys; print("tested on jax", jax.__version__, "Python", sys.version.split()[0])'
