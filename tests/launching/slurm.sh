#!/usr/bin/env bash
# A Slurm of one machine in a folder of its own, for the tests (and to try the launcher).
#
#   tests/launching/slurm.sh start FOLDER     # prints the file to export as SLURM_CONF
#   tests/launching/slurm.sh stop FOLDER
#
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge. One node shown as having 4 CPUs
# and 4 GPUs (files), so that several jobs can run on any machine, and arrays of five at most; jobs may be preempted from partition "low" by "high".
set -euo pipefail
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)

stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$folder/$name.pid" ]; then
      kill -9 "$(cat "$folder/$name.pid")" 2>/dev/null || true
      rm -f "$folder/$name.pid"
    fi
  done
}

start() {
  mkdir -p "$folder"/{state,spool,munge}
  chmod 700 "$folder/munge"
  dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge/key"
  read -r controller daemon < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
  local host
  host=$(hostname -s)
  cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller
SlurmdPort=$daemon
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MaxArraySize=5
GresTypes=gpu
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:4 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=$host Default=NO MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
  touch "$folder"/gpu{0,1,2,3}
  echo "NodeName=$host Name=gpu File=$folder/gpu[0-3]" > "$folder/gres.conf"
  munged --key-file "$folder/munge/key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munge/seed" --force
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  for _ in $(seq 300); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -qx idle; then
      echo "$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  echo "error: Slurm did not come up; see $folder/*.log" >&2
  stop
  return 1
}

"$action"
