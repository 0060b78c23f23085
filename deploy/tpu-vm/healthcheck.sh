#!/usr/bin/env bash
# Say whether the server takes jobs: exit 0 when the model is loaded and compiled, 1 otherwise (draining too).
#
#   healthcheck.sh [--wait SECONDS] [URL]
#
# With --wait it asks again for so long. The first start compiles, which takes minutes for a large model; later ones find
# their programs on disk.
set -euo pipefail

wait=0
if [[ ${1:-} == --wait ]]; then
    wait=${2:?"--wait needs seconds"}
    shift 2
fi
url=${1:-http://127.0.0.1:8600}
deadline=$((SECONDS + wait))

until answer=$(curl --silent --show-error --fail-with-body --max-time 5 "$url/ready" 2>&1); do
    if ((SECONDS >= deadline)); then
        echo "healthcheck.sh: $url is not ready: $answer" >&2
        exit 1
    fi
    sleep 1
done
echo "$answer"
