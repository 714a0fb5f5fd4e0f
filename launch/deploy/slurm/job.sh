# One job of a run on its node. `areal-like submit --slurm` writes this file into <run>/slurm/<role>.sh, after the
# #SBATCH lines and the variables ROLE, RUN, PYTHON, WORKDIR, MAX_FAILURES and EARLY_S.
#
#   exit code of the daemon    the job
#   0   the run is finished    ends; the buffer's job drains the score servers and routers, which do not know it
#   75  drained                ends; is requeued if the time limit was the reason (USR2, see --signal)
#   2   a wrong setting        ends, and the run with it
#   else a failure             is requeued; after MAX_FAILURES failures in a row it ends, and the run with it
#
# On one node the daemon is not started by srun: srun ends a step at the first SIGTERM, and the daemon would not drain.
set -u
cd "$WORKDIR" || exit 2
restarts=${SLURM_RESTART_COUNT:-0}
reason=""
failures_file=$RUN/slurm/failures-$SLURM_JOB_ID

say() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $ROLE, job $SLURM_JOB_ID, start $((restarts + 1)): $*"; }

forward() {    # SIGTERM to the daemon; on several nodes to the processes of the step
    if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
        [ -z "${child:-}" ] || kill -TERM "$child" 2>/dev/null
    else
        scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null
    fi
}

# Slurm may have given the job up (a lost node, scancel) while this script still runs: then it must not touch the job's successor.
is_ours() {
    scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | grep -E " JobState=RUNNING .* Restarts=$restarts " >/dev/null
}

requeue() {
    if ! is_ours; then
        say "$1; Slurm has ended or restarted this job already"
        exit 0
    fi
    say "$1; requeued"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

give_up() {
    say "$1"
    if is_ours && [ "$ROLE" != rollout ]; then
        "$PYTHON" -m launch.slurm.node end "$RUN"
    fi
    exit "$code"
}

trap 'reason=${reason:-stop}; forward' TERM
trap 'reason=limit; forward' USR2

say "on $(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
    "$PYTHON" -m launch.slurm.node "$ROLE" "$RUN" &
else
    AREAL_LIKE_FIRST_ADDRESS=$("$PYTHON" -m launch.slurm.node address "$RUN") || exit 2
    export AREAL_LIKE_FIRST_ADDRESS
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 "$PYTHON" -m launch.slurm.node "$ROLE" "$RUN" &
fi
child=$!
[ -z "$reason" ] || forward    # a signal came before there was a child
while kill -0 "$child" 2>/dev/null; do    # a signal interrupts `wait`
    wait "$child"
done
wait "$child"
code=$?

case $code in
0)
    say "the run is finished"
    rm -f "$failures_file"
    if [ "$ROLE" = buffer ]; then "$PYTHON" -m launch.slurm.node finish "$RUN"; fi
    ;;
75)
    if [ "$reason" = limit ]; then requeue "drained before the time limit"; fi
    say "drained"
    ;;
2)
    give_up "a setting is wrong (the message is above): the run ends"
    ;;
*)
    if [ -n "$reason" ] && ! is_ours; then exit "$code"; fi    # killed by Slurm
    failures=$(cat "$failures_file" 2>/dev/null || echo 0)
    [ "$SECONDS" -lt "$EARLY_S" ] || failures=0
    failures=$((failures + 1))
    echo "$failures" > "$failures_file"
    if [ "$failures" -le "$MAX_FAILURES" ]; then requeue "failed with exit code $code (failure $failures of $MAX_FAILURES)"; fi
    give_up "failed with exit code $code, $failures times in a row: the run ends"
    ;;
esac
exit 0
