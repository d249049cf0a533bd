#!/usr/bin/env bash
# open_issue.sh TITLE REPORT URL: one open issue of that title has the newest report; an issue that is
# open already gets a comment. Needs gh, GH_TOKEN and a checkout of the repository.
set -euo pipefail
title=$1 report=$2 url=$3

body=$(mktemp)
trap 'rm -f "$body"' EXIT
{
    echo "From $url, the end of its output:"
    echo
    tail --lines=200 "$report" | tail --bytes=50000 | sed 's/^/    /'
} > "$body"

number=$(gh issue list --state open --search "in:title \"$title\"" --json number,title \
    --jq "[.[] | select(.title == \"$title\")][0].number // empty")
if [[ -n $number ]]; then
    gh issue comment "$number" --body-file "$body"
else
    gh issue create --title "$title" --body-file "$body"
fi
