"""Times a training step of the normalized Transformer beside one of the plain GPT of the same shape, taking turns.

    python results/bench.py --width=1024 [any option of train.py]

A step is one micro-batch of random tokens. Times are medians; MFU is relative to the rate of a large matrix product."""
import statistics, sys, time
from dataclasses import replace
from pathlib import Path

import torch
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

TURNS, CALLS, LARGE_STEP = 10, 4, 2 ** 19       # turns; calls between two synchronizations; tokens of a large step

def seconds(function, device):
    """Seconds a call, from CALLS calls between two synchronizations, after one that is not timed."""
    for calls in (1, CALLS):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        getattr(torch, device.type).synchronize()
    return (time.perf_counter() - start) / CALLS

def contestant(config, tokens, device, autocast):
    """(forward with backward, and update, as functions to time; FLOPs of a step; memory as text) of a model."""
    before = torch.cuda.memory_allocated()      # 0 without a GPU
    model, optimizer = train.build(config, device)
    forward, normalize_weights = train.maybe_compile(model, config)
    def forward_backward():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(tokens, tokens)[1]
        loss.backward()
    def update():
        optimizer.step()
        normalize_weights()
    if device.type == "cuda":
        forward_backward()
        update()
        memory = f"peak memory {(torch.cuda.max_memory_allocated() - before) / 2 ** 30:.2f} GiB"
        torch.cuda.reset_peak_memory_stats()
    else:       # what a second batch adds, so that weights do not count; a storage that is kept twice counts once
        block, sizes = torch.compile(model.blocks[0], dynamic=False, disable=not config.compile), []
        for batches in (1, 2):
            kept, h = [], model.embedding[tokens].repeat(batches, 1, 1)
            with autocast, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
                block(h, model.rope)
            sizes.append(sum({s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, kept)}.values()))
        kept = (sizes[1] - sizes[0]) / tokens.numel() / config.width
        memory = f"{kept:.1f}·d bytes a token and block kept for backward"
    return forward_backward, update, model.flops_per_token() * tokens.numel(), memory

def main():
    config = train.Config(**{"vocab_size": 50304, **train.parse_args(sys.argv[1:])[0]})
    train.check(config)
    device, autocast = train.open_device(config)
    shape = min(config.micro_batch_size or config.batch_size, config.batch_size), config.seq_len
    tokens, n = torch.randint(config.vocab_size, shape, device=device), 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, config.dtype))
    def race(*names):       # a result a model: seconds of its two functions and of the product, FLOPs, memory
        models = [contestant(replace(config, parametrization=name), tokens, device, autocast) for name in names]
        turns = [[[seconds(part, device) for part in (*model[:2], lambda: a @ a)] for model in models]
                 for _ in range(TURNS)]
        return [(*map(statistics.median, zip(*times)), *model[2:]) for times, model in zip(zip(*turns), models)]
    results, names = [], (config.parametrization, "gpt_sp")
    try:
        results = race(*names)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    except torch.OutOfMemoryError:      # its memory is free behind this clause
        print("both models do not fit in memory together: one after the other, which makes the ratio less exact")
    results = results or [race(name)[0] for name in names]
    peak = 2 * n ** 3 / statistics.median(result[2] for result in results)      # FLOP/s
    for name, (forward_backward, update, _, flops, memory) in zip(("normalized", "plain"), results):
        step, rate = forward_backward + update, tokens.numel() / (forward_backward + update)
        print(f"{name:>10}: step {1e3 * step:.2f} ms, of which the update {1e3 * update:.2f}; {rate:,.0f} tokens/s, "
              f"MFU {flops / step / peak:.1%} of {peak / 1e12:.3f} TFLOP/s, {config.dtype}; {memory}")
    for size in (tokens.numel(), LARGE_STEP):
        normalized, plain = (result[0] * size / tokens.numel() + result[1] for result in results)
        print(f"ratio normalized/plain: {normalized / plain:.3f} for a step of {size:,} tokens")

if __name__ == "__main__":
    main()
