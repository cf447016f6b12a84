#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat >&2 <<'end'
Tune the base, or sweep the learning rate over several sizes and judge whether the best one stays.

  ./sweep.sh base       40 settings of the base with one seed, the best five with all; 4 to 7 minutes
  ./sweep.sh laptop     to three times the base's width, one seed; 7 to 11 minutes
  ./sweep.sh width      to eight times the base's width; 2 1/2 hours
  ./sweep.sh depth      half, twice and eight times the base's blocks; an hour
  ./sweep.sh steps      to sixteen times the base's steps; 10 minutes
  ./sweep.sh joint      width, depth and steps together; half an hour
  ./sweep.sh batch      a quarter to four times the base's batch, at equal tokens; 8 minutes

Three seeds, but for laptop. Times are of two cores with bfloat16 and results/laptop.json, those
from width on estimated from the runs' own clocks.
Options of results/sweep.py and of train.py follow the name, and win over those in this file:
  ./sweep.sh width --base=out/books.json --data=data/books --seed=0 --results=out/books_width.csv
--dry prints the runs; data/stdlib is made if it is missing. A repeated command continues.
In values, 2x is twice the base's; sizes are rounded to whole numbers.
end
}

here=$(dirname "$(realpath "$0")")
python=${PYTHON:-python}        # the tests put another program here
name=${1:-}
shift || true

results=out/sweeps/$name.csv
dry=
for option in "$@"; do
    case $option in
        --results=*) results=${option#--results=} ;;
        --results)   echo "sweep.sh: write --results=FILE, with the sign" >&2; exit 1 ;;
        --dry)       dry=yes ;;
    esac
done

# The words of results/sweep.py: what stands before the first + holds for all runs, each + begins a
# group of runs with options of its own, and what follows ++ holds for all runs again, and wins.
# from:to:factor is a grid, low..high a range for random settings.
options=("$@")
sweep() {
    "$python" "$here/results/sweep.py" --base="$here/results/laptop.json" --results="$results" \
        "$@" ++ "${options[@]}"
}

# from 2^-1.5 times the base's η to 2 times it, in steps of √2; nGPT's best η walks to the left
grid=--learning_rate=2^-1.5x:2x:2^.5
ngpt_grid=--learning_rate=2^-3x:1x:2^.5
seeds=--seed=0,1,2
control=ngpt

# No ngpt where all sizes are the base's: there all columns are one model, and results/verdict.py
# takes nugpt's runs for all of them. Over steps and over batch, columns that differ in lr_all alone
# are the same runs, each at another η: so one column is enough there.
case $name in
    base)
        sweep $seeds --random=40 --finalists=5 --write_base="${results%.csv}.json" \
            --learning_rate=2^-8..2^-4 --alpha_init=2^-6..2^-1 \
            --embedding_lr_mult=2^-5..2 --unembedding_lr_mult=2^-5..2
        ;;
    laptop)     # nGPT's grid moves to the left, as its best η does. With so few eval_tokens a loss
                # is off by a tenth of what another seed would change
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
    depth)
        sweep $seeds --parametrization=ngpt,nugpt,depth_mup --depth=1/2x,2x,8x $grid
        ;;
    steps)
        sweep $seeds --parametrization=nugpt --steps=1x,2x,4x,8x,16x $grid
        ;;
    joint)      # width × s, depth × s, steps × s³, s = 1, 3/2, 2, from half the base's depth and steps
        sweep $seeds \
            + --parametrization=nugpt --width=1x --depth=1/2x --steps=1/2x $grid \
            + --parametrization=nugpt --width=3/2x --depth=3/4x --steps=27/16x $grid \
            + --parametrization=nugpt --width=2x --depth=1x --steps=4x $grid \
            + --parametrization=ngpt --width=1x --depth=1/2x --steps=1/2x $grid \
            + --parametrization=ngpt --width=3/2x --depth=3/4x --steps=27/16x $ngpt_grid \
            + --parametrization=ngpt --width=2x --depth=1x --steps=4x $ngpt_grid
        ;;
    batch)
        control=nugpt_batch
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
[ -n "$dry" ] || "$python" "$here/results/verdict.py" "$results" --control=$control --plot="${results%.csv}.png"
