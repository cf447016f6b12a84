"""
The learning-rate rules of normalized Transformers as one table: what changes when a model is made wider, deeper, or is
trained for longer than the base model on which the learning rate η was tuned. Rows are quantities, columns rules.

    python parametrize.py                                           print the table
    python parametrize.py --width=4096 --depth=48 --steps=100000    that model's actual numbers in every column

m_w = width / base_width, m_d = depth / base_depth, m_t = steps / base_steps (steps at a fixed batch size), d = width,
c = base_width^-1/2. A cell is a product of powers. "?" marks what the paper does not settle: see the notes below.
"""
import argparse
import re
import sys
from fractions import Fraction

TABLE = """
                | ngpt    | mup          | depth_mup               | nugpt_full   | nugpt_none   | nugpt        | what it sets
lr              | 1       | m_t^-1/3     | m_t^-1/3                | m_t^-1/3     | m_t^-1/3     | m_t^-1/3     | η of all tensors, times, for the
lr_embedding    | 1       | m_w^-1/2     | m_w^-1/2                | m_w^-1/2     | m_w^-1/2     | m_w^-1/2     |   embedding E_in
lr_hidden       | 1       | m_w^-1       | m_w^-3/4 ? · m_d^-1/2   | m_w^-1       | m_w^-1/2     | m_w^-3/4     |   matrices of the blocks
lr_unembedding  | 1       | m_w^-1/2     | m_w^-3/4 ?              | m_w^-1       | m_w^-1/2     | m_w^-3/4     |   unembedding E_out
 × at the base  | 1       | 1/2          | 1/2                     | 1/2          | 1/2          | 1/2          |     and this; tuned at the base
lr_rescalers    | 1       | 1            | 1                       | 1            | 1            | 1            |   rescalers (all rows below)
alpha_init      | 0.05    | 0.05 · m_d^-1| 0.05 · m_d^-1/2         | 0.05 · m_d^-1| 0.05 · m_d^-1| 0.05 · m_d^-1|   α_A, α_M: the eigen learning rates
alpha_scale     | d^-1/2  | c            | c                       | c            | c            | c            |          (a rescaler is raw · init/scale:
qk_init         | 1       | 1            | 1                       | 1            | 1            | 1            |   s_qk   init is where it starts,
qk_scale        | d^-1/2  | c            | c                       | c            | c            | c            |          1/scale how fast it goes)
mlp_init        | 1       | 1            | 1                       | 1            | 1            | 1            |   s_u, s_ν
mlp_scale       | 1       | 1            | 1                       | 1            | 1            | 1            |
logit_init      | 1       | 1            | m_w^1/2 ?               | m_w^1/2      | m_w^1/2      | m_w^1/2      |   s_z
logit_scale     | d^-1/2  | c            | c                       | c            | c            | c            |
"""

# Your own column: the column it starts from, and the cells it changes. One line here, and every script knows it.
OWN = {
    # "mine": ("nugpt", dict(lr_hidden="m_w^-0.85", lr_unembedding="m_w^-0.85")),
}

NOTES = """
  ngpt        nGPT as published (arXiv:2410.01131): one η for everything, rescaler scales that follow the width.
  nugpt       νGPT (arXiv:2604.27077). The hidden and unembedding exponents, -3/4, are its measured alignment between no
              alignment (-1/2, nugpt_none) and full alignment (-1, nugpt_full).
  mup         the paper's μP for widths ("CompleteP"). Its m_t power is stated there, the other cells follow from a lemma.
  depth_mup   the counter-example: its m_d^-1/2 on the hidden rate breaks transfer over depth (section 4.5 there).
  s_z         logit_init ∝ m_w^1/2 is missing from the paper's list of rules, but Lemma 6.8 and section 7.5 there need it.
  lr          m_t^-1/3 is a fit, not a theorem (section 4.6 there). It may depend on the schedule.
  ?           depth_mup's power of the width, its unembedding and its s_z: the public text does not settle them. Here they
              are νGPT's, so that the column differs from nugpt in the rules for depth alone.
  × at the base: one number tuned at the base and kept (--unembedding_lr_mult). To compare columns, give all the same.
  The paper's base is width 1020, depth 10, c = 0.03; its number of base steps is not given. At the base size, with one
  × for all, the columns are the same model and the same optimizer.
"""

TENSOR_CLASSES = {      # class: its parameters' names in model.py; param_groups checks that each parameter is in just one
    "embedding": r"embedding",
    "hidden": r"blocks\.\d+\.(qkv|attn_out|mlp_in|mlp_out)",
    "unembedding": r"unembedding",
    "rescalers": r"(.*\.)?(s_qk|s_u|s_v|s_z|attn_alpha|mlp_alpha)\.raw",
}


