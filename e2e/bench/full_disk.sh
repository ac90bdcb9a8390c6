#!/usr/bin/env bash
# What an app notices of volumes that get full, and of retention that is then shrunk to free half of them: how long brokers refuse its records, all of which
# must be acknowledged in the end.
#
# Volumes of e2e/cluster are folders of one disk. Brokers are told to keep all of it free but for ROOM, so they are full once they have written that.
#
# Needs KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.
#
# Usage: e2e/bench/full_disk.sh [ROOM IN MiB]     600 if not given; the disk may have 1 TiB free, no more
set -euo pipefail
room=${1:-600}
partitions=6
namespace=full-disk-$$

# shellcheck source=e2e/bench/pods.bash
source "$(dirname "$0")/pods.bash"

# until_full N: waits until the volumes of so many brokers are full.
until_full() {
  local begun=$SECONDS found
  while true; do
    found=$(k get cluster.millrace.dev/main -o jsonpath='{range .status.brokers[?(@.volume.full==true)]}x{end}')
    ((${#found} != $1)) || return 0
    ((SECONDS - begun < 120)) || {
      echo "not $1 full volumes within 120 s:" >&2
      k get cluster.millrace.dev/main -o yaml >&2
      exit 1
    }
    sleep 0.2
  done
}

make_cluster 1Gi events "$partitions"
metrics=/api/v1/namespaces/$namespace/pods/main-broker-0:7071/proxy/metrics
free=$(kubectl get --raw "$metrics" | sed -n 's/^millrace_disk_free_bytes \([0-9]*\).*/\1/p')
reserve=$((free - room * 1024 * 1024))
k patch cluster.millrace.dev/main --type merge -p '{"spec":{"config":{"minFreeDisk":'"$reserve"',"retentionInterval":"5s"}}}' >/dev/null
restart_brokers
start_app 20000 60s
begun=$SECONDS
until_full 3
echo "full after $((SECONDS - begun)) s"
# Half of what each of the three replicas has.
half=$((room * 1024 * 1024 / 3 / 2 / partitions))
k patch topic.millrace.dev/events --type merge -p '{"spec":{"retention":{"bytes":'"$half"'}}}' >/dev/null
begun=$SECONDS
until_full 0
echo "retention shrunk to half of it: room again after $((SECONDS - begun)) s"
finish_app
