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
trap 'rm -rf "$folder"' EXIT
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

train() { # DEVICE-ARGUMENTS.. : runs under the launcher, everything that is said goes to the log
    "$launcher" launch --gpus "$gpus" -- "$program" "${common[@]}" --save "$folder/model.safetensors" "$@" >"$folder/log" 2>&1
}

# The same losses as ranks on threads.
SECONDS=0
"$program" --device cuda "${common[@]}" --steps 4 --save "$folder/threads.safetensors" --log "$folder/threads.jsonl" >"$folder/log" 2>&1
check 'ranks on threads' 0 $?
SECONDS=0
train --steps 4 --log "$folder/processes.jsonl"
check 'ranks as processes' 0 $? "$gpus ranks" 'first step on'
lines() { { wc -l <"$1"; } 2>/dev/null || echo 0; }
losses() { grep -o '"loss":[^,]*' "$1" | cut -d: -f2; }
paste <(losses "$folder/threads.jsonl") <(losses "$folder/processes.jsonl") | awk '
    { print "     loss on threads " $1 ", as processes " $2; d = ($1 - $2) / $1; if (d < 0) d = -d; if (d > 2e-2) bad = 1 }
    END { exit bad || NR != 4 }' || { echo 'FAIL the losses differ by more than bf16 does'; failed=1; }

# A signal to the last rank in the middle of its steps.
hit() { # NAME SIGNAL CODE WORDS..
    local name=$1 signal=$2 expected=$3 launched victim code
    shift 3
    SECONDS=0
    train --steps 100000 --log "$folder/steps.jsonl" &
    launched=$!
    # Some steps are taken.
    for _ in $(seq 600); do
        [[ $(lines "$folder/steps.jsonl") -ge 5 ]] && break
        sleep 0.2
    done
    victim=$(pgrep -f "^$program .*--steps 100000" | while read -r pid; do
        tr '\0' '\n' <"/proc/$pid/environ" | grep -x "RANK=$((gpus - 1))" >/dev/null && echo "$pid"
    done | head -n 1)
    SECONDS=0
    # Without a victim nothing would end.
    kill "-$signal" "${victim:-$launched}"
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
export AUTOSP_SECRET="a secret of this script $$" AUTOSP_RENDEZVOUS=127.0.0.1:$((20000 + $$ % 10000)) WORLD_SIZE=$gpus LOCAL_WORLD_SIZE=$gpus
pids=()
for ((rank = 0; rank < gpus; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$program" --device cuda "${common[@]}" --steps 100000 --save "$folder/loose.safetensors" \
        --log "$folder/loose.jsonl" >"$folder/loose.$rank" 2>&1 &
    pids+=($!)
done
for _ in $(seq 600); do
    [[ $(lines "$folder/loose.jsonl") -ge 5 ]] && break
    sleep 0.2
done
SECONDS=0
kill -STOP "${pids[gpus - 1]}"
wait "${pids[0]}"
code=$?
cp "$folder/loose.0" "$folder/log"
[[ $code -ne 0 && $SECONDS -le 45 ]] || { echo "FAIL a survivor: exit code $code after $SECONDS s"; failed=1; }
check 'SIGSTOP, survivors alone' "$code" "$code" "rank $((gpus - 1))" 'the last collectives were'
kill -KILL "${pids[@]}" 2>/dev/null
exit $failed
