#!/usr/bin/env bash
# What an app notices of a node that is gone for good, with the broker on it and its volume: the latency of each of its records meanwhile, the longest among
# them; and how long it takes until all replicas are there again, on the nodes that are left.
#
# The plug of a machine of e2e/cluster is pulled, its disk emptied, and its Node object deleted. The machine is made anew at the end.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/lost_node.sh [RECORDS A SECOND]     2,000 if not given
set -euo pipefail
rate=${1:-2000}
namespace=lost-node-$$

# shellcheck source=e2e/bench/pods.bash
source "$(dirname "$0")/pods.bash"

# whole: all replicas of the topic are in sync.
whole() {
  [[ $(k get topic.millrace.dev/events -o jsonpath='{.status.partitionsUnderReplicated}/{.status.partitionsOffline}') == 0/0 ]]
}

make_cluster 1Gi events 6
start_app "$rate" 170s
sleep 10
app=$(k get pod app -o jsonpath='{.spec.nodeName}')
# Not the app's own, and not the first, which others need.
victim=$(k get pods -l app.kubernetes.io/component=broker -o jsonpath='{range .items[*]}{.spec.nodeName}{"\n"}{end}' | grep -vx -e "$app" -e node-1 | head -n 1)
e2e/cluster/run node wipe "${victim#node-}" >/dev/null
kubectl delete node "$victim" >/dev/null
begun=$SECONDS
# First it is seen.
while whole; do sleep 0.2; done
until whole; do
  ((SECONDS - begun < 150)) || {
    echo "not whole again after 150 s:" >&2
    k get cluster.millrace.dev/main topic.millrace.dev/events -o yaml >&2
    exit 1
  }
  sleep 0.2
done
echo "a node gone with its broker's volume: all replicas there again after $((SECONDS - begun)) s"
finish_app
e2e/cluster/run node start "${victim#node-}" >/dev/null
