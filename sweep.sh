#!/usr/bin/env bash
# Tune the base, or sweep the learning rate η over several sizes of a model and judge whether the best η stays.
#   ./sweep.sh base       N settings of one column out of RANGES with one seed, the best five with all seeds
#   ./sweep.sh laptop     width 48 to 144, one seed: under 30 minutes on two cores; width: to 384, three seeds
#   ./sweep.sh depth      2 to 32 blocks; steps: to 16 times the steps; joint: width, depth and steps together
#   ./sweep.sh batch      a quarter to 4 times the batch, at equal tokens
# Each ${NAME:-…} below can be set: RULES="ngpt mine" RESULTS=mine.csv ./sweep.sh width. DRY=1 prints the commands.
# A repeated command continues: train.py skips what RESULTS has. Widen GRID or RANGES where the verdict asks for it.
set -euo pipefail
cd "$(dirname "$0")"
axis=${1:-} name=${1:-}
export GPUS=${GPUS-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' | xargs)}
# width, steps, head_dim, seq_len, batch_size, constants of embedding and unembedding (the small model's are tuned, for
# normalized columns); widths of 48·2^k make the MLP's 8/3 · width exact at every size
[ -n "$GPUS" ] && [ "$axis" != laptop ] && set -- 192 2000 48 512 64 1 0.5 || set -- 48 400 24 128 16 0.25 0.125
W=${WIDTH:-$1} T=${STEPS:-$2} HEAD_DIM=${HEAD_DIM:-$3} SEQ_LEN=${SEQ_LEN:-$4} BATCH_SIZE=${BATCH_SIZE:-$5}
ranges="learning_rate=-8:-4 alpha_init=-6:-1 embedding_lr_mult=-5:1 unembedding_lr_mult=-5:1"       # these are log2
plain="learning_rate=-8:-4 weight_decay=-6:0 embedding_lr_mult=-1:6 unembedding_lr_mult=-1:4"
D=${DEPTH:-4} B=$BATCH_SIZE control=ngpt rules="ngpt nugpt" seeds="0 1 2"
grid="-7 -6.5 -6 -5.5 -5 -4.5" ngpt_grid="-8.5 -8 -7.5 -7 -6.5 -6 -5.5"
case $axis in      # sizes are width:depth:steps, or width:depth:steps:batch_size
    base)    sizes="$W:$D:$T" RULES=${RULES:-nugpt}; RULES=${RULES%% *}
             name=base_${RULES}_$(basename "${DATA:-stdlib}")_${W}x${D}x$T
             case $RULES in gpt_*) ranges=$plain ;; esac ;;
    laptop)  sizes="$W:$D:$T $((2*W)):$D:$T $((3*W)):$D:$T" seeds=0
             grid="-6.5 -6 -5.5 -5 -4.5 -4" ngpt_grid="-8 -7.5 -7 -6.5 -6 -5.5 -5" ;;
    width)   sizes="$W:$D:$T $((2*W)):$D:$T $((4*W)):$D:$T $((8*W)):$D:$T" rules="ngpt nugpt nugpt_full" ;;
    depth)   sizes="$W:2:$T $W:8:$T $W:32:$T" rules="ngpt nugpt depth_mup" ngpt_grid=$grid ;;
    steps)   sizes="$W:$D:$T $W:$D:$((2*T)) $W:$D:$((4*T)) $W:$D:$((8*T)) $W:$D:$((16*T))" rules=nugpt ;;
    joint)   sizes="$W:2:$((T/2)) $((3*W/2)):3:$((27*T/16)) $((2*W)):4:$((4*T))" ;;
    batch)   sizes="$W:$D:$((4*T)):$((B/4)) $W:$D:$T:$B $W:$D:$((T/4)):$((4*B))" rules=nugpt control=nugpt_batch ;;
    *)       sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0" >&2; exit 2 ;;
