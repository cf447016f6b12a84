"""
The learning-rate rules of normalized Transformers as one table: what changes when a model is wider, deeper or trained
longer than the base model on which the learning rate η was tuned. Rows are quantities, columns are rules.

    python parametrize.py                                           print the table
    python parametrize.py --width=4096 --depth=48 --steps=100000    the numbers of one model, in every column

m_w = width / base_width, m_d = depth / base_depth, m_t = steps / base_steps, m_b = batch_size / base_batch_size,
d = width, c = base_width^-1/2, α₀ = --alpha_init. A cell is a product of powers; "?": the paper does not settle it.
A rescaler is raw · init/scale: init is where the rescaler starts, 1/scale is how fast Adam moves it.
"""
import argparse
import re
import sys
from fractions import Fraction

TABLE = """
                | ngpt   | mup       | depth_mup          | nugpt_full | nugpt_none | nugpt     | what it sets
lr              | 1      | m_t^-1/3  | m_t^-1/3           | m_t^-1/3   | m_t^-1/3   | m_t^-1/3  | η of all tensors ×
lr_embedding    | 1      | m_w^-1/2  | m_w^-1/2           | m_w^-1/2   | m_w^-1/2   | m_w^-1/2  |   embedding E_in ×
lr_hidden       | 1      | m_w^-1    | m_w^-3/4?·m_d^-1/2 | m_w^-1     | m_w^-1/2   | m_w^-3/4  |   block matrices ×
lr_unembedding  | 1      | m_w^-1/2  | m_w^-3/4?          | m_w^-1     | m_w^-1/2   | m_w^-3/4  |   unembedding E_out ×
lr_rescalers    | 1      | 1         | 1                  | 1          | 1          | 1         |   rescalers ×
embedding_mult  | 1      | 1         | 1                  | 1          | 1          | 1         | E_in ×, base constant
unembedding_mult| 1      | 1/2       | 1/2                | 1/2        | 1/2        | 1/2       | E_out ×, base constant
alpha_init      | α₀     | α₀·m_d^-1 | α₀·m_d^-1/2        | α₀·m_d^-1  | α₀·m_d^-1  | α₀·m_d^-1 | eigen learning rates
alpha_scale     | d^-1/2 | c         | c                  | c          | c          | c         |
qk_init         | 1      | 1         | 1                  | 1          | 1          | 1         | s_qk
qk_scale        | d^-1/2 | c         | c                  | c          | c          | c         |
mlp_init        | 1      | 1         | 1                  | 1          | 1          | 1         | s_u, s_ν
mlp_scale       | 1      | 1         | 1                  | 1          | 1          | 1         |
logit_init      | 1      | 1         | m_w^1/2?           | m_w^1/2    | m_w^1/2    | m_w^1/2   | s_z
logit_scale     | d^-1/2 | c         | c                  | c          | c          | c         |
"""

# Your own column is one line: its start, and the cells it changes. Rename an edited column: results know its name.
OWN = {
    "measured": ("nugpt", dict(lr_hidden="m_w^-0.86", lr_unembedding="m_w^-0.83")),     # of results/alignment.csv
    "nugpt_batch": ("nugpt", dict(lr="m_b^1/6·m_t^-1/3")),  # √batch at equal tokens; see results/batch_tokens.csv
}

NOTES = """\
  ngpt        nGPT as published (arXiv:2410.01131): one η for all tensors, rescaler scales that follow the width.
  nugpt       νGPT (arXiv:2604.27077). -3/4 is the alignment that the paper measured, between none (-1/2, nugpt_none)
              and full (-1, nugpt_full). The column `measured` has the alignment of results/alignment.csv instead.
  mup         the paper's μP for widths. The paper states the power of m_t; a lemma gives the other cells.
  depth_mup   the counter-example: m_d^-1/2 on the hidden rate breaks transfer over depth (section 4.5).
  lr          m_t^-1/3 is a fit, not a theorem (section 4.6). It fits cosine and linear; wsd wants about -1/2.
  *_mult      tuned on the base model (sections 3.1, 7.4), by --embedding_lr_mult and --unembedding_lr_mult. With
              one value for all columns, all columns are the same model and optimizer at the base size.
  logit_init  m_w^1/2 is missing from the paper's list of rules, but Lemma 6.8 and section 7.5 need it.
  ?           depth_mup's power of width, unembedding and s_z are νGPT's, so only the rules for depth differ.
"""

