"""
The time of a training step: the normalized Transformer beside a plain GPT of the same shape.

    python results/bench.py --width=1024 --depth=10                 any option of train.py
    python results/bench.py --base=results/laptop.json

A step is one micro-batch of random tokens. The two models take turns; times are medians. MFU is
relative to the rate of a large matrix product, which takes turns with them.
"""
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plain
import show
import train

TURNS = 10
CALLS = 4                   # of a function between two synchronizations
LARGE_STEP = 2 ** 19        # tokens of a step as large runs take it


@dataclass
class Contestant:
    """A model, what is timed of it, and the times, in seconds."""
    name: str
    forward_backward: Callable
    update: Callable
    flops: int              # of a step
    memory: str             # the model's peak on a GPU, in words
    forward_backward_times: list = field(default_factory=list)
    update_times: list = field(default_factory=list)
    product_times: list = field(default_factory=list)


def make_contestant(name, build, config, tokens, device, autocast):
    """The Contestant of a model. Raises ValueError for impossible sizes."""
    memory_before = torch.cuda.memory_allocated()       # 0 without a GPU
    model, optimizer = build(config, device)
    compiled_model = torch.compile(model) if config.compile else model

    def forward_backward():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            _, loss = compiled_model(tokens, tokens)
        loss.backward()

    def update():
        optimizer.step()
        model.normalize_weights()

    memory = ""
    if device.type == "cuda":
        forward_backward()
        update()
        peak = torch.cuda.max_memory_allocated() - memory_before
        torch.cuda.reset_peak_memory_stats()
        memory = f"; peak memory {peak / 2 ** 30:.2f} GiB"
    flops = model.flops_per_token() * tokens.numel()
    return Contestant(name, forward_backward, update, flops, memory)


def seconds(function, device):
    """Seconds a call, after one call that is not timed."""
    function()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / CALLS


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def race(names, config, tokens, product, device, autocast):
    """The Contestants of these names, with their times of TURNS turns."""
    contestants = []
    for name in names:
        if name == "plain":
            plain_config = replace(config, parametrization="gpt_sp")
            model = make_contestant(name, plain.build, plain_config, tokens, device, autocast)
        else:
            model = make_contestant(name, train.build, config, tokens, device, autocast)
        contestants.append(model)
    for _ in range(TURNS):
        for model in contestants:
            model.forward_backward_times.append(seconds(model.forward_backward, device))
            model.update_times.append(seconds(model.update, device))
            model.product_times.append(seconds(product, device))
    return contestants


def race_as_memory_allows(config, tokens, product, device, autocast):
    """The two Contestants with their times."""
    with suppress(torch.OutOfMemoryError):
        return race(["normalized", "plain"], config, tokens, product, device, autocast)
    print("both models do not fit in memory together: one after the other, which makes the ratio "
          "less exact")
    contestants = []
    for name in ("normalized", "plain"):
        contestants += race([name], config, tokens, product, device, autocast)
    return contestants


def step_seconds(contestant, micro_batches=1):
    """Seconds of a step of so many micro-batches."""
    forward_backward = statistics.median(contestant.forward_backward_times)
    return micro_batches * forward_backward + statistics.median(contestant.update_times)


def report(contestants, config, tokens, size):
    """Print the times. `size` is that of the square matrices multiplied."""
    products = [statistics.median(model.product_times) for model in contestants]
    peak = 2 * size ** 3 / statistics.median(products)      # FLOP/s
    for model in contestants:
        step = step_seconds(model)
        update = statistics.median(model.update_times)
        print(f"{model.name:>10}: step {1e3 * step:.2f} ms, "
              f"of which the update {1e3 * update:.2f}; {tokens / step:,.0f} tokens/s, "
              f"MFU {model.flops / step / peak:.1%} of {peak / 1e12:.3f} TFLOP/s, "
              f"{config.dtype}{model.memory}")
    normalized, opponent = contestants
    for step_tokens in (tokens, LARGE_STEP):
        micro_batches = step_tokens / tokens
        ratio = step_seconds(normalized, micro_batches) / step_seconds(opponent, micro_batches)
        print(f"ratio normalized/plain: {ratio:.3f} for a step of {step_tokens:,} tokens")


def main():
    parser = show.ArgumentParser("bench.py", __doc__)
    _, options = parser.parse_known_args()
    try:
        given = train.parse_args(options, plain.Config)
        config = train.load_config({"vocab_size": 50304, **given}, plain.Config)
        train.check(config)
        device, autocast = train.open_device(config)
        micro = min(config.micro_batch_size or config.batch_size, config.batch_size)
        tokens = torch.randint(config.vocab_size, (micro, config.seq_len), device=device)
        size = 8192 if device.type == "cuda" else 2048
        matrix = torch.randn(size, size, device=device, dtype=getattr(torch, config.dtype))

        def product():
            return matrix @ matrix

        contestants = race_as_memory_allows(config, tokens, product, device, autocast)
        report(contestants, config, tokens.numel(), size)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    show.prepare_terminal()
    main()
