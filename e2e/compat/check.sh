#!/usr/bin/env bash
# Checks Millrace's record batches against Apache Kafka's own Java client, both ways: each reads what the other wrote and
# compares every field. Needs cargo, mvn and java 17 or later. With --update-golden, the batches that Kafka's client wrote
# become the golden files of the record crate's tests.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
work=${CARGO_TARGET_DIR:-$repo/target}/compat
golden=$repo/broker/record/tests/golden

case ${1:-} in
  '' | --update-golden) ;;
  *) echo "usage: check.sh [--update-golden]" >&2; exit 2 ;;
esac
for tool in cargo mvn java; do
  command -v "$tool" >/dev/null || { echo "check.sh: $tool is missing; install it and run again" >&2; exit 2; }
done

mkdir -p "$work"
if ! cmp -s "$here/pom.xml" "$work/fetched.xml"; then
  rm -rf "$work/jars"
  mvn --quiet --batch-mode -f "$here/pom.xml" org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
    -DoutputDirectory="$work/jars"
  cp "$here/pom.xml" "$work/fetched.xml"
fi
kafka() { java -cp "$work/jars/*" "$here/RecordBatches.java" "$@"; }

rm -rf "$work/from-kafka" "$work/from-millrace"

echo "== Kafka's client reads what Millrace writes"
(cd "$repo" && cargo run --quiet -p millrace-record --example write_batches -- "$work/from-millrace")
kafka read "$work/from-millrace"

echo "== Millrace reads what Kafka's client writes"
kafka write "$work/from-kafka"
if [[ ${1:-} == --update-golden ]]; then
  rm -rf "$golden"
  cp -r "$work/from-kafka" "$golden"
elif ! cmp -s "$golden/manifest.txt" "$work/from-kafka/manifest.txt"; then
  echo "check.sh: the golden files are not what RecordBatches.java writes now; run check.sh --update-golden" >&2
  exit 1
fi
# The batches of this run, not the kept ones: a codec's library may have changed its output.
(cd "$repo" && KAFKA_BATCHES="$work/from-kafka" cargo test --quiet -p millrace-record --test kafka_golden)

echo "OK: record batches agree with kafka-clients, both ways, all codecs"
