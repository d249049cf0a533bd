#!/usr/bin/env bash
# Make an empty virtual environment: scripts/make_venv.sh FOLDER [PYTHON]
# Without PYTHON it takes the first that fits, and the one the locks were resolved with first.
set -euo pipefail

fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
for name in ${2:-python3.11 python3.12 python3.13 python3}; do
    if "$name" -c "$fits" 2> /dev/null; then
        echo "setup: making $1 with $("$name" --version)"
        # pip comes with scripts/install.py, which mends one that is half installed.
        "$name" -m venv --clear --without-pip "$1"
        exit 0
    fi
done
echo "setup: ConServe needs Python 3.11, 3.12 or 3.13 with its venv module, and ${2:-none} ${2:+is not one}" >&2
echo "setup: install one (on Debian: apt install python3 python3-venv) and run make again." >&2
exit 1
