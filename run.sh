#!/usr/bin/env bash
# Installs gemma2 into .venv beside this file, if need be, and runs it:
#
#   bash run.sh "Once upon a time"         the same as: gemma2 generate "Once upon a time"
#   bash run.sh chat                       any verb with its options; bash run.sh --help lists them
set -euo pipefail
called_from=$PWD
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
prepare_environment
cd "$called_from"
# Options and verbs are gemma2's own; any other first argument is a prompt.
case "${1:---help}" in
    -*) ;;
    *)
        if ! "$venv/bin/python" -c 'import sys; from gemma2.cli.main import VERBS; sys.exit(sys.argv[1] not in VERBS)' "$1"
        then
            set -- generate "$@"
        fi
        ;;
esac
exec "$venv/bin/gemma2" "$@"