# The opponent, model.PlainGPT, and its μP (arXiv:2203.03466 table 3): E_out's std and rate carry the output multiplier.
PLAIN_TABLE = """
                | gpt_sp | gpt_mup    | what it sets; train with --weight_decay=0.1 --warmup_steps=…
lr              | 1      | 1          | η of all tensors, times
lr_embedding    | 1      | 1          |   for the embedding
lr_hidden       | 1      | m_w^-1     |   for the blocks' matrices
lr_unembedding  | 1      | m_w^-1     |   for the unembedding
embedding_mult  | 1      | 1          | and these; tuned at the base
unembedding_mult| 1      | 1          |
embedding_std   | 1      | 1          | initial standard deviation of the embedding
hidden_std      | d^-1/2 | d^-1/2     |   of the blocks' matrices (output matrices: × (2 · depth)^-1/2)
unembedding_std | d^-1/2 | c · m_w^-1 |   of the unembedding
"""

TENSOR_CLASSES = {      # class: its parameters' names in model.py
    "embedding": r"embedding",
    "hidden": r"blocks\.\d+\.\w+",
    "unembedding": r"unembedding",
    "rescalers": r".*\.raw",
}
BASE_WIDTH, BASE_DEPTH, BASE_STEPS, BASE_BATCH, ALPHA_INIT = 1024, 10, 10_000, 64, 0.05     # train.py's defaults, too


def read_table(text):
    """A table as {column: {row: cell}}. Leaves with a sentence for a row with too many or too few cells."""
    (_, *names, _), *rows = ([cell.strip() for cell in line.split("|")] for line in text.strip("\n").splitlines())
    for row, *cells in rows:
        if len(cells) != len(names) + 1:
            sys.exit(f"parametrize.py: row {row!r} has {len(cells) - 1} cells, but there are {len(names)} columns")
    return {name: {row: cells[i] for row, *cells in rows} for i, name in enumerate(names)}


COLUMNS = read_table(TABLE) | read_table(PLAIN_TABLE)
for name, (start, cells) in OWN.items():
    if start not in COLUMNS or not cells.keys() <= COLUMNS[start].keys():
        sys.exit(f"parametrize.py: your column {name!r} must start from one of {', '.join(COLUMNS)}, and change "
                 f"some of {', '.join(COLUMNS.get(start, COLUMNS['nugpt']))}")
    COLUMNS[name] = {**COLUMNS[start], **cells}


def value(cell, **symbols):
    """The number of a cell: value("0.05 · m_d^-1/2", m_d=4) = 0.025. Raises ValueError if the cell cannot be read."""
    product = 1.0
    for factor in re.split("[·*]", cell.replace("?", "")):
        base, _, power = factor.strip().partition("^")
        try:
            product *= (symbols[base] if base in symbols else float(Fraction(base))) ** float(Fraction(power or 1))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"cannot read {factor.strip()!r} in the cell {cell!r}: a factor is a number or one of "
                             f"{', '.join(symbols)}, with or without a power such as ^-3/4") from None
    return product


