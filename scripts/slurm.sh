#!/usr/bin/env bash
# slurm.sh start|stop: a Slurm of one node on this machine, for the tests of the cluster. As root, on Debian.
# It replaces /etc/slurm/slurm.conf, so it refuses to run where another one is configured.
set -euo pipefail
state=/var/tmp/calib-prune-slurm mark="# written by calib-prune's scripts/slurm.sh" conf=/etc/slurm/slurm.conf host=$(hostname -s)

stop() {
    for name in slurmd slurmctld; do pkill -x "$name" 2>/dev/null || true; done
    for _ in $(seq 50); do pgrep -x -r R,S,D 'slurmd|slurmctld' >/dev/null || break; sleep 0.1; done
}

[ "$(id -u)" = 0 ] || { echo "Slurm's daemons start as root: run this as root, best in a container." >&2; exit 1; }
if ! grep -qsF "$mark" "$conf"; then  # the first call: is another Slurm here?
    for file in "$conf" /etc/slurm/cgroup.conf; do
        if [ -e "$file" ]; then echo "$file is there and not of this script: nothing was changed." >&2; exit 1; fi
    done
    if pgrep -x 'slurmd|slurmctld' >/dev/null; then echo "Another Slurm runs on this machine: nothing was changed." >&2; exit 1; fi
fi
if [ "${1:-}" = stop ]; then stop; exit; fi
[ "${1:-}" = start ] || { echo "slurm.sh start|stop" >&2; exit 2; }

if ! command -v slurmctld slurmd squeue munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi
stop
rm -rf "$state"
mkdir -p "$state/ctld" "$state/d" /etc/slurm
echo CgroupPlugin=disabled >/etc/slurm/cgroup.conf
cores=${SLURM_TEST_CORES:-4}  # more than there are: jobs of the test are small
cat >"$conf" <<EOF
$mark
ClusterName=onenode
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/ctld.pid
SlurmdPidFile=$state/d.pid
SlurmctldLogFile=$state/ctld.log
SlurmdLogFile=$state/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
SlurmdTimeout=20
MinJobAge=3600
DefMemPerCPU=500
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=${SLURM_TEST_MB:-8000} State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=60 State=UP
EOF
install -d -m 0755 -o munge -g munge /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged
slurmctld
slurmd
for _ in $(seq 100); do [ "$(timeout 5 sinfo -h -o %T 2>/dev/null)" = idle ] && exit; sleep 0.2; done
echo "The node did not become idle; logs are in $state." >&2
exit 1
