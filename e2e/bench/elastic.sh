#!/usr/bin/env bash
# What an app notices while brokers and partitions come and go: the latency of each of its records meanwhile, the longest among them.
#
# A producer in a pod of its own (acks=all, idempotent, three replicas of which two must be in sync) goes on while a Cluster grows from three to five
# brokers and its partitions are spread over them, a topic grows from 4 to 64 partitions, and the last two brokers go again. It fails if a record does.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/elastic.sh [RECORDS A SECOND]     2,000 if not given
set -euo pipefail
rate=${1:-2000}
namespace=elastic-$$

# shellcheck source=e2e/bench/pods.bash
source "$(dirname "$0")/pods.bash"

# settled BROKERS WHAT: waits until there are so many brokers and no partition has moved for 3 s.
settled() {
  local begun=$SECONDS quiet=0 found
  while ((quiet < 15)); do
    ((SECONDS - begun < 120)) || {
      echo "$2: not within 120 s:" >&2
      k get cluster.millrace.dev/main -o yaml >&2
      exit 1
    }
    found=$(k get cluster.millrace.dev/main -o jsonpath='{.status.replicas} {.status.readyReplicas} {.status.rebalance.state}')
    if [[ $found == "$1 $1 " ]]; then quiet=$((quiet + 1)); else quiet=0; fi
    sleep 0.2
  done
  echo "$2: $((SECONDS - begun - 3)) s"
}

make_cluster 2Gi events 4
start_app "$rate" 90s
sleep 5
k scale cluster.millrace.dev/main --replicas 5 >/dev/null
settled 5 "from three to five brokers, and partitions spread over them"
k patch topic.millrace.dev/events --type merge -p '{"spec":{"partitions":64}}' >/dev/null
k wait --for=jsonpath='{.status.partitions}'=64 --timeout=1m topic.millrace.dev/events >/dev/null
settled 5 "from 4 to 64 partitions"
k scale cluster.millrace.dev/main --replicas 3 >/dev/null
settled 3 "back to three brokers"
finish_app
