"""
The learning-rate rules of normalized Transformers as one table: what changes when a model is wider,
deeper or trained longer than the base, the small model on which the learning rate η was tuned.
Rows are quantities, columns are rules. "The paper" is arXiv:2604.27077 here.

    python parametrize.py                                           print the table
    python parametrize.py --width=4096 --depth=48 --steps=100000    the numbers of one model

    rate of a tensor = η · schedule(step) · lr_all · lr_<its class> · <its class>_lr_mult

The last factor is an option of train.py: see "Constants" below. A rescaler is raw · init/scale, and
raw starts at scale. Adam moves raw by about the rate a step, and thereby the rescaler by about
init · rate/scale: a smaller scale makes it faster.

m_w = width / base_width, m_d = depth / base_depth, m_t = steps / base_steps,
m_b = batch_size / base_batch_size, d = width, c = (base_width)^-1/2, α₀ = train.py's --alpha_init.
A cell is a product of powers.
"""
import argparse
import re
import signal
import sys
from fractions import Fraction

TABLE = """
               | ngpt   | mup       | nugpt     | what it sets
lr_all         | 1      | m_t^-1/3  | m_t^-1/3  | multiplies η for every tensor
lr_embedding   | 1      | m_w^-1/2  | m_w^-1/2  | ... once more for the embedding E_in
lr_hidden      | 1      | m_w^-1    | m_w^-3/4  | ... once more for the blocks' matrices
lr_unembedding | 1      | m_w^-1/2  | m_w^-3/4  | ... once more for the unembedding E_out
alpha_init     | α₀     | α₀·m_d^-1 | α₀·m_d^-1 | init of α_A and α_M
s_z_init       | 1      | 1         | m_w^1/2   | init of s_z
scale          | d^-1/2 | c         | c         | scale of α_A, α_M, s_qk and s_z
"""

# Two rows of the table stand for several settings of model.GPTConfig.
SHARED_ROWS = {
    "alpha_init": ["alpha_A_init", "alpha_M_init"],
    "scale": ["alpha_A_scale", "alpha_M_scale", "s_qk_scale", "s_z_scale"],
}

# More columns, each a line: the column it starts from, and the cells that differ. Yours is such a
# line. A line may set any row of the table, the settings in SHARED_ROWS one by one, and also
# lr_rescalers, s_qk_init, s_u_init, s_u_scale, s_nu_init and s_nu_scale, which are 1 if no line
# sets them. In a cell * may stand for ·. Give a column that you edit a new name: a table of results
# records the name alone, and would mix runs of the old and the new cells.
VARIANTS = {
    # the two ends between which the paper's -3/4 lies: see "Why these powers"
    "nugpt_full": ("nugpt", {"lr_hidden": "m_w^-1", "lr_unembedding": "m_w^-1"}),
    "nugpt_none": ("nugpt", {"lr_hidden": "m_w^-1/2", "lr_unembedding": "m_w^-1/2"}),
    # the paper's counter-example, the usual μP over depth: α and the blocks' rate with m_d^-1/2. In
    # the paper its best η drifts to the right with depth (section 4.5), and on our small models,
    # too, by 0.07 octaves a doubling (results/depth.csv). The paper does not settle its powers of
    # m_w. Here they are nugpt's, so that only depth differs.
    "depth_mup": ("nugpt", {"lr_hidden": "m_w^-3/4 · m_d^-1/2", "alpha_init": "α₀·m_d^-1/2"}),
    # ours: 1/6 is chosen so that at an equal number of tokens, where m_t is 1/m_b, lr_all is
    # m_b^1/2, the square-root rule
    "nugpt_batch": ("nugpt", {"lr_all": "m_b^1/6 · m_t^-1/3"}),
}