def parametrize(parametrization, width, depth, steps, base_width=BASE_WIDTH, base_depth=BASE_DEPTH,
                base_steps=BASE_STEPS, batch_size=BASE_BATCH, base_batch_size=BASE_BATCH, alpha_init=ALPHA_INIT,
                embedding_lr_mult=-1, hidden_lr_mult=1, unembedding_lr_mult=-1, rescalers_lr_mult=1):
    """
    One column of the table for one model, as a pair:
        initial:   {"alpha_init": …, "alpha_scale": …, …}, keywords of model.GPTConfig;
        lr_scale:  {"embedding": …, "hidden": …, "unembedding": …, "rescalers": …}, what to multiply η by.
    A *_lr_mult multiplies the rate of one tensor class; -1 stands for the table's row.
    Raises ValueError for an unknown column or a size below 1.
    """
    if (smallest := min(width, depth, steps, batch_size, base_width, base_depth, base_steps, base_batch_size)) < 1:
        raise ValueError(f"width, depth, steps, batch_size and those of the base must be at least 1, not {smallest}")
    if parametrization not in COLUMNS:
        raise ValueError(f"there is no parametrization {parametrization!r}; the columns are {', '.join(COLUMNS)}")
    symbols = {"m_w": width / base_width, "m_d": depth / base_depth, "m_t": steps / base_steps, "d": width,
               "m_b": batch_size / base_batch_size, "c": base_width ** -0.5, "α₀": alpha_init}
    numbers = {row: value(cell, **symbols) for row, cell in COLUMNS[parametrization].items()}
    # by name: a class that is added anywhere in TENSOR_CLASSES has the table's constant, or 1
    mults = dict(embedding=embedding_lr_mult, hidden=hidden_lr_mult, unembedding=unembedding_lr_mult,
                 rescalers=rescalers_lr_mult)
    lr_scale = {}
    for key in TENSOR_CLASSES:
        if "lr_" + key in numbers:
            mult = mults.get(key, -1)
            if mult == -1:
                mult = numbers.get(key + "_mult", 1)
            lr_scale[key] = numbers["lr"] * numbers["lr_" + key] * mult
    return {row: number for row, number in numbers.items() if row.endswith(("_init", "_scale", "_std"))}, lr_scale


def param_groups(model, lr_scale):
    """
    Adam's parameter groups, one a tensor class, each with its "lr_scale": set group["lr"] = group["lr_scale"] · η.
    Raises ValueError if a parameter of the model belongs to no class or to more than one.
    """
    groups = {tensors: dict(params=[], name=tensors, lr_scale=scale) for tensors, scale in lr_scale.items()}
    for name, parameter in model.named_parameters():
        classes = [tensors for tensors, pattern in TENSOR_CLASSES.items() if re.fullmatch(pattern, name)]
        if len(classes) != 1:
            raise ValueError(f"parameter {name} is in {' and '.join(classes) or 'no tensor class'}; name it in one "
                             "pattern of TENSOR_CLASSES in parametrize.py")
        groups[classes[0]]["params"].append(parameter)
    return list(groups.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"parametrize.py: {message} (see --help)")
    for key, default in dict(width=BASE_WIDTH, depth=BASE_DEPTH, steps=BASE_STEPS, batch_size=BASE_BATCH).items():
        for option in (f"--{key}", f"--base_{key}"):
            parser.add_argument(option, type=int, default=default, help=f"default {default}")
    args = vars(parser.parse_args())
    if len(sys.argv) == 1:
        print(TABLE.strip("\n"), NOTES, PLAIN_TABLE, sep="\n", end="")
        for name, (start, cells) in OWN.items():
            print(f"\n{name}: {start}, but {', '.join(map(' '.join, cells.items()))}")
        return
    try:
        columns = {name: parametrize(name, **args) for name in COLUMNS}
    except ValueError as error:
        parser.error(error)
    print(f"{'':>18}" + "".join(f"{name:>12}" for name in columns))
    for part, prefix in ((1, "η × "), (0, "")):
        for row in dict.fromkeys(row for column in columns.values() for row in column[part]):
            cells = [f"{column[part][row]:.4g}" if row in column[part] else "-" for column in columns.values()]
            print(f"{prefix + row:>18}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
