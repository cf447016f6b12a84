#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"       # as `sh sweep.sh` begins it
set -euo pipefail

usage() {
    cat >&2 <<'end'
Tune the base, or sweep the learning rate over several sizes and judge whether the best one stays.

  ./sweep.sh base       40 random settings of the base; 4 to 7 minutes
  ./sweep.sh laptop     to three times the base's width, one seed; 7 to 11 minutes
  ./sweep.sh width      to eight times the base's width; 2 1/2 hours
  ./sweep.sh depth      half, twice and eight times the base's blocks; an hour
  ./sweep.sh steps      to sixteen times the base's steps; 10 minutes
  ./sweep.sh joint      width, depth and steps together; half an hour
  ./sweep.sh batch      a quarter to four times the base's batch, at equal tokens; 8 minutes

Each has three seeds, laptop one. base gives all three to its best five settings alone.
The base is results/laptop.json. Times are of it, on two cores with bfloat16; those from width on
are estimates.

Options of results/sweep.py and of train.py follow the name, and win over those in this file:
  ./sweep.sh width --base=out/books.json --data=data/books --seed=0 --results=out/books_width.csv
--dry prints the runs alone. A repeated command continues.
end
}

here=$(dirname "$(realpath "$0")")
python=${PYTHON:-$(command -v python || command -v python3 || true)}
if [ -z "$python" ]; then
    echo "sweep.sh: there is no python here; activate an environment, or set PYTHON=…" >&2
    exit 1
fi
name=${1:-}
shift || true

# the table, unless an option names another
results=out/sweeps/$name.csv
dry=
for option in "$@"; do
    case $option in
        --results=*) results=${option#--results=} ;;
        --results)   echo "sweep.sh: write --results=FILE, with the sign" >&2; exit 1 ;;
        --dry)       dry=yes ;;
    esac
done

# results/sweep.py runs all combinations of the values of its options. Options before the first +
# hold for all runs. Each + begins a group of runs with options of its own. Options after ++ hold
# for all runs again, and win: these are the user's.
users_options=("$@")
sweep() {
    # bash before 4.4 takes an empty array for an unset variable, so this asks first
    "$python" "$here/results/sweep.py" --base="$here/results/laptop.json" --results="$results" \
        "$@" ++ ${users_options[@]+"${users_options[@]}"}
}

# A number with an x is a multiple of the base's value: 2^-1.5x is 2^-1.5 times the base's η. Three
# numbers are from:to:factor: this grid ends at twice the base's η, and its steps are √2.
grid=--learning_rate=2^-1.5x:2x:2^.5
ngpt_grid=--learning_rate=2^-3x:1x:2^.5     # nGPT's best η is lower in larger models
seeds=--seed=0,1,2
control=ngpt

# At the base's own size all columns are one model, so nugpt's runs there are ngpt's, too: the
# groups of ngpt begin at the next size. Over steps and over batch, columns differ in lr_all alone,
# which multiplies η: a run of one column is a run of every other at another η, and one column is
# enough. results/verdict.py knows both.
case $name in
    base)
        sweep $seeds --random=40 --finalists=5 --write_base="${results%.csv}.json" \
            --learning_rate=2^-8..2^-4 --alpha_init=2^-6..2^-1 \
            --embedding_lr_mult=2^-5..2 --unembedding_lr_mult=2^-5..2
        ;;
    laptop)     # fewer η and eval_tokens: that moves a loss by a tenth of what another seed does
        sweep --seed=0 --eval_tokens=65536 \
            + --parametrization=nugpt --width=1x,3/2x,3x $grid \
            + --parametrization=ngpt --width=3/2x --learning_rate=2^-1.5x:2^.5x:2^.5 \
            + --parametrization=ngpt --width=3x --learning_rate=2^-2x:2^.5x:2^.5
        ;;
    width)
        sweep $seeds \
            + --parametrization=nugpt --width=1x,2x,4x,8x $grid \
            + --parametrization=nugpt_full --width=2x,4x,8x $grid \
            + --parametrization=ngpt --width=2x,4x,8x $ngpt_grid
        ;;
    depth)      # the smallest size is half the base, where the columns are different models
        sweep $seeds --parametrization=ngpt,nugpt,depth_mup --depth=1/2x,2x,8x $grid
        ;;
    steps)
        sweep $seeds --parametrization=nugpt --steps=1x,2x,4x,8x,16x $grid
        ;;
    joint)      # from width 1x, depth 1/2x, steps 1/2x: times s, s and s³, with s = 1, 3/2, 2
        sweep $seeds \
            + --parametrization=nugpt --width=1x --depth=1/2x --steps=1/2x $grid \
            + --parametrization=nugpt --width=3/2x --depth=3/4x --steps=27/16x $grid \
            + --parametrization=nugpt --width=2x --depth=1x --steps=4x $grid \
            + --parametrization=ngpt --width=1x --depth=1/2x --steps=1/2x $grid \
            + --parametrization=ngpt --width=3/2x --depth=3/4x --steps=27/16x $ngpt_grid \
            + --parametrization=ngpt --width=2x --depth=1x --steps=4x $ngpt_grid
        ;;
    batch)
        control=nugpt_batch     # nugpt with a power of the batch
        sweep $seeds --parametrization=nugpt $grid \
            + --batch_size=1/4x --steps=4x \
            + --batch_size=1x --steps=1x \
            + --batch_size=4x --steps=1/4x
        ;;
    *)
        usage
        exit 2
        ;;
esac

if [ -n "$dry" ]; then
    exit 0
elif [ "$name" = base ]; then
    "$python" "$here/results/compare.py" search "$results"
else
    "$python" "$here/results/verdict.py" "$results" --control=$control --plot="${results%.csv}.png"
fi
