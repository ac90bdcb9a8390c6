#!/usr/bin/env bash
# Consumers that come, go and are killed while 100,000 records/s flow (`millrace-bench rebalance`), with brokers that are pods of the Kubernetes of
# this machine (e2e/cluster) and are restarted one after another meanwhile, after one consumer was cut off from them all. The benchmark, its producer and
# its other consumers run in the network of node 1.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), an installed operator whose images the nodes have, and target/release/millrace-bench.
#
# Usage: e2e/bench/rebalance.sh [OPTIONS of millrace-bench rebalance]
set -euo pipefail
cd "$(dirname "$0")/../.."
namespace=rebalance-$$

# shellcheck source=e2e/bench/pods.bash
source e2e/bench/pods.bash

bootstrap() { echo "main-bootstrap.$namespace.svc:7070"; }

# millrace NODE ARGS...: in the network of that node.
millrace() {
  e2e/cluster/run in "$1" "$PWD/target/release/millrace" -b "$(bootstrap)" "${@:2}"
}

# until_holds TEST: waits until the number of partitions that the consumer on node 2 has passes it.
until_holds() {
  local begun=$SECONDS
  until (($(millrace 1 groups describe rebalanced -o json | grep -c '"millrace-cli"') $1)); do
    ((SECONDS - begun < 60)) || {
      echo "the consumer on node 2 does not have $1 partitions after 60 s:" >&2
      millrace 1 groups describe rebalanced >&2
      exit 1
    }
    sleep 0.2
  done
}

# A consumer on node 2 whose way to all brokers is cut until others have what it had, and mended: it comes back, and leaves. Prints what it has read.
cut_consumer() {
  local reads begun cut='inet millrace-bench'
  reads=$(mktemp)
  millrace 2 consume rebalanced --group rebalanced --format '%p %o\n' >"$reads" &
  until_holds '> 0'
  # What pods of that node send is forwarded, and passes neither of the two.
  e2e/cluster/run in 2 nft "add table $cut
    add chain $cut out { type filter hook output priority 0; }
    add rule $cut out tcp dport 7070 drop
    add chain $cut in { type filter hook input priority 0; }
    add rule $cut in tcp sport 7070 drop"
  begun=$(date +%s%N)
  until_holds '== 0'
  echo "cut off: others had its partitions after $((($(date +%s%N) - begun) / 1000000)) ms" >&2
  e2e/cluster/run in 2 nft "delete table $cut"
  begun=$(date +%s%N)
  until_holds '> 0'
  echo "mended: it had partitions again after $((($(date +%s%N) - begun) / 1000000)) ms" >&2
  pkill -INT -f '^[^ ]*/millrace -b [^ ]* consume rebalanced'
  wait
  cat "$reads"
  rm "$reads"
}

# As the benchmark calls it at a cycle's peak.
if [[ ${1-} == --meanwhile ]]; then
  namespace=$2
  [[ ${3-} == --exactly-once ]] || cut_consumer
  restart_brokers
  k wait --for=condition=Ready --timeout=1m topic.millrace.dev/rebalanced >/dev/null
  exit
fi

make_cluster 8Gi rebalanced 30
make_topic rebalanced-copy 30
mode=
[[ " $* " != *" --exactly-once "* ]] || mode=--exactly-once
e2e/cluster/run in 1 "$PWD/target/release/millrace-bench" --rounds 1 rebalance --bootstrap "$(bootstrap)" \
  --meanwhile "$PWD/e2e/bench/rebalance.sh --meanwhile $namespace $mode" "$@"
