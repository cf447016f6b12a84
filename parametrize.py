"""
The learning-rate rules of normalized Transformers, as one table: what changes when a model is
wider, deeper or trained longer than the base, the small model on which the learning rate η was
tuned. This file needs nothing but Python, so that it can be copied into other code.

    python parametrize.py                                           print the table
    python parametrize.py --width=4096 --depth=48 --steps=100000    the numbers of one model

    rate of a tensor = η · schedule(step) · lr_all · lr_<its class> · <its class>_lr_mult

m_w = width / base_width, m_d = depth / base_depth, m_t = steps / base_steps, m_b = batch_size /
base_batch_size, d = width, c = (base_width)^-1/2, α₀ = alpha_init, where α starts at the base.
The last factor, …_lr_mult, is a constant of each class. These constants and α₀ are tuned once
with η, and are the same for all sizes and columns. So at the base's size all columns are one
model and one optimizer, bit for bit. "The paper" is arXiv:2604.27077 in this file.

TAKING IT HOME, to your own normalized Transformer
  1. Put your names into TENSOR_CLASSES and SHARED_ROWS. Delete the VARIANTS that you do not
     need.
  2. Call parametrize. The settings are init and scale of each rescaler: value = raw ·
     init/scale, and raw starts at scale. Where nGPT has 1/sqrt(width), this is now a number, c.
  3. Give param_groups to Adam, with eps=1e-16. Set each group's lr in each step, as param_groups
     says.
  4. Check that at the base's sizes the losses are those of before, and print the groups' rates
     at four times its width: 0.5 η for the embedding, 0.354 η for hidden and unembedding, η for
     the rest.

WHY THESE POWERS

Premises. A hidden state h is a unit vector of d numbers, and so is each row of a weight W. So
  their entries are about d^-1/2. An entry of W h is a product of a row with h. The two are
  unrelated at the start, and so W h has entries of about d^-1/2, too. Adam changes each entry of
  W by about its rate, whatever the gradient. Wanted: a step changes W h by the same fraction at
  each width, that is, each entry by a number that falls as d^-1/2.

Width. The change of an entry of W h is a sum of d products: rate · d^-1/2 each.
  Unaligned, if the change of W has nothing to do with h, d random signs add up to √d: the entry
    changes by √d · rate · d^-1/2 = rate. So the rate must fall as d^-1/2 (nugpt_none).
  Aligned, if all have one sign, they add up to d: the entry changes by √d · rate. So the rate
    must fall as d^-1 (nugpt_full). arXiv:2407.05872 has both cases.
  The paper measured how well changes of W are aligned with h while a model trains: full
  alignment is 1, none 1/2. It is high at first and falls. The mean over a long run is 3/4, hence
  -3/4 (nugpt).
  W_O and W_oMLP read vectors that are no unit vectors, so the size of their outputs is another.
  But a norm follows both, and what counts is by which fraction a step changes their outputs. That
  fraction depends on the width as it does above: the same powers.
  Embedding: a row of it is itself a hidden state, nothing is summed: the rate falls as d^-1/2.
  Unembedding: no norm follows the logits z = s_z · E_out h. A step changes an aligned logit by
  s_z · √d · rate. mup keeps this number equal at each width, with s_z starting at 1: hence
  d^-1/2. The paper's nugpt asks for the same fraction of E_out h, as for a hidden matrix: hence
  -3/4. With s_z starting at 1 an aligned step then changes a logit by m_w^-1/4 of what it does at
  the base. That costs nothing that we could measure.
Depth. A block moves h by a step of size α on the sphere. The steps of the first, random blocks
  are unrelated, and m_d times as many of them add up to m_d^1/2 times as much. What training
  changes in the blocks points one way, and adds up to m_d times as much. nugpt and mup keep the
  second sum: α₀·m_d^-1, and no factor on the rates. The usual μP over depth (depth_mup) keeps the
  first sum, α₀·m_d^-1/2. With that α the changes would add up to m_d^1/2 times as much, so that
  it divides the hidden rate by m_d^1/2. In the paper's experiments the best η of depth_mup drifts
  to the right (section 4.5).
Steps. m_t^-1/3 is what the paper fitted to the best η of runs of several lengths (section 4.6).
  It is no theorem. Our runs of 100 to 1,600 steps agree for cosine and linear; wsd wants about
  -1/2.
Rescalers. A rescaler is a learned vector, raw · init/scale, and raw starts at scale. Adam moves
  raw by about the rate, and thereby the value by init · rate/scale: a smaller scale makes it
  faster. nGPT's scale d^-1/2 makes rescalers faster in wider models; c keeps the base's speed.
  nGPT gives s_u and s_ν the scale 1 at every width, and so they keep their speed already.
  u = (W_u h) ⊙ s_u has no √d, as ν has: Norm follows the MLP and cancels any factor of u.
s_z. What decided where it starts is a measurement. At 16 times the base's width, after 400 steps,
  a start at m_w^1/2 (nugpt_z) ends 0.03 nats above a start at 1 (results/README.md). The paper's
  list of rules has no entry for s_z. Its lemma 6.8, by which the first logits are as large at
  each width, can be read as m_w^1/2. But the first logits are random, and small only for that
  reason. Learned ones are aligned, and s_z ends at 15 to 17 at each width if it starts at 1. A
  start at m_w^1/2 is too high for them, and makes s_z too fast.
Not carried: head_dim, for which there is no rule (lemma 6.6 holds for a constant one), and
  batch_size.
Adam's ε. Its step is the sign of the gradient only while ε is small beside the gradient.
  Gradients shrink as the width grows. 1e-16, the paper's value, is small at each width; 1e-8,
  the usual, is not.
Why nugpt and not mup? In our runs of 400 steps the two cannot be told apart. In the paper's long
  runs mup's best η drifts to the right with the width, as alignment falls, and nugpt's does not.
Where the cells come from. ngpt: arXiv:2410.01131, which has no rule for rates; as published it
  has each …_lr_mult at 1. mup: the paper's "μP for widths", its powers of m_w derived from a
  lemma, with nugpt's rule for depth. nugpt: the paper's νGPT. The paper's constants are
  unembedding_lr_mult 1/2, 1 for the others, α₀ 0.05 (sections 3.1, 7.4): train.py's defaults.
  results/laptop.json has its own.
"""
import argparse
import re
import signal
import sys
from fractions import Fraction