REASONS = """
Why these powers. (The paper is arXiv:2604.27077.)
  A step shall change W h by the same fraction at every width d. W is W_q, say. h and the rows of W
  are unit vectors, and stay so: hence the entries of h, W and W h are about d^-1/2. Adam changes
  each entry of W by about the learning rate, whatever the gradient's size. An entry of W h is a
  sum, which thereby changes by d products of about rate · d^-1/2.
    If these changes have nothing to do with h, their signs are random, and they add up to about
    √d · rate · d^-1/2 = rate. This shall be d^-1/2, as W h is: so the rate must fall as d^-1/2.
    If they are all aligned with h, they add up to d · rate · d^-1/2 = √d · rate. This shall be
    d^-1/2, too: so the rate must fall as d^-1.
  Relative to the base: m_w^-1/2 without alignment (nugpt_none), m_w^-1 with full alignment
  (nugpt_full). arXiv:2407.05872. The paper measured between, and takes m_w^-3/4 (nugpt).
  W_u and W_nu are as W_q. The inputs of W_O and W_oMLP are no unit vectors. But Norm follows both
  matrices, so that only the fraction counts by which their output changes. The powers are the
  same, since the MLP's width, over which W_oMLP sums, grows as d.
  A row of the embedding is a hidden state: its entries are d^-1/2, and nothing is summed: m_w^-1/2.
  The logits E_out h are products of unit vectors and shrink as d^-1/2: s_z starts at m_w^1/2.
  mup assumes full alignment, too, though its power for E_out is -1/2. With full alignment a step
  changes a logit by s_z · √d · rate. Relative to the base this is
    nugpt_full   m_w^1/2 · m_w^1/2 · m_w^-1    = 1
    mup          1       · m_w^1/2 · m_w^-1/2  = 1, since its s_z starts at 1
    nugpt        m_w^1/2 · m_w^1/2 · m_w^-3/4  = m_w^1/4
  So mup's logits start smaller in wide models, but learn as fast. nugpt's change is too much unless
  alignment is less than full.
  A block moves h by a step of size α on the sphere. If the blocks' steps agree, they add up as
  their number: α₀·m_d^-1 keeps the sum. What the matrices learn acts through the same steps, so
  their rates need no factor of depth. mup and nugpt have this rule in common.
  The usual μP over depth (depth_mup) takes the steps as unrelated: they add up as a root, and α is
  α₀·m_d^-1/2. What is learned agrees all the same and would add up to m_d · m_d^-1/2 = m_d^1/2; the
  factor m_d^-1/2 of lr_hidden takes that back. So this count finds both rules equally good, and
  only experiments tell. In those of the paper depth_mup's best η drifts to the right (section 4.5).
  A rescaler moves by about init · rate/scale a step. With nGPT's scale d^-1/2 it moves the faster,
  the wider the model is, though the rate is the same; with c it moves as fast as in the base.
Where the cells come from.
  ngpt      arXiv:2410.01131: no rule for rates; scales that follow the width. nGPT as published has
            each …_lr_mult at 1.
  mup       the paper's "μP for widths". Its text gives the power of m_t, a lemma the rest.
  nugpt     the paper's νGPT. m_t^-1/3 is a fit, not a theorem (section 4.6). It fits the schedules
            cosine and linear; wsd wants about -1/2, for which a column may set lr_all.
  s_z_init  m_w^1/2 is our reading: the paper's list of rules lacks it, but Lemma 6.8 and section
            7.5 need it.
Constants.
  The options …_lr_mult, one for each class of tensors, and --alpha_init belong to the base and are
  tuned there with η. The paper has unembedding_lr_mult = 1/2, 1 for the others, and alpha_init =
  0.05 (sections 3.1 and 7.4), train.py's defaults; results/laptop.json has its own. They hold for
  all columns, so that at the base size all columns are one model and one optimizer, bit for bit.
"""

# Each parameter of model.py belongs to one class, which has a learning rate of its own.
# A class is a list of names. A parameter belongs to it if one of the parts of its own name, between
# the dots, is in the list: blocks.3.W_q is hidden, since W_q is. For a class without a row
# lr_<class> that factor is 1.
TENSOR_CLASSES = {
    "embedding": ["embedding"],
    "hidden": ["W_q", "W_k", "W_v", "W_O", "W_u", "W_nu", "W_oMLP"],
    "unembedding": ["unembedding"],
    "rescalers": ["s_qk", "s_u", "s_nu", "s_z", "alpha_A", "alpha_M"],
}


def read_table(text):
    """A table as {column: {row: cell}}. Leaves with a sentence if a row has not as many cells as
    there are columns."""
    head, *rows = text.strip("\n").splitlines()
    names = [name.strip() for name in head.split("|")[1:-1]]
    columns = {name: {} for name in names}
    for line in rows:
        row, *cells, what_it_sets = [cell.strip() for cell in line.split("|")]
        if len(cells) != len(names):
            sys.exit(f"parametrize.py: row {row!r} has {len(cells)} cells, "
                     f"but there are {len(names)} columns")
        for name, cell in zip(names, cells):
            columns[name][row] = cell
    return columns


def expand(cells):
    """Cells with each row of SHARED_ROWS replaced by the settings that it stands for."""
    expanded = {}
    for row, cell in cells.items():
        for name in SHARED_ROWS.get(row, [row]):
            expanded[name] = cell
    return expanded


