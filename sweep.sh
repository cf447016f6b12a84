#!/usr/bin/env bash
# Sweep the learning rate η over several sizes of a model, then judge whether the best η stays where it is.
#   ./sweep.sh laptop     width 48 to 192, one seed: under 30 minutes on two cores; width: to 384, three seeds
#   ./sweep.sh depth      2 to 32 blocks; steps: to 16 times the steps; joint: width, depth and steps together
#   ./sweep.sh classes    width, where η stays and the rate of one tensor class at a time is swept
# Each ${NAME:-…} below can be set, as in RULES="ngpt mine" RESULTS=mine.csv ./sweep.sh width. DRY=1 prints the commands.
# A repeated command continues: train.py skips what RESULTS has. Where the verdict asks for it, repeat with a wider GRID.
set -euo pipefail
cd "$(dirname "$0")"
axis=${1:-}
export GPUS=${GPUS-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | xargs || true)}
if [ -n "$GPUS" ] && [ "$axis" != laptop ]; then
    W=${WIDTH:-192} T=${STEPS:-2000} shape="--head_dim=${HEAD_DIM:-48} --seq_len=${SEQ_LEN:-512} --batch_size=${BATCH_SIZE:-64}"
else    # widths of 48·2^k make the MLP's 8/3 · width exact at every size
    W=${WIDTH:-48} T=${STEPS:-400} shape="--head_dim=${HEAD_DIM:-24} --seq_len=${SEQ_LEN:-128} --batch_size=${BATCH_SIZE:-16}"
fi
D=${DEPTH:-4} rules="ngpt nugpt" seeds="0 1 2" grid="-7 -6.5 -6 -5.5 -5 -4.5" ngpt_grid="-8.5 -8 -7.5 -7 -6.5 -6 -5.5"
case $axis in      # sizes are width:depth:steps
    laptop)  sizes="$W:$D:$T $((2*W)):$D:$T $((4*W)):$D:$T" seeds=0 ;;
    width)   sizes="$W:$D:$T $((2*W)):$D:$T $((4*W)):$D:$T $((8*W)):$D:$T" rules="ngpt nugpt nugpt_full" ;;
    depth)   sizes="$W:2:$T $W:8:$T $W:32:$T" rules="ngpt nugpt depth_mup" ngpt_grid=$grid ;;
    steps)   sizes="$W:$D:$T $W:$D:$((2*T)) $W:$D:$((4*T)) $W:$D:$((8*T)) $W:$D:$((16*T))" rules=nugpt ;;
    joint)   sizes="$W:2:$((T/2)) $((3*W/2)):3:$((27*T/16)) $((2*W)):4:$((4*T))" ;;
    classes) sizes="$W:$D:$T $((4*W)):$D:$T" rules=nugpt grid="-2 -1 0 1 2" ;;
    *)       sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0" >&2; exit 2 ;;
esac
SIZES=${SIZES:-$sizes} RULES=${RULES:-$rules} SEEDS=${SEEDS:-$seeds} RESULTS=${RESULTS:-out/sweeps/$axis.csv}
GRID=${GRID:-$grid} NGPT_GRID=${NGPT_GRID:-$ngpt_grid}      # log2 η; of classes, log2 of what multiplies η
IFS=: read -r base_width base_depth base_steps <<< "${BASE:=${SIZES%% *}}"
shared="$shape --base_width=$base_width --base_depth=$base_depth --base_steps=$base_steps --alpha_init=${ALPHA_INIT:-0.05}
 --embedding_lr_mult=${EMBEDDING_LR_MULT:-1} --unembedding_lr_mult=${UNEMBEDDING_LR_MULT:-0.5} --data=${DATA:-data/stdlib}
 --eval_tokens=${EVAL_TOKENS:-262144} --eval_every=1000000 --micro_batch_size=0 --out_dir= --sample_tokens=0 ${TRAIN_OPTIONS:-}"
powers() { for x in $1; do awk "BEGIN {printf \"%.17g\n\", ${2:-1} * 2 ^ $x}"; done | paste -sd,; }

jobs() {    # options, a line a process, which makes all runs of its lists and compiles once; the largest models first
    for size in $(tr ' ' '\n' <<< "$SIZES" | sort -t: -k1,1nr -k2,2nr -k3,3nr); do
        IFS=: read -r width depth steps <<< "$size"
        for rule in $RULES; do
            case $size:$rule in     # at the base all normalized columns are the same runs
                $BASE:gpt_* | $BASE:${RULES%% *}) rates=$GRID ;;
                $BASE:*) continue ;;
                *) rates=$([ "$rule" = ngpt ] && echo "$NGPT_GRID" || echo "$GRID") ;;
            esac
            model="--results=$RESULTS $(echo $shared) --parametrization=$rule --width=$width --depth=$depth --steps=$steps"
            if [ "$axis" != classes ]; then
                for seed in $SEEDS; do echo "$model --learning_rate=$(powers "$rates") --seed=$seed"; done
                continue
            fi
            for class in ${CLASSES:-embedding hidden unembedding rescalers}; do
                center=$(grep -oP "(?<=--${class}_lr_mult=)\S+" <<< "$model" || echo 1)
                for mult in $(powers "$GRID" "$center" | tr , ' '); do
                    echo "$model --learning_rate=$(powers "${ETA:--5.5}") --${class}_lr_mult=$mult --seed=${SEEDS// /,}"
                done
            done
        done
    done
}
run() {     # $1: options of a process. A diverged run, exit code 3, is a result.
    local gpus=($GPUS) log=$tmp/$SLOT what=${1#*--parametrization=}
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
    OMP_NUM_THREADS=1 $PYTHON train.py $1 2> "$log" | grep -E --line-buffered '^(final|skipped)' | sed -u "s|^|$what |"
    case ${PIPESTATUS[0]} in 0 | 3) ;; *) echo "$what: $(tr '\r' '\n' < "$log" | tail -n 1)" >> "$tmp/failed" ;; esac
}
export PYTHON=${PYTHON:-python} tmp=$(mktemp -d) && export -f run
trap 'rm -rf "$tmp"' EXIT
if [ -n "${DRY:-}" ]; then jobs | sed "s|^|OMP_NUM_THREADS=1 $PYTHON train.py |"; exit; fi
slots=$(set -- $GPUS; [ $# -gt 0 ] && echo $(($# * ${PER_GPU:-1})) || nproc)
jobs | xargs -P "${JOBS:-$slots}" --process-slot-var=SLOT -d '\n' -n 1 bash -c 'run "$1"' run
$PYTHON results/verdict.py "$RESULTS" --control="${CONTROL:-ngpt}" --plot="${PICTURE:=${RESULTS%.csv}.png}"
if [ -s "$tmp/failed" ]; then echo "failed, and tried again by the same command:" && cat "$tmp/failed" && exit 1; fi
