#!/usr/bin/env bash
# Install Debian packages that tests drive: `test_packages.sh PROGRAM=PACKAGE ...`.
# What cannot be installed here is left out, with a word: its tests skip.
set -euo pipefail

missing=()
for pair in "$@"; do
    command -v "${pair%%=*}" > /dev/null || missing+=("${pair#*=}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "test: the tests that need ${missing[*]} skip; with it they run (on Debian, as root: apt-get install ${missing[*]})" >&2
    exit 0
fi
echo "test: installing ${missing[*]} (once)"
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -y -qq --no-install-recommends "${missing[@]}")
"${install[@]}" > /dev/null 2>&1 \
    || { apt-get update -qq && "${install[@]}"; } > /dev/null 2>&1 \
    || echo "test: ${missing[*]} could not be installed; the tests that need it skip" >&2
