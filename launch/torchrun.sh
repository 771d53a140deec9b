#!/usr/bin/env bash
# Start this node's ranks with torchrun: on one node, or on each of several (run it once per node).
#
#   NPROC_PER_NODE=4 launch/torchrun.sh parallel.pp=4 schedule.micro_batches=8                     one node
#
#   export NNODES=2 NPROC_PER_NODE=2 MASTER_ADDR=10.0.0.1
#   NODE_RANK=0 launch/torchrun.sh parallel.pp=4 schedule.micro_batches=8                          on the first node
#   NODE_RANK=1 launch/torchrun.sh parallel.pp=4 schedule.micro_batches=8                          on the second
#
# Arguments are Hydra overrides. Environment:
#   NNODES          nodes, default 1
#   NODE_RANK       0 on the node that MASTER_ADDR names, which holds the rendezvous; needed if NNODES > 1
#   MASTER_ADDR     name or address of that node; needed if NNODES > 1          MASTER_PORT   default 29500
#   NPROC_PER_NODE  ranks per node; default: its GPUs, or 2 without any
#   NODE_ADDR       this node's own address, where its host name does not resolve on the other nodes
#   RDZV_ID         tells jobs apart that share MASTER_ADDR:MASTER_PORT; default "dualpipe"
#   RDZV_CONF       more of torchrun's --rdzv-conf, e.g. join_timeout=1800 (seconds to wait for missing nodes)
#   MAX_RESTARTS    how often the ranks are started again after a crash, from the newest checkpoint; default 3
#   EXIT_CODE_WHEN_STOPPED   default 0, see below
#   TORCHRUN        default: .venv/bin/torchrun if there is one, else the torchrun on the path
#
# SIGTERM, SIGUSR1 or Ctrl-C here: all ranks of all nodes save after their step and leave, and this script ends with
# EXIT_CODE_WHEN_STOPPED. A scheduler that should start the job again can ask for a code of its own, e.g. 75. A second
# Ctrl-C ends the ranks at once. A configuration that cannot work ends with 2 and is not tried again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

whole_number() { [[ ${!1} =~ ^[0-9]+$ ]] || fail "$1=${!1} must be a whole number"; }

NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-29500} MAX_RESTARTS=${MAX_RESTARTS:-3}
for name in NNODES NODE_RANK MASTER_PORT MAX_RESTARTS; do whole_number "$name"; done

TORCHRUN=${TORCHRUN:-$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)}
command -v "$TORCHRUN" >/dev/null || fail "no torchrun found; install this package, or set TORCHRUN=/path/to/torchrun"
if [ -z "${NPROC_PER_NODE:-}" ]; then
  gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
  NPROC_PER_NODE=$((gpus > 0 ? gpus : 2))
fi
whole_number NPROC_PER_NODE

# The ranks' own signals come from this script alone; torchrun must neither die of them nor pass them on its own way.
options=(--nproc-per-node="$NPROC_PER_NODE" --max-restarts="$MAX_RESTARTS" "--signals-to-handle=SIGHUP,SIGQUIT")
if [ "$NNODES" -eq 1 ]; then
  options+=(--standalone)
else
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of the first node"
  [ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK=$NODE_RANK must be less than NNODES=$NNODES"
  is_host=$([ "$NODE_RANK" -eq 0 ] && echo true || echo false)
  options+=(
    --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
    --rdzv-id="${RDZV_ID:-dualpipe}" --rdzv-conf="is_host=$is_host${RDZV_CONF:+,$RDZV_CONF}"
  )
  if [ -n "${NODE_ADDR:-}" ]; then options+=(--local-addr="$NODE_ADDR"); fi
fi
# Agents that share their store with the ranks keep its address from round to round; one that comes new waits for it
# in vain (torch 2.13, DynamicRendezvousHandler.next_rendezvous). A store per round lets lost nodes come back.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The agent that holds the store leaves first; the others would print a stack of C++ frames each about it.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
OUTCOME_FILE=$(mktemp)
export OUTCOME_FILE
trap 'rm -f "$OUTCOME_FILE"' EXIT

# The process ids of the ranks: torchrun's children that have a RANK (where that cannot be seen: all children).
ranks() {
  local pid
  for pid in $(pgrep -P "$torchrun"); do
    if [ ! -d /proc/self ] || tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -q '^RANK='; then echo "$pid"; fi
  done
}

# Again and again, as a rank that is still starting does not hear it.
ask_ranks_to_leave() {
  local pids
  trap '' TERM USR1 INT # this runs in a process of its own
  while kill -0 "$torchrun" 2>/dev/null; do
    pids=$(ranks)
    if [ -n "$pids" ]; then
      # shellcheck disable=SC2086 # one word each
      kill -USR1 $pids 2>/dev/null || true
    elif [ ! -s "$OUTCOME_FILE" ]; then
      echo stopped >"$OUTCOME_FILE" # none has started yet: torchrun waits for other nodes
      kill -HUP "$torchrun" 2>/dev/null || true
    fi
    sleep 1
  done
}

asked='' interrupted=''
on_signal() {
  interrupted=yes
  if [ -z "$asked" ]; then
    asked=yes
    echo "launch/torchrun.sh: $1, asking the ranks to save and leave" >&2
    ask_ranks_to_leave &
  elif [ "$1" = SIGINT ]; then
    kill -HUP "$torchrun" 2>/dev/null || true
  fi
}

(
  trap '' TERM USR1 INT
  exec "$TORCHRUN" "${options[@]}" train.py "$@"
) &
torchrun=$!
for name in TERM USR1 INT; do
  # shellcheck disable=SC2064 # the name of now
  trap "on_signal SIG$name" "$name"
done

code=0 interrupted=yes
while [ -n "$interrupted" ]; do # `wait` also returns when a signal came
  interrupted=''
  code=0
  wait "$torchrun" || code=$?
done

outcome=$(cat "$OUTCOME_FILE")
case $outcome in
'') exit "$code" ;;
stopped) exit "${EXIT_CODE_WHEN_STOPPED:-0}" ;;
*) exit "$outcome" ;;
esac
