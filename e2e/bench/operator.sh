#!/bin/sh
# What the operator costs with many topics: the time until all have their Leases, its requests to the API server by verb, and its memory.
# No brokers run: Leases are made and nobody leads them.
#
#   e2e/bench/operator.sh [TOPICS] [PARTITIONS]
#
# It needs a Kubernetes (KUBECONFIG) with manifests/crds applied, kubectl, curl, and no operator that runs there already. OPERATOR is its program.
set -eu
topics=${1:-1000}
partitions=${2:-10}
operator=${OPERATOR:-target/release/millrace-operator}
listen=127.0.0.1:18089
namespace=millrace-bench-$$
work=$(mktemp -d)
pid=

finish() {
    [ -z "$pid" ] || kill "$pid" 2>/dev/null || true
    kubectl delete namespace "$namespace" --wait=false >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT

start() {
    "$operator" --broker-image none.invalid/broker --listen $listen --namespace "$namespace" >>"$work/log" 2>&1 &
    pid=$!
    until curl -sf http://$listen/readyz | grep -qx ready; do
        kill -0 "$pid" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.1
    done
}
metrics() { curl -sf http://$listen/metrics; }
requests() { metrics | sed -n 's/^millrace_operator_api_requests_total{verb="\(.*\)",resource="\(.*\)"} /\1 \2 /p' | sort; }
# The requests since those in a file. The Lease by which the operator is elected is among them: a get and an update every two seconds.
since() {
    requests | awk -v before="$1" 'BEGIN { while ((getline line < before) > 0) { split(line, f, " "); had[f[1] " " f[2]] = f[3] } }
        { n = $3 - had[$1 " " $2]; if (n > 0) printf "| %s %s | %d |\n", $1, $2, n }'
}
memory() { awk '/^VmRSS|^VmHWM/ { printf "%s %.0f MiB  ", $1, $2 / 1024 }' "/proc/$pid/status"; }
cpu() { awk -v hz="$(getconf CLK_TCK)" '{ printf "%.1f", ($14 + $15) / hz }' "/proc/$pid/stat"; }
seconds() { date +%s.%N; }
took() { awk -v from="$1" -v to="$(seconds)" 'BEGIN { printf "%.1f", to - from }'; }
created() { requests | awk '$1 == "create" && $2 == "leases" { print $3 }'; }
reported() { metrics | awk '/^millrace_operator_conditions{kind="Topic",condition="Ready"/ && !/Pending|Creating/ { n += $NF } END { print n + 0 }'; }

kubectl create namespace "$namespace" >/dev/null
start
echo "| | |"
echo "|---|---|"
echo "| memory with nothing to do | $(memory) |"
kubectl apply -f - >/dev/null <<CLUSTER
{"apiVersion": "millrace.dev/v1alpha1", "kind": "Cluster", "metadata": {"name": "main", "namespace": "$namespace"},
 "spec": {"replicas": 3, "storage": {"size": "1Gi"}, "template": {"spec": {"nodeSelector": {"none": "such"}}}}}
CLUSTER
sleep 2
i=0
while [ "$i" -lt "$topics" ]; do
    echo "{\"apiVersion\": \"millrace.dev/v1alpha1\", \"kind\": \"Topic\", \"metadata\": {\"name\": \"t$i\", \"namespace\": \"$namespace\"}, \"spec\": {\"partitions\": $partitions}}"
    i=$((i + 1))
done >"$work/topics.json"

# The operator stands still while the Topics are made, so that the time is its own.
kill -STOP "$pid"
kubectl create -f "$work/topics.json" >/dev/null
kill -CONT "$pid"
requests >"$work/before"
begun=$(seconds)
busy=$(cpu)
want=$((topics * partitions))
# One is the election's.
until [ "$(created)" -gt "$want" ]; do sleep 0.2; done
echo "| $topics topics of $partitions partitions: all Leases are made, s | $(took "$begun") |"
until [ "$(reported)" -ge "$topics" ]; do sleep 0.2; done
echo "| all statuses are written, s | $(took "$begun") |"
sleep 10
echo "| CPU for that, s | $(awk -v from="$busy" -v to="$(cpu)" 'BEGIN { print to - from }') |"
echo "| memory | $(memory) |"
echo "| **requests for that, by verb** | |"
since "$work/before"
metrics | awk '/^millrace_operator_reconcile_duration_seconds_(sum|count){kind="Topic"}/ { split($1, n, /[{_]/); v[$1 ~ /sum/ ? "sum" : "count"] = $2 }
    END { printf "| reconciles of Topics; mean, ms | %d; %.0f |\n", v["count"], 1000 * v["sum"] / v["count"] }'

sleep 20
requests >"$work/before"
busy=$(cpu)
sleep 30
echo "| **requests in 30 s at rest** | |"
since "$work/before"
echo "| CPU in 30 s at rest, s | $(awk -v from="$busy" -v to="$(cpu)" 'BEGIN { print to - from }') |"

kill "$pid"
wait "$pid" || true
begun=$(seconds)
start
echo "| started again: all has been read, s | $(took "$begun") |"
sleep 10
echo "| memory then | $(memory) |"
echo "| **requests of that start** | |"
: >"$work/none"
since "$work/none"