def build_columns(table, variants):
    """All columns, {column: {row or setting: cell}}. Leaves with a sentence if one cannot be."""
    columns = {name: expand(cells) for name, cells in read_table(table).items()}
    may_set = {*columns["nugpt"], "s_qk_init", "s_u_init", "s_u_scale", "s_nu_init", "s_nu_scale"}
    may_set |= {f"lr_{tensor_class}" for tensor_class in TENSOR_CLASSES}
    for name, (start, cells) in variants.items():
        if start not in columns:
            sys.exit(f"parametrize.py: the column {name!r} must start from one of "
                     f"{', '.join(columns)}")
        for row in expand(cells):
            if row not in may_set:
                sys.exit(f"parametrize.py: the column {name!r} sets {row!r}, which is no row")
        columns[name] = {**columns[start], **expand(cells)}
    for name, cells in columns.items():
        for row in cells:
            is_rate_of_a_class = row.startswith("lr_") and row != "lr_all"
            tensor_class = row.removeprefix("lr_")
            if is_rate_of_a_class and tensor_class not in TENSOR_CLASSES:
                sys.exit(f"parametrize.py: the column {name!r} sets {row!r}, but TENSOR_CLASSES "
                         f"has no class {tensor_class!r}")
    return columns


COLUMNS = build_columns(TABLE, VARIANTS)


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


def parametrize(parametrization, *, width, depth, steps, batch_size,
                base_width, base_depth, base_steps, base_batch_size,
                alpha_init=0.05, lr_mults=None, columns=COLUMNS):
    """
    What one column of the table says of one model, as a pair:
        settings:    {"alpha_A_init": …, "s_z_scale": …, …}, keywords of model.GPTConfig;
        lr_factors:  {"embedding": …, "hidden": …, …}, what multiplies η, for each tensor class.
    lr_mults: {tensor class: its …_lr_mult, the last factor of its rate}; 1 for a class left out.
    Raises ValueError for an unknown column, an unknown class or a size below 1.
    """
    if parametrization not in columns:
        raise ValueError(f"there is no parametrization {parametrization!r}; "
                         f"the columns are {', '.join(columns)}")
    sizes = dict(width=width, depth=depth, steps=steps, batch_size=batch_size,
                 base_width=base_width, base_depth=base_depth, base_steps=base_steps,
                 base_batch_size=base_batch_size)
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
    numbers = {}
    for row, cell in columns[parametrization].items():
        try:
            numbers[row] = value(cell, symbols)
        except ValueError as error:
            raise ValueError(f"column {parametrization!r}, row {row!r}: {error}") from None

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
    classes = []
    for tensor_class, names in TENSOR_CLASSES.items():
        if set(names) & set(name.split(".")):
            classes.append(tensor_class)
    if len(classes) != 1:
        found = " and ".join(classes) or "no tensor class"
        raise ValueError(f"parameter {name} is in {found}; name it in one line of TENSOR_CLASSES, "
                         "parametrize.py")
    return classes[0]


def param_groups(model, lr_factors):
    """
    Adam's parameter groups, one for each tensor class, with its "name" and its "lr_factor".
    Set group["lr"] = group["lr_factor"] · η · schedule(step). Raises ValueError as class_of does.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        tensor_class = class_of(name)
        # A fork may change the factor for one layer, which thereby gets a group of its own.
        lr_factor = lr_factors[tensor_class]
        key = (tensor_class, lr_factor)
        if key not in groups:
            groups[key] = {"params": [], "name": tensor_class, "lr_factor": lr_factor}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def print_table():
    print(TABLE.strip("\n"))
    print("\nMore columns")
    for name, (start, cells) in VARIANTS.items():
        changes = ", ".join(f"{row} {cell}" for row, cell in cells.items())
        print(f"  {name} is {start}, but {changes}")
    print(REASONS, end="")


def print_numbers(sizes):
    """Print what each column says of one model, with α₀ = 0.05 and each …_lr_mult at 1. Raises
    ValueError as parametrize does."""
    settings = {}
    lr_factors = {}
    for name in COLUMNS:
        settings[name], lr_factors[name] = parametrize(name, **sizes)
    print("Base: width {base_width}, {base_depth} blocks, {base_steps} steps, "
          "batch {base_batch_size}".format(**sizes))
    print("Factors of η, with each …_lr_mult at 1, and settings, with α₀ = 0.05\n")
    widths = {name: max(11, len(name)) + 1 for name in COLUMNS}
    print(f"{'':>18}" + "".join(f"{name:>{widths[name]}}" for name in COLUMNS))
    for part, prefix in ((lr_factors, "η × "), (settings, "")):
        rows = dict.fromkeys(row for name in COLUMNS for row in part[name])
        for row in rows:
            cells = "".join(f"{part[name].get(row, 1):{widths[name]}.4g}" for name in COLUMNS)
            print(f"{prefix + row:>18}{cells}")


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
