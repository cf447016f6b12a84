#!/usr/bin/env bash
# Sweep the learning rate at several sizes of the model, then judge whether the best one stays where it is.
#
#   ./sweep.sh laptop       width 48 to 192, one seed: under 30 minutes on two cores
#   ./sweep.sh width        the paper's axes, sized for the machine at hand and with three seeds. Core-hours, on a CPU:
#   ./sweep.sh depth          width 5, depth 2, steps 1.5, joint 1, classes 1.5; one process a core shares them out
#   ./sweep.sh steps
#   ./sweep.sh joint        width, depth and steps together
#   ./sweep.sh classes      width, where one η stays and the rate of one tensor class at a time is swept: what does each need?
#   DRY=1 ./sweep.sh width  print the runs still to do as commands, one a line, for Slurm or GNU parallel
#
# All that is written ${NAME:-…} below can be set: RULES="ngpt mine" SEEDS="3 4 5" RESULTS=mine.csv ./sweep.sh width
# Results and picture go to out/sweeps/. Runs that are there already are skipped: an interrupted sweep continues. Once the grid
# is done, sizes whose best η lies too near its edge get more η, and when that is done the DRY commands are those.
set -euo pipefail
cd "$(dirname "$0")"
axis=${1:-}

# The machine: one process a GPU, or one a core. GPUS="" keeps to the CPU; PER_GPU=3 is faster while models are small.
gpus=${GPUS-${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)}}
gpus=$(for i in $(seq "${PER_GPU:-1}"); do echo ${gpus//,/ }; done)
jobs=${JOBS:-$(set -- $gpus; [ $# -gt 0 ] && echo $# || getconf _NPROCESSORS_ONLN)}

# The model at the base. Widths of 48·2^k make the MLP's 8/3 · width exact at every size.
if [ -n "$gpus" ] && [ "$axis" != laptop ]; then
    W=${WIDTH:-192} T=${STEPS:-2000} HEAD_DIM=${HEAD_DIM:-48} SEQ_LEN=${SEQ_LEN:-512} BATCH_SIZE=${BATCH_SIZE:-64}
else
    W=${WIDTH:-48} T=${STEPS:-400} HEAD_DIM=${HEAD_DIM:-24} SEQ_LEN=${SEQ_LEN:-128} BATCH_SIZE=${BATCH_SIZE:-16}
fi
D=${DEPTH:-4}
case $axis in       # sizes are width:depth:steps
    laptop) sizes="$W:$D:$T $((2*W)):$D:$T $((4*W)):$D:$T"                  rules="ngpt nugpt mup"          seeds="0" ;;
    width)  sizes="$W:$D:$T $((2*W)):$D:$T $((4*W)):$D:$T $((8*W)):$D:$T"   rules="ngpt nugpt nugpt_full"   seeds="0 1 2" ;;
    depth)  sizes="$W:2:$T $W:8:$T $W:32:$T"                                rules="ngpt nugpt depth_mup"    seeds="0 1 2" ;;
    # Over steps ngpt's runs are nugpt's with η shifted by m_t^-1/3. The verdict knows, and judges both.
    steps)  sizes="$W:$D:$T $W:$D:$((2*T)) $W:$D:$((4*T)) $W:$D:$((8*T)) $W:$D:$((16*T))"   rules="nugpt"   seeds="0 1 2" ;;
    # Steps in proportion to the parameters of the blocks, which is width² · depth.
    joint)  sizes="$W:2:$((T/2)) $((3*W/2)):3:$((27*T/16)) $((2*W)):4:$((4*T))"     rules="ngpt nugpt"      seeds="0 1 2" ;;
    classes) sizes="$W:$D:$T $((4*W)):$D:$T"                                rules="nugpt"                   seeds="0 1 2" ;;
    *)      sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0" >&2; exit 2 ;;
esac
SIZES=${SIZES:-$sizes}
RULES=${RULES:-$rules}                                  # columns of the table in parametrize.py
SEEDS=${SEEDS:-$seeds}                                  # the same for every η and column, so that runs are paired
if [ "$axis" = classes ]; then
    ETA=${ETA:--5.5}                                    # log2 η, the best at the base
    CLASSES=${CLASSES:-embedding hidden unembedding rescalers}
    GRID=${GRID:--2 -1 0 1 2}                           # log2 of what multiplies it for one of the classes
else
    GRID=${GRID:--7.5 -7 -6.5 -6 -5.5 -5 -4.5}          # log2 η
fi
ROUNDS=${ROUNDS:-3}                                     # how often the grid may be extended
UNEMBEDDING_LR_MULT=${UNEMBEDDING_LR_MULT:-0.5}         # the same for all columns
CONTROL=${CONTROL:-ngpt}                                # the column that the others are compared to
DATA=${DATA:-data/stdlib}
RESULTS=${RESULTS:-out/sweeps/$axis.csv}              # those of assets/ are in the README
PICTURE=${PICTURE:-${RESULTS%.csv}.png}
PYTHON=${PYTHON:-python}

IFS=: read -r base_width base_depth base_steps <<< "${BASE:-${SIZES%% *}}"      # width:depth:steps, the first size if not said
fixed="--base_width=$base_width --base_depth=$base_depth --base_steps=$base_steps --head_dim=$HEAD_DIM --seq_len=$SEQ_LEN
 --batch_size=$BATCH_SIZE --micro_batch_size=0 --unembedding_lr_mult=$UNEMBEDDING_LR_MULT
 --data=$DATA --eval_tokens=${EVAL_TOKENS:-262144} --eval_every=1000000 --out_dir= --sample_tokens=0 ${TRAIN_OPTIONS:-}"
