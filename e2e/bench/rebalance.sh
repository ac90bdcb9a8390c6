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

# shellcheck source=e2e/bench/pods.bash
source e2e/bench/pods.bash

# As the benchmark calls it at a cycle's peak.
if [[ ${1-} == --restart ]]; then
  namespace=$2
  restart_brokers
  k wait --for=condition=Ready --timeout=1m topic.millrace.dev/rebalanced >/dev/null
  exit
fi

make_cluster 8Gi rebalanced 30
e2e/cluster/run in 1 "$PWD/target/release/millrace-bench" --rounds 1 rebalance --bootstrap "main-bootstrap.$namespace.svc:7070" \
  --meanwhile "$PWD/e2e/bench/rebalance.sh --restart $namespace" "$@"
