# Makes or reuses .venv in the repository and installs this package there. Sourced by run.sh and test.sh, in bash.
#
#   prepare_environment [EXTRA]   afterwards $venv/bin holds python, gemma2 and the tools of that extra, and src/gemma2
#                                 the kernels, compiled
#
# A stamp in .venv holds a checksum of pyproject.toml, constraints.txt and the repository's place, and another one of
# the kernels' sources, so that an environment that is up to date is used at once. GEMMA2_PYTHON names the Python to
# use, if not the first that fits.

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

# Compiles the kernels in place, unless they are those of the sources. `pip install` would compile all of them each time.
prepare_kernels() {
    local stamp=$venv/.gemma2-kernels checksum log
    checksum=$(cat CMakeLists.txt kernels/CMakeLists.txt kernels/*.* kernels/*/*.* <(pwd) | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ] && compgen -G 'src/gemma2/_kernels*.so' >/dev/null; then
        return 0
    fi
    echo "Compiling the kernels; this takes a minute the first time …" >&2
    log=$(mktemp)
    if ! PATH=$venv/bin:$PATH bash scripts/build_kernels.sh >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        echo "error: the kernels could not be compiled; the reason stands above." >&2
        return 1
    fi
    rm -f "$log"
    echo "$checksum" >"$stamp"
}

prepare_environment() {
    local extra=${1:-} stamp checksum python
    venv=$PWD/.venv
    stamp=$venv/.gemma2-${extra:-base}
    checksum=$(cat pyproject.toml constraints.txt <(pwd) | cksum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then
        prepare_kernels
        return
    fi

    if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        python=$(find_python)
        echo "Making .venv with $("$python" --version) …" >&2
        if ! "$python" -m venv --clear "$venv" >&2; then
            echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    echo "Installing gemma2${extra:+[$extra]} into .venv; this takes a minute or two the first time …" >&2
    # The package without its kernels, and what prepare_kernels needs.
    SKBUILD_WHEEL_CMAKE=false quiet_pip -e ".${extra:+[$extra]}" cmake ninja nanobind || {
        echo "error: the installation failed; what pip said stands above. To begin anew: rm -r .venv" >&2
        return 1
    }
    # The tools of "dev" come with all that the others bring.
    if [ "$extra" = dev ]; then echo "$checksum" | tee "$venv/.gemma2-base" >"$venv/.gemma2-torch"; fi
    echo "$checksum" >"$stamp"
    prepare_kernels
}