fixed=$(echo $fixed)

tmp=$(mktemp -d)
touch "$tmp/failed"
pids=
set -m      # each worker leads a process group, so that stopping it stops its training run, too
trap 'exec 2>/dev/null; for pid in $pids; do kill -- "-$pid" || true; done; wait; rm -rf "$tmp"' EXIT
trap 'echo "stopped; the same command continues" >&2; exit 130' INT TERM

power() { awk "BEGIN {printf \"%.17g\", ${2:-1} * 2 ^ ($1)}"; }

rates() {   # $1: a point of the grid, as options of train.py
    if [ "$axis" = classes ]; then
        for class in $CLASSES; do
            if [ "$class" = unembedding ]; then center=$UNEMBEDDING_LR_MULT; else center=1; fi
            echo "--learning_rate=$(power "$ETA") --${class}_lr_mult=$(power "$1" "$center")"
        done
    else
        echo "--learning_rate=$(power "$1")"
    fi
}

wanted() {  # every run of the grid, as options of train.py. Seeds are the outer loop: an interrupted sweep has whole seeds.
    for seed in $SEEDS; do
        for x in $GRID; do
            rates "$x" | while read -r rate; do
                for size in $SIZES; do
                    for rule in $RULES; do
                        IFS=: read -r width depth steps <<< "$size"
                        echo "$fixed --parametrization=$rule --width=$width --depth=$depth --steps=$steps $rate --seed=$seed"
                    done
                done
            done
        done
    done
}

unfailed() { grep -vxFf "$tmp/failed" || [ $? = 1 ]; }

todo() {    # parametrize.py knows which runs are in the results, which are the same run twice, and which to add to the grid
    wanted | unfailed > "$tmp/wanted"
    if [ -s "$tmp/wanted" ]; then
        $PYTHON parametrize.py "$RESULTS" --missing < "$tmp/wanted" | unfailed
    fi
}

failed() {  # $1: the run, $2: why
    echo "$1" >> "$tmp/failed"
    echo "  ${1#"$fixed "}: $2" >> "$tmp/reasons"
}

work() {    # a worker: a process of train.py that takes the runs no other has taken. $1: its GPU, if any; $2: the list of runs
    export CUDA_VISIBLE_DEVICES=$1 OMP_NUM_THREADS=1
    claimed=-1
    # Should a run take its process down, another goes on behind it; when one claims no run, all are taken or none can start.
    while [ "$claimed" != "$(ls "$2.claims" | wc -l)" ]; do
        claimed=$(ls "$2.claims" | wc -l)
        sed "s|\$| '--results=$RESULTS'|" "$2" | $PYTHON train.py --each "$2.claims" | while read -r word n rest; do
            if [ "$word" = final: ]; then
                outcome=$(echo "$rest" | grep -oE '(val_loss|status)=[^ ]*' | tr '\n' ' ')
            elif [ "$word" = ended ]; then
                run=$(sed -n "${n}p" "$2")
                if [ "$rest" != 0 ] && [ "$rest" != 3 ]; then       # 3: it diverged, which is a result
                    failed "$run" "$rest"
                    outcome="FAILED: $rest"
                fi
                echo "$n" >> "$2.done"
                ready=$(($(wc -l < "$2.done"))) total=$(($(wc -l < "$2"))) options=${run#"$fixed "}
                minutes=$(((SECONDS * (total - ready) / ready + 59) / 60))
                echo "$ready of $total runs done, about $minutes min left: ${options//--/} $outcome"
            fi
        done || true
    done
}

case $RESULTS in *.csv) ;; *) echo "sweep.sh: RESULTS must end in .csv, not be $RESULTS" >&2; exit 1 ;; esac
if [ -n "${DRY:-}" ]; then
    todo | sed "s|^|OMP_NUM_THREADS=1 $PYTHON train.py |; s|\$| --results=$RESULTS|"
    exit
fi
if [ ! -e "$DATA/meta.json" ] && [ "$DATA" = data/stdlib ]; then
    $PYTHON prepare_data.py                         # here, lest all workers make it
fi
{   # Braces make bash read to the end before it starts: the script can be edited while a sweep runs.
    for round in $(seq 0 "$ROUNDS"); do
        list=$tmp/round$round
        todo > "$list"
        [ -s "$list" ] || break
        mkdir "$list.claims"
        touch "$list.done" "$list.errors"
        echo "$(($(wc -l < "$list"))) runs to do, $jobs at a time, into $RESULTS"
        SECONDS=0 pids=
        for i in $(seq "$jobs"); do
            gpu=$(set -- $gpus; [ $# = 0 ] || { shift $(((i - 1) % $#)); echo "$1"; })
            work "$gpu" "$list" 2>> "$list.errors" &
            pids="$pids $!"
        done
        wait
        for n in $(seq "$(wc -l < "$list")"); do    # those whose process ended before they did
            grep -qx "$n" "$list.done" || failed "$(sed -n "${n}p" "$list")" "its process ended. $(tr '\r' '\n' < "$list.errors" | grep -v step/s | tail -n 1)"
        done
    done
    if [ -e "$RESULTS" ]; then
        $PYTHON parametrize.py "$RESULTS" --control="$CONTROL" --plot="$PICTURE" && echo "picture: $PICTURE" || verdict_failed=1
    fi
    if [ -s "$tmp/reasons" ]; then
        echo "failed, and tried again by the same command:"
        cat "$tmp/reasons"
        exit 1
    fi
    exit "${verdict_failed:-0}"
}
