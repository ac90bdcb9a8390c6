#!/usr/bin/env bash
# Consumers that come, go and are killed while 100,000 records/s flow (`millrace-bench rebalance`), with brokers that are pods of the Kubernetes of
# this machine (e2e/cluster) and are restarted one after another meanwhile. The benchmark, its producer and its consumers run in the network of node 1.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), an installed operator whose images the nodes have, and target/release/millrace-bench.
#
# Usage: e2e/bench/rebalance.sh [OPTIONS of millrace-bench rebalance]
set -euo pipefail
cd "$(dirname "$0")/../.."
namespace=rebalance-$$

k() { kubectl -n "$namespace" "$@"; }

# Restarts all brokers, and returns when they are.
if [[ ${1-} == --restart ]]; then
  namespace=$2
  mark=$(date +%s%N)
  k patch cluster.millrace.dev/main --type merge -p '{"spec":{"template":{"metadata":{"annotations":{"restarted":"'"$mark"'"}}}}}'
  until [[ $(k get pods -o jsonpath='{range .items[?(@.metadata.annotations.restarted=="'"$mark"'")]}x{end}') == xxx ]]; do sleep 0.2; done
  k wait --for=condition=Ready --timeout=1m cluster.millrace.dev/main topic.millrace.dev/rebalanced
  exit
fi

trap 'kubectl delete namespace "$namespace" --wait=false >/dev/null' EXIT
kubectl create namespace "$namespace" >/dev/null
k apply -f - >/dev/null <<END_OF_CLUSTER
apiVersion: millrace.dev/v1alpha1
kind: Cluster
metadata: {name: main}
spec: {replicas: 3, storage: {size: 8Gi}}
---
apiVersion: millrace.dev/v1alpha1
kind: Topic
metadata: {name: rebalanced}
spec: {partitions: 30, replicationFactor: 3, minInSyncReplicas: 2}
END_OF_CLUSTER
k wait --for=condition=Ready --timeout=2m cluster.millrace.dev/main topic.millrace.dev/rebalanced >/dev/null
e2e/cluster/run in 1 "$PWD/target/release/millrace-bench" --rounds 1 rebalance --bootstrap "main-bootstrap.$namespace.svc:7070" \
  --meanwhile "$PWD/e2e/bench/rebalance.sh --restart $namespace" "$@"
