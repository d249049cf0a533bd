#!/usr/bin/env bash
# One call of the plan in README.md: `bash benchmarks/gpu/call.sh 2`, on the GPU machine, in the
# repository's folder. KIT has the parts that came along, PLACE is kept between calls, OUT comes back.
set -uo pipefail
cd "$(dirname "$0")/../.."
kit=${KIT:-out/kit} place=${PLACE:-/tmp/gpu} out=${OUT:-out} python=${PYTHON:-python3}
mkdir -p "$place/kit" "$out"

keep_parts() { cp "$kit"/* "$place/kit/"; }

measure() { # measure BUDGET_S STAGES
  . "$place/site/env.sh"
  "$python" benchmarks/gpu/run.py --out "$place/out" --budget-s "$1" --stages "$2" \
    --bundle "$out/results.tar.gz" ${RUN_FLAGS:-}
}

case ${1:-} in
1) # a part of the kit travels; what the machine has by itself
  keep_parts
  nvidia-smi || true
  "$python" benchmarks/gpu/check.py --bare 2>&1 | tee "$out/check-bare.log" || true
  ;;
2) # the rest of it; does it start, answer, and leave texts as they are?
  keep_parts
  "$python" benchmarks/gpu/unpack.py "$place/kit" "$place/site" 2>&1 | tee "$out/check.log"
  measure 300 environment,answers,same-output
  ;;
3) # one engine: stops, step times, copies
  measure 220 response,overhead,steps,belief,copies
  ;;
4) # the arms, as far as time goes
  measure "${SECONDS_LEFT:-350}" conserve,stock,gentle
  ;;
*)
  echo "call.sh: 1, 2, 3 or 4" >&2
  exit 2
  ;;
esac
