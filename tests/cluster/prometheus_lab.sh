#!/usr/bin/env bash
# A real Prometheus on the loopback interface, without systemd: for tests, and to try rules and dashboards.
#   prometheus_lab.sh install      Debian's package, as root
#   prometheus_lab.sh start DIR    runs it with DIR/prometheus.yml (of `areal-like deploy-files`) and prints its address
#   prometheus_lab.sh check DIR    DIR's configuration, and its rules with their tests
#   prometheus_lab.sh stop DIR
# PROM_PORT=19090 is its port. Its data and its log are in DIR/lab.
set -euo pipefail
verb=${1:?install, start, check or stop}
port=${PROM_PORT:-19090}
[[ $verb == install ]] || dir=$(realpath "${2:?the directory of prometheus.yml}")
case $verb in
install)
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus
    ;;
check)
    cd "$dir"
    promtool check config prometheus.yml
    promtool test rules rules_test.yml
    ;;
start)
    mkdir -p "$dir/lab"
    setsid prometheus --config.file="$dir/prometheus.yml" --storage.tsdb.path="$dir/lab/data" --storage.tsdb.retention.time=2h \
        --web.listen-address="127.0.0.1:$port" --log.level=warn </dev/null >"$dir/lab/prometheus.log" 2>&1 &
    echo $! >"$dir/lab/pid"
    for _ in $(seq 150); do
        curl -fs "http://127.0.0.1:$port/-/ready" >/dev/null && break
        kill -0 "$(cat "$dir/lab/pid")" 2>/dev/null || break
        sleep 0.2
    done
    # The process that answers must be this one: another one may have the port.
    curl -fs "http://127.0.0.1:$port/-/ready" >/dev/null && kill -0 "$(cat "$dir/lab/pid")" || {
        echo "Prometheus has not started on port $port: $(tail -n 1 "$dir/lab/prometheus.log")" >&2
        exit 1
    }
    echo "http://127.0.0.1:$port"
    ;;
stop)
    [[ -e $dir/lab/pid ]] || exit 0
    pid=$(cat "$dir/lab/pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    rm -f "$dir/lab/pid"
    ;;
*)
    echo "unknown verb $verb: use install, start, check or stop" >&2
    exit 2
    ;;
esac
