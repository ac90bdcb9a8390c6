#!/usr/bin/env bash
# What three brokers ask of the API server at rest, with 10 and with 10,000 partitions: it must not depend on their number. Also how long so
# many partitions take to get leaders, and what they cost in memory.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/api_requests.sh [SECONDS]     for how long to count; 60 if not given
set -euo pipefail
seconds=${1:-60}
namespace=api-requests-$$
ids=(0 1 2)

k() { kubectl -n "$namespace" "$@"; }

finish() { kubectl delete namespace "$namespace" --wait=false >/dev/null; }

metrics() { # ID
  kubectl get --raw "/api/v1/namespaces/$namespace/pods/main-broker-$1:7071/proxy/metrics"
}

requests() {
  for id in "${ids[@]}"; do metrics "$id"; done |
    awk '/^millrace_api_requests_total/ {split($1, part, "\""); count[part[2] " " part[4]] += $2}
         END {for (kind in count) print kind, count[kind]}' | sort
}

memory() { # the resident memory of the brokers' processes, if they run on this machine
  for pid in $(pgrep -x millrace-broker || true); do
    tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "MILLRACE_NAMESPACE=$namespace" || continue
    awk '/^VmRSS/ {printf "%d MiB ", $2 / 1024}' "/proc/$pid/status"
  done
}

count() { # WHAT
  requests >"$folder/before"
  sleep "$seconds"
  requests >"$folder/after"
  printf '%s, in %s s: ' "$1" "$seconds"
  join -j 1 <(sed 's/ /_/' "$folder/before") <(sed 's/ /_/' "$folder/after") |
    awk '$3 > $2 {printf "%s %d; ", $1, $3 - $2; sum += $3 - $2} END {printf "%d in all\n", sum}'
  printf '  memory: %s\n' "$(memory)"
}

topic() { # NAME PARTITIONS
  printf 'apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: %s}\nspec: {partitions: %d, replicationFactor: 1}\n' "$1" "$2" |
    k apply -f - >/dev/null
  k wait --for=condition=Ready --timeout=5m "topic/$1" >/dev/null
}

folder=$(mktemp -d)
kubectl create namespace "$namespace" >/dev/null
trap 'rm -rf "$folder"; finish' EXIT
k apply -f - >/dev/null <<END
apiVersion: millrace.dev/v1alpha1
kind: Cluster
metadata: {name: main}
spec: {replicas: 3, storage: {size: 1Gi}}
END
k wait --for=condition=Ready --timeout=2m cluster.millrace.dev/main >/dev/null
topic few 10
count "10 partitions"
begun=$(date +%s%N)
topic many 9990
printf '9,990 more partitions, applied until all have leaders: %d ms\n' $((($(date +%s%N) - begun) / 1000000))
sleep 10
count "10,000 partitions"
