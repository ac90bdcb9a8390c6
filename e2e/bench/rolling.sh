#!/usr/bin/env bash
# What an app notices of a rolling restart of all brokers: the latency of each of its records meanwhile, the longest among them.
#
# A producer in a pod of its own (acks=all, idempotent, three replicas of which two must be in sync) goes on while the operator restarts
# three brokers, one after another, for a change of their pods. It fails if a record does.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/rolling.sh [RECORDS A SECOND]     2,000 if not given
set -euo pipefail
rate=${1:-2000}
namespace=rolling-$$

k() { kubectl -n "$namespace" "$@"; }
trap 'kubectl delete namespace "$namespace" --wait=false >/dev/null' EXIT

kubectl create namespace "$namespace" >/dev/null
k apply -f - >/dev/null <<END_OF_CLUSTER
apiVersion: millrace.dev/v1alpha1
kind: Cluster
metadata: {name: main}
spec: {replicas: 3, storage: {size: 1Gi}}
---
apiVersion: millrace.dev/v1alpha1
kind: Topic
metadata: {name: events}
spec: {partitions: 6, replicationFactor: 3, minInSyncReplicas: 2}
END_OF_CLUSTER
k wait --for=condition=Ready --timeout=2m cluster.millrace.dev/main topic.millrace.dev/events >/dev/null
image=$(k get pod main-broker-0 -o jsonpath='{.spec.containers[0].image}')
# Longer than the restarts take; it is ended when they are done.
k run app --image "$image" --restart Never --command -- \
  millrace --bootstrap main-bootstrap:7070 bench produce events --rate "$rate" --duration 120s --record-size 1KB >/dev/null
k wait --for=condition=Ready --timeout=1m pod/app >/dev/null
sleep 10
begun=$SECONDS
k patch cluster.millrace.dev/main --type merge -p '{"spec":{"template":{"metadata":{"annotations":{"restarted":"once"}}}}}' >/dev/null
for id in 2 1 0; do
  until [[ $(k get pods -o jsonpath='{range .items[?(@.metadata.annotations.restarted=="once")]}{.metadata.name} {end}') == *main-broker-$id* ]]; do
    ((SECONDS - begun < 100)) || {
      echo "rolling.sh: main-broker-$id was not restarted in 100 s:" >&2
      k get cluster.millrace.dev/main pods -o wide >&2
      exit 1
    }
    sleep 0.2
  done
done
k wait --for=condition=Ready --timeout=1m cluster.millrace.dev/main >/dev/null
echo "three brokers restarted one after another in $((SECONDS - begun)) s"
k wait --for=jsonpath='{.status.phase}'=Succeeded --timeout=3m pod/app >/dev/null || {
  k logs app >&2
  exit 1
}
k logs app