def read_table():
    """TABLE and OWN as {column: {row: cell}}. Raises ValueError for a row with too many or too few cells."""
    (_, *names, _), *rows = ([cell.strip() for cell in line.split("|")] for line in TABLE.strip("\n").splitlines())
    for row, *cells in rows:
        if len(cells) != len(names) + 1:
            raise ValueError(f"row {row!r} of TABLE has {len(cells) - 1} cells, but there are {len(names)} columns")
    table = {name: {row: cells[i] for row, *cells in rows} for i, name in enumerate(names)}
    for name, (start, changes) in OWN.items():
        if start not in table or not changes.keys() <= table[start].keys():
            raise ValueError(f"OWN[{name!r}] must start from one of {', '.join(table)}, and change some of the rows "
                             f"{', '.join(table[names[0]])}")
        table[name] = {**table[start], **changes}
    return table


COLUMNS = read_table()


def value(cell, **symbols):
    """The number a cell stands for: value("0.05 · m_d^-1/2", m_d=4) = 0.025. Raises ValueError if it cannot be read."""
    product = 1.0
    for factor in re.split("[·*]", cell.replace("?", "")):
        base, _, power = factor.strip().partition("^")
        try:
            product *= (symbols[base] if base in symbols else float(Fraction(base))) ** float(Fraction(power or 1))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"cannot read the factor {factor.strip()!r} of the cell {cell!r}: it must be a number or one "
                             f"of {', '.join(symbols)}, with or without a power such as ^-3/4") from None
    return product


def parametrize(name, width, depth, steps, base_width=1024, base_depth=10, base_steps=10_000,
                embedding_lr_mult=1.0, unembedding_lr_mult=None):
    """
    Column `name` for one model. Returns
        rescalers: {"alpha_init": …, "alpha_scale": …, …}, keywords of model.GPTConfig;
        lr_scale:  {"embedding": …, "hidden": …, "unembedding": …, "rescalers": …}, what to multiply η by.
    embedding_lr_mult multiplies the embedding's rate; unembedding_lr_mult takes the place of the row "× at the base".
    Raises ValueError for an unknown column or a size below 1.
    """
    sizes = dict(width=width, depth=depth, steps=steps, base_width=base_width, base_depth=base_depth, base_steps=base_steps)
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key} must be at least 1, not {size}")
    if name not in COLUMNS:
        raise ValueError(f"there is no parametrization {name!r}; the columns are {', '.join(COLUMNS)}")
    symbols = dict(m_w=width / base_width, m_d=depth / base_depth, m_t=steps / base_steps, d=width, c=base_width ** -0.5)
    numbers = {row: value(cell, **symbols) for row, cell in COLUMNS[name].items()}
    tuned = numbers.pop("× at the base") if unembedding_lr_mult is None else unembedding_lr_mult
    lr_scale = {tensors: numbers["lr"] * numbers["lr_" + tensors] for tensors in TENSOR_CLASSES}
    lr_scale["embedding"] *= embedding_lr_mult
    lr_scale["unembedding"] *= tuned
    return {row: number for row, number in numbers.items() if row.endswith(("_init", "_scale"))}, lr_scale


def param_groups(model, lr_scale):
    """
    Adam's parameter groups, one a tensor class, each with its "lr_scale": set group["lr"] = group["lr_scale"] · η.
    Raises ValueError if a parameter of the model belongs to no class or to more than one.
    """
    groups = {tensors: dict(params=[], name=tensors, lr_scale=scale) for tensors, scale in lr_scale.items()}
    for name, parameter in model.named_parameters():
        classes = [tensors for tensors, pattern in TENSOR_CLASSES.items() if re.fullmatch(pattern, name)]
        if len(classes) != 1:
            raise ValueError(f"parameter {name} must be in one of TENSOR_CLASSES, but is in {' and '.join(classes) or 'none'}")
        groups[classes[0]]["params"].append(parameter)
    return list(groups.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"parametrize.py: {message} (see --help)")
    sizes = dict(width=1024, depth=10, steps=10_000, base_width=1024, base_depth=10, base_steps=10_000)
    for key, default in sizes.items():
        parser.add_argument(f"--{key}", type=int, default=default, help=f"default {default}")
    args = vars(parser.parse_args())
    if len(sys.argv) == 1:
        print(TABLE.strip("\n") + "\n" + NOTES.rstrip())
        return
    try:
        columns = {name: parametrize(name, **args) for name in COLUMNS}
    except ValueError as error:
        parser.error(error)
    print(", ".join(f"{key} {args[key]:,}" for key in sizes))
    print(f"{'':>18}" + "".join(f"{name:>12}" for name in columns))
    for part, prefix in ((1, "η × "), (0, "")):
        for row in columns["ngpt"][part]:
            print(f"{prefix + row:>18}" + "".join(f"{columns[name][part][row]:>12.4g}" for name in columns))


if __name__ == "__main__":
    main()
