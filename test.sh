#!/usr/bin/env bash
# Installs gemma2 and its development tools into .venv beside this file, if need be, and runs every check. Arguments go
# to pytest: bash test.sh -k config
set -euo pipefail
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
prepare_environment dev

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}
check "ruff check" "$venv/bin/ruff" check --quiet .
check "ruff format" "$venv/bin/ruff" format --check --quiet .
check "mypy" "$venv/bin/mypy" --no-error-summary
check "import-linter" "$venv/bin/lint-imports" --no-logo
# One process a core; threads of PyTorch's own would only get in each other's way.
OMP_NUM_THREADS=1 check "pytest" "$venv/bin/pytest" -n auto "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "All checks passed."