esac
SIZES=${SIZES:-$sizes} RULES=${RULES:-$rules} SEEDS=${SEEDS:-$seeds} RESULTS=${RESULTS:-out/sweeps/$name.csv}
PICTURE=${PICTURE:-${RESULTS%.csv}.png} GRID=${GRID:-$grid} NGPT_GRID=${NGPT_GRID:-$ngpt_grid}
IFS=: read -r base_width base_depth base_steps base_batch <<< "${BASE:=${SIZES%% *}}"
shared="--head_dim=$HEAD_DIM --seq_len=$SEQ_LEN --micro_batch_size=0 --base_width=$base_width --base_depth=$base_depth
 --base_steps=$base_steps --base_batch_size=${base_batch:-$B} --alpha_init=${ALPHA_INIT:-0.05} --out_dir=
 --embedding_lr_mult=${EMBEDDING_LR_MULT:-$6} --unembedding_lr_mult=${UNEMBEDDING_LR_MULT:-$7} --sample_tokens=0
 --eval_every=1000000 --eval_tokens=${EVAL_TOKENS:-262144} --data=${DATA:-data/stdlib} --results=$RESULTS
 ${TRAIN_OPTIONS:-}"
powers() { for x in $1; do awk "BEGIN {printf \"%.17g\n\", 2 ^ ${x#2^}}"; done | paste -sd,; }

search() {      # N settings that fill the ranges evenly, the same ones every time: multiples of √2, √3, √5, … modulo 1
    awk -v n="${N:-40}" -v ranges="${RANGES:-$ranges}" 'BEGIN {
        fields = split(ranges, r, /[ =:]+/); split("2 3 5 7 11 13 17", prime, " ")
        if (n < 5 || fields < 6 || fields % 3) { print "sweep.sh: base needs N of 5 or more, and RANGES such as",
            "learning_rate=-8:-4 alpha_init=-6:-1" > "/dev/stderr"; exit 1 }
        for (i = 1; i <= n; i++) { for (j = 1; 3 * j <= fields; j++) printf "--%s=%.4g ", r[3*j-2],
            2 ^ (r[3*j-1] + (r[3*j] - r[3*j-1]) * (i * sqrt(prime[j]) % 1)); print "" } }'
}
jobs() {    # options, a line a process, which makes all runs of its lists and compiles once; the largest models first
    for size in $(tr ' ' '\n' <<< "$SIZES" | sort -t: -k1,1nr -k2,2nr -k3,3nr); do
        IFS=: read -r width depth steps batch <<< "$size"
        for rule in $RULES; do
            rates=$([ "$rule" = ngpt ] && [ "$size" != "$BASE" ] && echo "$NGPT_GRID" || echo "$GRID")
            model="$(echo $shared) --parametrization=$rule --width=$width --depth=$depth --steps=$steps"
            model+=" --batch_size=${batch:-$B}"
            for seed in $SEEDS; do
                sed "s|^|$model |; s|$| --seed=$seed|" <<< "${settings:---learning_rate=$(powers "$rates")}"
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
run_all() {
    if [ -n "${DRY:-}" ]; then jobs | sed "s|^|OMP_NUM_THREADS=1 $PYTHON train.py |"; exit; fi
    jobs | xargs -P "${JOBS:-$slots}" --process-slot-var=SLOT -d '\n' -n 1 bash -c 'run "$1"' run
}
verdict() { $PYTHON results/verdict.py "$RESULTS" "$@"; }
export PYTHON=${PYTHON:-python} tmp=$(mktemp -d) && export -f run
trap 'rm -rf "$tmp"' EXIT
slots=$(set -- $GPUS; [ $# -gt 0 ] && echo $(($# * ${PER_GPU:-1})) || nproc)
if [ "$axis" = base ]; then
    settings=$(search)
    SEEDS=${SEEDS%% *} run_all
    while best=$(verdict | grep -o -- '--learning_rate.*' | sort) && [ "$best" != "$settings" ]; do
        settings=$best && run_all       # until the best five are the same with all seeds
    done
else
    run_all
fi
if [ -s "$tmp/failed" ]; then echo "failed, and tried again by the same command:" && sort -u "$tmp/failed"; fi
verdict --control="${CONTROL:-$control}" --plot="$PICTURE" && [ ! -s "$tmp/failed" ]
