# Makes or reuses .venv in the repository and installs this package there. Sourced by run.sh and test.sh, in bash.
#
#   prepare_environment EXTRA     afterwards $venv/bin holds python, gemma2 and the tools of that extra
#
# A stamp in .venv holds a checksum of pyproject.toml, constraints.txt and the repository's place, so that an
# environment that is up to date is used at once. GEMMA2_PYTHON names the Python to use, if not the first that fits.

find_python() {
    local candidate
    for candidate in ${GEMMA2_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10 or newer is needed, but ${GEMMA2_PYTHON:-python3} is $(
        "${GEMMA2_PYTHON:-python3}" --version 2>&1 | tail -n 1 | grep '^Python' || echo "not there"
    ). Install it (https://www.python.org/downloads/), or set GEMMA2_PYTHON=/path/to/python3." >&2
    return 1
}

# pip without its chatter: what it prints is shown only when it fails.
quiet_pip() {
    local log status=0
    log=$(mktemp)
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -q -c constraints.txt "$@" \
        >"$log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        grep -v 'is ignored: it is neither a file nor a directory' "$log" >&2
    fi
    rm -f "$log"
    return "$status"
}

prepare_environment() {
    local extra=$1 stamp checksum python
    venv=$PWD/.venv
    stamp=$venv/.gemma2-$extra
    checksum=$(cat pyproject.toml constraints.txt <(pwd) | cksum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then
        return 0
    fi

    if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        python=$(find_python)
        echo "Making .venv with $("$python" --version) …" >&2
        if ! "$python" -m venv --clear "$venv" >&2; then
            echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    echo "Installing gemma2[$extra] with PyTorch into .venv; this takes a minute or two the first time …" >&2
    quiet_pip -e ".[$extra]" || {
        echo "error: the installation failed; what pip said stands above. To begin anew: rm -r .venv" >&2
        return 1
    }
    # The tools of "dev" come with all that "torch" brings.
    if [ "$extra" = dev ]; then echo "$checksum" >"$venv/.gemma2-torch"; fi
    echo "$checksum" >"$stamp"
}
