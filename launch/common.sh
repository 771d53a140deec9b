# shellcheck shell=bash
# Sourced by the scripts beside it: go to the repository's root, and make .venv from pyproject.toml when it is needed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  echo "error: $*" >&2
  exit 1
}

# The first Python on the path that pyproject.toml allows; PYTHON=/path/to/python chooses another one.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 among: ${PYTHON:-python3.11 python3.12 python3}; install one, or set PYTHON=/path/to/it"
}

# make_environment run|dev: dev adds the tools of the tests, and serves for run as well. A stamp in .venv says for
# which pyproject.toml it was made, so that the second call takes no time.
make_environment() {
  local wanted=$1 hash python target
  hash=$(cksum <pyproject.toml)
  for made in dev "$wanted"; do
    if [ "$(cat ".venv/.made-for-$made" 2>/dev/null)" = "$hash" ]; then return; fi
  done
  python=$(find_python)
  if [ ! -x .venv/bin/pip ]; then
    echo "Making .venv with $("$python" --version) ..." >&2
    "$python" -m venv .venv || fail "$python cannot make .venv; see above (Debian and Ubuntu: apt install python3-venv)"
  fi
  target=.
  if [ "$wanted" = dev ]; then target='.[dev]'; fi
  echo "Installing what pyproject.toml asks for (once; some minutes) ..." >&2
  # -qq leaves errors only. For torch's small CPU wheel on a machine without a GPU set PIP_EXTRA_INDEX_URL, see README.
  .venv/bin/pip install -qq --editable "$target" || fail "pip could not install $target; see above"
  echo "$hash" >".venv/.made-for-$wanted"
}
