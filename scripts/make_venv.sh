#!/usr/bin/env bash
# Make a virtual environment with a Python that fits, the one the locks were resolved with first: scripts/make_venv.sh FOLDER
set -euo pipefail

for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        echo "setup: making $1 with $("$name" --version)"
        "$name" -m venv --clear "$1"
        exit 0
    fi
done
echo "setup: ConServe needs Python 3.11, 3.12 or 3.13 with its venv module, and none was found." >&2
echo "setup: install one (on Debian: apt install python3 python3-venv) and run make again." >&2
exit 1