# A cell is a product of powers. The rows lr_… multiply η, the others are settings of the rescalers.
TABLE = {
    # row              ngpt       mup          nugpt            what it sets
    "lr_all":         ["1",      "m_t^-1/3",  "m_t^-1/3"],    # multiplies η for every tensor
    "lr_embedding":   ["1",      "m_w^-1/2",  "m_w^-1/2"],    # and this for the embedding E_in
    "lr_hidden":      ["1",      "m_w^-1",    "m_w^-3/4"],    # the blocks' matrices
    "lr_unembedding": ["1",      "m_w^-1/2",  "m_w^-3/4"],    # the unembedding E_out
    "lr_rescalers":   ["1",      "1",         "1"],           # the rescalers
    "alpha_init":     ["α₀",     "α₀·m_d^-1", "α₀·m_d^-1"],   # where α_A and α_M start
    "s_init":         ["1",      "1",         "1"],           # where s_qk, s_u, s_ν and s_z start
    "scale":          ["d^-1/2", "c",         "c"],           # scale of α_A, α_M, s_qk and s_z
    "mlp_scale":      ["1",      "1",         "1"],           # scale of s_u and s_ν
}

# Four rows stand for several settings each: the init and the scale of every rescaler of model.py.
SHARED_ROWS = {
    "alpha_init": ["alpha_A_init", "alpha_M_init"],
    "s_init": ["s_qk_init", "s_u_init", "s_nu_init", "s_z_init"],
    "scale": ["alpha_A_scale", "alpha_M_scale", "s_qk_scale", "s_z_scale"],
    "mlp_scale": ["s_u_scale", "s_nu_scale"],
}

