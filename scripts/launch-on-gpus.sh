#!/usr/bin/env bash
# Launches the example on GPUs, one process each, and does to it what can happen to processes: each survivor has to end in time and
# say which rank and which collective it was.
#
#   cargo build --release -p cargo-autosp
#   cargo build --release --features cuda --example train
#   scripts/launch-on-gpus.sh [GPUS] [LAUNCHER] [PROGRAM]
#
# The programs are target/release/cargo-autosp and target/release/examples/train unless they are given.
set -uo pipefail
gpus=${1:-2}
launcher=${2:-target/release/cargo-autosp}
program=${3:-target/release/examples/train}
folder=$(mktemp -d)
# Whatever is left when this ends, however it ends: ranks run in process groups of their own, but all of them name the folder.
clean_up() {
    pkill -KILL -f -- "--save $folder/" 2>/dev/null
    rm -rf "$folder"
}
trap clean_up EXIT
# No run is waited for longer, in seconds.
limit=120
# NVLink multicast stays off on hosts that are shared.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} AUTOSP_DEADLINE=10
seq 1 20000 | sed 's/$/ is a line of a text that a model can learn/' >"$folder/text.txt"
common=(--data "$folder/text.txt" --documents cross --seq-len 4096 --batch 2 --dtype bf16 --sp "$gpus")
failed=0

check() { # NAME EXPECTED-CODE CODE WORDS..
    local name=$1 expected=$2 code=$3 word bad=
    shift 3
    [[ $code -eq $expected ]] || bad="exit code $code, expected $expected"
    for word in "$@"; do
        grep -qF -- "$word" "$folder/log" || bad="$bad; not said: $word"
    done
    if [[ -z $bad ]]; then
        echo "ok   $name ($SECONDS s)"
    else
        echo "FAIL $name ($SECONDS s): $bad"
        tail -n 40 "$folder/log"
        failed=1
    fi
}

# ARGUMENTS.. : becomes a run under the launcher, everything that is said goes to the log. Call it in a subshell, so that `$!` is it.
train() {
    exec timeout "$limit" "$launcher" launch --gpus "$gpus" -- "$program" "${common[@]}" --save "$folder/model.safetensors" "$@" >"$folder/log" 2>&1
}

# The same losses as ranks on threads.
SECONDS=0
timeout "$limit" "$program" --device cuda "${common[@]}" --steps 4 --save "$folder/threads.safetensors" --log "$folder/threads.jsonl" >"$folder/log" 2>&1
check 'ranks on threads' 0 $?
SECONDS=0
(train --steps 4 --log "$folder/processes.jsonl")
check 'ranks as processes' 0 $? "$gpus ranks" 'first step on'
lines() { { wc -l <"$1"; } 2>/dev/null || echo 0; }
losses() { grep -o '"loss":[^,]*' "$1" | cut -d: -f2; }
paste <(losses "$folder/threads.jsonl") <(losses "$folder/processes.jsonl") | awk '
    { print "     loss on threads " $1 ", as processes " $2; d = ($1 - $2) / $1; if (d < 0) d = -d; if (d > 2e-2) bad = 1 }
    END { exit bad || NR != 4 }' || { echo 'FAIL the losses differ by more than bf16 does'; failed=1; }

# Until some steps were taken, or the run is over or takes too long.
wait_for_steps() { # LOG
    local n
    for ((n = 0; n < 5 * limit; n++)); do
        [[ $(lines "$1") -lt 5 && -n $(jobs -r) ]] || break
        sleep 0.2
    done
}

# A signal to the last rank in the middle of its steps.
hit() { # NAME SIGNAL CODE WORDS..
    local name=$1 signal=$2 expected=$3 launched victim code
    shift 3
    SECONDS=0
    (train --steps 100000 --log "$folder/steps.jsonl") &
    launched=$!
    wait_for_steps "$folder/steps.jsonl"
    victim=$(pgrep -f "^$program .*--steps 100000" | while read -r pid; do
        tr '\0' '\n' <"/proc/$pid/environ" | grep -x "RANK=$((gpus - 1))" >/dev/null && echo "$pid"
    done | head -n 1)
    SECONDS=0
    if [[ -n $victim ]]; then
        kill "-$signal" "$victim"
    else
        echo "FAIL $name: no rank $((gpus - 1)) to send it to"
        failed=1
        kill "$launched"
    fi
    wait "$launched"
    code=$?
    check "$name" "$expected" "$code" "$@"
    [[ $SECONDS -le 30 ]] || { echo "FAIL $name took $SECONDS s"; failed=1; }
    rm -f "$folder/steps.jsonl"
    if pgrep -f "^$program .*--steps 100000" >/dev/null; then
        echo "FAIL $name: ranks are left"
        failed=1
    fi
}
hit 'kill -9' KILL 137 "rank $((gpus - 1)) of $gpus failed: its process was killed by SIGKILL" \
    "rank $((gpus - 1)) of $gpus failed: its process ended without a word" 'it was last in'
hit 'SIGSTOP' STOP 137 "rank $((gpus - 1)) of $gpus failed: its process was stopped by SIGSTOP"

# The same without a launcher that kills the stopped rank: the survivors notice by themselves.
SECONDS=0
AUTOSP_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export AUTOSP_SECRET AUTOSP_RENDEZVOUS=127.0.0.1:$((20000 + $$ % 10000)) WORLD_SIZE=$gpus LOCAL_WORLD_SIZE=$gpus
pids=()
for ((rank = 0; rank < gpus; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$program" --device cuda "${common[@]}" --steps 100000 --save "$folder/loose.safetensors" \
        --log "$folder/loose.jsonl" >"$folder/loose.$rank" 2>&1 &
    pids+=($!)
done
wait_for_steps "$folder/loose.jsonl"
SECONDS=0
kill -STOP "${pids[gpus - 1]}"
# Those that have not ended by then are killed, which their exit codes say.
(sleep 45 && kill -KILL "${pids[@]:0:gpus-1}") 2>/dev/null &
late=$!
for ((rank = 0; rank < gpus - 1; rank++)); do
    wait "${pids[rank]}"
    code=$?
    cp "$folder/loose.$rank" "$folder/log"
    [[ $code -ne 0 && $code -ne 137 ]] || { echo "FAIL survivor $rank: exit code $code after $SECONDS s"; failed=1; }
    check "SIGSTOP, survivor $rank alone" "$code" "$code" "rank $((gpus - 1))" 'the last collectives were'
done
kill "$late" 2>/dev/null
exit $failed
