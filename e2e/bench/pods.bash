# What the benchmarks on pods share; for `source`. They set `namespace`, in which all is made.
#
# They need KUBECONFIG and kubectl (`eval "$(e2e/cluster/run env)"`), and an installed operator whose images the nodes have.

k() { kubectl -n "$namespace" "$@"; }

# make_cluster SIZE TOPIC PARTITIONS: a Cluster `main` of three brokers with volumes of that size, and a topic in it. They go with the script.
make_cluster() {
  trap 'kubectl delete namespace "$namespace" --wait=false >/dev/null' EXIT
  kubectl create namespace "$namespace" >/dev/null
  k apply -f - >/dev/null <<END_OF_CLUSTER
apiVersion: millrace.dev/v1alpha1
kind: Cluster
metadata: {name: main}
spec: {replicas: 3, storage: {size: $1}}
END_OF_CLUSTER
  make_topic "$2" "$3"
  k wait --for=condition=Ready --timeout=2m cluster.millrace.dev/main >/dev/null
}

# make_topic TOPIC PARTITIONS: three replicas, of which two must be in sync.
make_topic() {
  k apply -f - >/dev/null <<END_OF_TOPIC
apiVersion: millrace.dev/v1alpha1
kind: Topic
metadata: {name: $1}
spec: {partitions: $2, replicationFactor: 3, minInSyncReplicas: 2}
END_OF_TOPIC
  k wait --for=condition=Ready --timeout=2m "topic.millrace.dev/$1" >/dev/null
}

# restart_brokers [IMAGE]: restarts the brokers, one after another, with that image if one is given, and returns when they are.
restart_brokers() {
  local mark begun=$SECONDS image=${1:+\"image\":\"$1\",}
  mark=$(date +%s%N)
  k patch cluster.millrace.dev/main --type merge -p '{"spec":{'"$image"'"template":{"metadata":{"annotations":{"restarted":"'"$mark"'"}}}}}' >/dev/null
  until [[ $(k get pods -o jsonpath='{range .items[?(@.metadata.annotations.restarted=="'"$mark"'")]}x{end}') == xxx ]]; do
    ((SECONDS - begun < 100)) || {
      echo "the brokers were not all restarted in 100 s:" >&2
      k get cluster.millrace.dev/main pods -o wide >&2
      exit 1
    }
    sleep 0.2
  done
  k wait --for=condition=Ready --timeout=1m cluster.millrace.dev/main >/dev/null
}

# start_app RECORDS_A_SECOND DURATION: a producer of records of 1 KB to `events`, in a pod of its own, that has begun when this returns.
start_app() {
  local image
  image=$(k get pod main-broker-0 -o jsonpath='{.spec.containers[0].image}')
  k run app --image "$image" --restart Never --command -- \
    millrace --bootstrap main-bootstrap:7070 bench produce events --rate "$1" --duration "$2" --record-size 1KB >/dev/null
  k wait --for=condition=Ready --timeout=1m pod/app >/dev/null
}

# Waits until the app has done its time, and prints what it says. It must not have failed.
finish_app() {
  k wait --for=jsonpath='{.status.phase}'=Succeeded --timeout=3m pod/app >/dev/null || {
    k logs app >&2
    exit 1
  }
  k logs app
}