# More columns, each a line: the column it starts from, and the cells that differ. Yours is such a
# line. It may set any row, lr_<class> of any class in TENSOR_CLASSES, and <rescaler>_init and
# <rescaler>_scale of any rescaler there. Give a column that you edit a new name: a table of results
# records the name alone, and would mix runs of the old and the new cells.
VARIANTS = {
    # full alignment, and none
    "nugpt_full": ("nugpt", {"lr_hidden": "m_w^-1", "lr_unembedding": "m_w^-1"}),
    "nugpt_none": ("nugpt", {"lr_hidden": "m_w^-1/2", "lr_unembedding": "m_w^-1/2"}),
    # s_z starts at m_w^1/2: see "s_z" above
    "nugpt_z": ("nugpt", {"s_z_init": "m_w^1/2"}),
    "nugpt_full_z": ("nugpt_full", {"s_z_init": "m_w^1/2"}),
    # the usual μP over depth; over width it is as nugpt, so that only depth differs
    "depth_mup": ("nugpt", {"lr_hidden": "m_w^-3/4 · m_d^-1/2", "alpha_init": "α₀·m_d^-1/2"}),
    # ours: at an equal number of tokens m_t is 1/m_b, and lr_all is m_b^1/6 · m_b^1/3 = m_b^1/2
    "nugpt_batch": ("nugpt", {"lr_all": "m_b^1/6 · m_t^-1/3"}),
}

# Each parameter of model.py belongs to one class, which has a learning rate of its own. A class is
# a list of names: blocks.3.W_q is hidden, since W_q, one of the parts of its name, is in that list.
TENSOR_CLASSES = {
    "embedding": ["embedding"],
    "hidden": ["W_q", "W_k", "W_v", "W_O", "W_u", "W_nu", "W_oMLP"],
    "unembedding": ["unembedding"],
    "rescalers": ["s_qk", "s_u", "s_nu", "s_z", "alpha_A", "alpha_M"],
}


def expand(cells):
    """Cells, {row: cell}, with a row of SHARED_ROWS replaced by the settings it stands for."""
    expanded = {}
    for row, cell in cells.items():
        for name in SHARED_ROWS.get(row, [row]):
            expanded[name] = cell
    return expanded


def read_table(table, names):
    """The columns of a table, {column: {row or setting: cell}}, whose names are given in order."""
    columns = {}
    for i, name in enumerate(names):
        columns[name] = expand({row: cells[i] for row, cells in table.items()})
    return columns


def build_columns():
    """All columns, those of TABLE and of VARIANTS. Raises ValueError for a row that is none."""
    columns = read_table(TABLE, ["ngpt", "mup", "nugpt"])
    for name, (start, changes) in VARIANTS.items():
        columns[name] = {**columns[start], **expand(changes)}

    rows = {"lr_all"}
    for tensor_class, names in TENSOR_CLASSES.items():
        rows.add(f"lr_{tensor_class}")
        for name in names:
            rows |= {f"{name}_init", f"{name}_scale"}
    for name, cells in columns.items():
        for row in cells:
            if row not in rows:
                raise ValueError(f"parametrize.py: column {name!r} sets {row!r}, which is neither "
                                 "a row nor of a class or a rescaler in TENSOR_CLASSES")
    return columns


COLUMNS = build_columns()


def value(cell, symbols):
    """The number of a cell: value("0.05 · m_d^-1/2", {"m_d": 4}) is 0.025. Raises ValueError if
    the cell cannot be read."""
    product = 1.0
    for factor in re.split("[·*]", cell):
        symbol, sign, power = factor.strip().partition("^")
        try:
            number = symbols[symbol] if symbol in symbols else float(Fraction(symbol))
            product *= number ** float(Fraction(power if sign else 1))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"cannot read {factor.strip()!r} in the cell {cell!r}: a factor is a "
                             f"number or one of {', '.join(symbols)}, with or without a power "
                             "such as ^-3/4") from None
    return product


