#!/usr/bin/env bash
# What an app notices of a rolling restart of all brokers: the latency of each of its records meanwhile, the longest among them.
#
# A producer in a pod of its own (acks=all, idempotent, three replicas of which two must be in sync) goes on while the operator restarts
# three brokers, one after another, for a change of their pods. It fails if a record does.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/rolling.sh [RECORDS A SECOND [IMAGE]]     2,000 if not given; to another image of brokers, such as that of another release, and back
set -euo pipefail
rate=${1:-2000}
duration=90
[[ ! ${2-} ]] || duration=180
namespace=rolling-$$

# shellcheck source=e2e/bench/pods.bash
source "$(dirname "$0")/pods.bash"

make_cluster 1Gi events 6
# Longer than the restarts take.
start_app "$rate" "${duration}s"
sleep 10
own=$(k get pod main-broker-0 -o jsonpath='{.spec.containers[0].image}')
begun=$SECONDS
restart_brokers "${2-}"
echo "three brokers restarted one after another in $((SECONDS - begun)) s"
if [[ ${2-} ]]; then
  begun=$SECONDS
  restart_brokers "$own"
  echo "and back in $((SECONDS - begun)) s"
fi
finish_app
