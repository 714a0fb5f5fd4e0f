#!/usr/bin/env bash
# A real Slurm that spreads jobs over its nodes (slurmctld, several slurmd as "nodes", munge) on one Debian 12 host, as root, without systemd, on loopback only.
#   slurm_lab.sh install             apt packages (once)
#   slurm_lab.sh start DIR           munged, slurmctld and slurmd n1..n$NODES (4); DIR must lie below directories of root
#   slurm_lab.sh stop DIR            ends exactly the processes that `start` began
#   slurm_lab.sh slurmd DIR NODE     starts the slurmd of one node again
#   eval "$(slurm_lab.sh env DIR)"   SLURM_CONF for sinfo, sbatch, squeue, scancel, scontrol
set -euo pipefail
verb=${1:?install, start, stop, slurmd or env} nodes=${NODES:-4}
if [ "$verb" = install ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm slurm-client munge
    exit
fi
dir=$(realpath -m "${2:?the directory of the lab}")
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
case $verb in
env) echo "export SLURM_CONF=$dir/slurm.conf" ;;
slurmd) slurmd -N "$3" ;;
stop)
    for name in $(ls "$dir"/run 2>/dev/null | grep -E '\.pid$' | sort -r); do    # slurmd, slurmctld, munged
        pid=$(cat "$dir/run/$name")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        rm -f "$dir/run/$name"
    done
    ;;
start)
    getent hosts "$host" > /dev/null || { echo "$host must resolve: echo '127.0.0.1 $host' >> /etc/hosts" >&2; exit 2; }
    install -d -m 755 "$dir" "$dir/run" "$dir/log" "$dir/state" "$dir/munge"
    umask 022
    if [ ! -s "$dir/munge/munge.key" ]; then (umask 077; head -c 1024 /dev/urandom > "$dir/munge/munge.key"); fi
    munged --key-file="$dir/munge/munge.key" --socket="$dir/munge/socket" --pid-file="$dir/run/a-munged.pid" \
           --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2
    munge -n -S "$dir/munge/socket" | unmunge -S "$dir/munge/socket" > /dev/null
    memory=$(awk '/MemTotal/ {print int($2 / 1024 / '"$nodes"')}' /proc/meminfo)
    # cred_expire: a requeued job begins again only when the credential of its last start has expired.
    cat > "$dir/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=26817
SlurmctldPidFile=$dir/run/b-slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/run/c-slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core,CR_LLN
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,sched_min_interval=100000
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=30
MinJobAge=30
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
MailProg=/bin/true
CONF
    for i in $(seq "$nodes"); do    # a name, a port and a spool directory each; their processors are pretended
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((26817 + i)) CPUs=4 RealMemory=$memory" >> "$dir/slurm.conf"
        install -d -m 755 "$dir/spool-n$i"
    done
    echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >> "$dir/slurm.conf"
    # Slurm 22.05 wants a cgroup plugin even where nothing uses cgroups.
    if [ -f /sys/fs/cgroup/cgroup.controllers ]; then plugin=cgroup/v2; else plugin=cgroup/v1; fi
    echo "CgroupPlugin=$plugin" > "$dir/cgroup.conf"
    slurmctld
    for i in $(seq "$nodes"); do slurmd -N "n$i"; done
    for _ in $(seq 100); do
        [ "$(sinfo -h -o '%t %D' 2>/dev/null)" = "idle $nodes" ] && break
        sleep 0.2
    done
    sinfo
    ;;
*) echo "unknown: $verb" >&2; exit 2 ;;
esac