def parametrize(column, *, width, depth, steps, base_width, base_depth, base_steps,
                batch_size=1, base_batch_size=1, alpha_init=0.05, lr_mults=None, columns=COLUMNS):
    """
    What one column of the table says of one model, as a pair:
        settings:    {"alpha_A_init": …, "s_z_scale": …, …}, of the rescalers;
        lr_factors:  {"embedding": …, "hidden": …, …}, what multiplies η, for each tensor class.
    lr_mults: {tensor class: its …_lr_mult, the last factor of its rate}; 1 for a class left out.
    Raises ValueError for an unknown column, an unknown class or a size below 1.
    """
    if column not in columns:
        raise ValueError(f"there is no parametrization {column!r}; "
                         f"the columns are {', '.join(columns)}")
    sizes = {"width": width, "depth": depth, "steps": steps, "batch_size": batch_size,
             "base_width": base_width, "base_depth": base_depth, "base_steps": base_steps,
             "base_batch_size": base_batch_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")

    symbols = {
        "m_w": width / base_width,
        "m_d": depth / base_depth,
        "m_t": steps / base_steps,
        "m_b": batch_size / base_batch_size,
        "d": width,
        "c": base_width ** -0.5,
        "α₀": alpha_init,
    }
    numbers = {row: value(cell, symbols) for row, cell in columns[column].items()}

    lr_mults = lr_mults or {}
    for tensor_class, constant in lr_mults.items():
        if tensor_class not in TENSOR_CLASSES and constant != 1:
            raise ValueError(f"{tensor_class}_lr_mult is {constant}, but TENSOR_CLASSES, "
                             f"parametrize.py, has no class {tensor_class!r}")
    lr_factors = {}
    for tensor_class in TENSOR_CLASSES:
        class_factor = numbers.get(f"lr_{tensor_class}", 1.0)
        constant = lr_mults.get(tensor_class, 1.0)
        lr_factors[tensor_class] = numbers["lr_all"] * class_factor * constant
    settings = {row: number for row, number in numbers.items() if not row.startswith("lr_")}
    return settings, lr_factors


def class_of(name):
    """The tensor class of the parameter `name`. Raises ValueError if there is none, or two."""
    parts = set(name.split("."))
    classes = [one for one, names in TENSOR_CLASSES.items() if parts & set(names)]
    if len(classes) != 1:
        found = " and ".join(classes) or "no tensor class"
        raise ValueError(f"parameter {name} is in {found}; name it in one line of TENSOR_CLASSES, "
                         "parametrize.py")
    return classes[0]


def param_groups(model, lr_factors):
    """
    Adam's parameter groups, one for each tensor class, with its "name" and its "lr_factor", and no
    weight decay. In each step set group["lr"] = group["lr_factor"] · η · schedule(step), also after
    a checkpoint was loaded. Raises ValueError as class_of does.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        tensor_class = class_of(name)
        # A fork may change the factor for one layer, which thereby gets a group of its own.
        lr_factor = lr_factors[tensor_class]
        key = (tensor_class, lr_factor)
        if key not in groups:
            groups[key] = {"params": [], "name": tensor_class, "lr_factor": lr_factor,
                           "weight_decay": 0.0}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def print_table():
    """Print the table, the variants, and why the powers are what they are."""
    print(f"{'':>16}{'ngpt':>12}{'mup':>12}{'nugpt':>12}")
    for row, cells in TABLE.items():
        print(f"{row:>16}" + "".join(f"{cell:>12}" for cell in cells))
    print("\nMore columns")
    for name, (start, changes) in VARIANTS.items():
        cells = ", ".join(f"{row} {cell}" for row, cell in changes.items())
        print(f"  {name} is {start}, but {cells}")
    print("\nWhy these powers: at the head of parametrize.py")


def print_numbers(sizes):
    """Print what each column says of one model, with α₀ = 0.05 and each …_lr_mult at 1. Raises
    ValueError as parametrize does."""
    print("Base: width {base_width}, {base_depth} blocks, {base_steps} steps, "
          "batch {base_batch_size}".format(**sizes))
    print("What multiplies η for each class, before …_lr_mult, and where the rescalers start\n")
    for name in COLUMNS:
        settings, lr_factors = parametrize(name, **sizes)
        starts = {row.removesuffix("_init"): settings[row] for row in settings if "_init" in row}
        numbers = [f"{what} {number:.4g}" for what, number in {**lr_factors, **starts}.items()]
        print(f"{name + ':':13} {', '.join(numbers)}")


def main():
    sys.stdout.reconfigure(errors="replace")            # a terminal may have no Greek letters
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends this quietly
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"parametrize.py: {message} (see --help)")
    # the paper's base: 10 layers, and a width of 10 heads of 102, here rounded from 1020 to 1024;
    # the paper does not give the base's number of steps
    defaults = {"width": 1024, "depth": 10, "steps": 10_000, "batch_size": 64}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
        parser.add_argument(f"--base_{name}", type=int, default=default, help=f"default {default}")
    sizes = vars(parser.parse_args())
    if len(sys.argv) == 1:
        print_table()
        return
    try:
        print_numbers(sizes)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
