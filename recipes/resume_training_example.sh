#!/usr/bin/env bash
# Resume a run of recipes/causvid.py with the settings it was saved with; flags given here win.
set -euo pipefail

usage() {
    cat >&2 <<'EOF'
usage: bash resume_training_example.sh DIR [flags of recipes/causvid.py]

DIR is the run's folder. Examples:
    bash resume_training_example.sh DIR                                # from its latest checkpoint
    bash resume_training_example.sh DIR --resume_epoch 10 --lr 1e-6    # from epoch 10, with another rate
    bash resume_training_example.sh DIR --num_epochs 200               # 200 epochs in total

In the environment: RANKS, how many to start (the launcher's own default), and MASTER_PORT.
EOF
    exit 2
}

if [[ $# -lt 1 || -z $1 || $1 == -* ]]; then
    usage
fi
run_dir=$1
shift
if [[ ! -d $run_dir ]]; then
    echo "$run_dir is no folder; give that of a run, which holds its checkpoints" >&2
    exit 4 # as the recipe says that there is nothing to load
fi

checkpoints=0
for manifest in "$run_dir"/step_*/manifest; do
    if [[ -f $manifest ]]; then
        checkpoints=$((checkpoints + 1))
    fi
done
echo "$run_dir: $checkpoints checkpoints"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v deepspeed >/dev/null && [[ -x $root/.venv/bin/deepspeed ]]; then
    export PATH="$root/.venv/bin:$PATH"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}"
fi

if command -v deepspeed >/dev/null; then
    launch=(deepspeed)
    [[ -z ${RANKS:-} ]] || launch+=(--num_gpus "$RANKS")
    [[ -z ${MASTER_PORT:-} ]] || launch+=(--master_port "$MASTER_PORT")
elif command -v torchrun >/dev/null; then
    launch=(torchrun --nproc_per_node "${RANKS:-1}")
    [[ -z ${MASTER_PORT:-} ]] || launch+=(--master_port "$MASTER_PORT")
else
    launch=(python3)
fi

set -x
exec "${launch[@]}" "$root/recipes/causvid.py" --resume_from "$run_dir" "$@"
