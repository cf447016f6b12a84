"""
What normalization costs: a training step of the normalized Transformer beside one of the plain GPT of the same shape.

    python results/bench.py --width=1024 [any option of train.py]

A step is one micro-batch of random tokens: forward, backward, Adam and normalization of the weights. The models take
turns of several steps between two synchronizations; times are medians. MFU is relative to the rate of a
large matrix product.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

TURNS, GROUP, LARGE_STEP = 10, 4, 2 ** 19       # turns of a model, steps in a turn; tokens of a large step


def seconds(function, device):
    """Seconds of one call of a function, from GROUP calls between two synchronizations, after one that is not timed."""
    stamps = []
    for calls in (1, GROUP):
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    return (stamps[1] - stamps[0]) / GROUP


def kept_for_backward(block, model, tokens, autocast):
    """Bytes a token that a block keeps for backward. What a larger batch does not enlarge, as weights, is left out."""
    sizes = []
    for batch in (tokens[:1], tokens[:1].repeat(2, 1)):
        storages = {}       # by address: each counts once

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        h = torch.nn.functional.embedding(batch, model.embedding)
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = block(h, model.rope[:, :batch.size(1)])       # its graph keeps the storages, and their addresses
        sizes.append(sum(storages.values()))
    return (sizes[1] - sizes[0]) / out.size(1)


def contestant(config, tokens, device, autocast):
    """((a step, forward and backward, the update) as functions to time, FLOPs a token, memory as text) of a model."""
    before = torch.cuda.memory_allocated()      # 0 without a GPU
    model, optimizer = train.build(config, device)
    forward, normalize_weights = train.maybe_compile(model, config)

    def forward_backward():
        with autocast:
            loss = forward(tokens, tokens)[1]
        loss.backward()

    def update():
        optimizer.step()
        normalize_weights()

    def step():
        optimizer.zero_grad(set_to_none=True)
        forward_backward()
        update()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds(step, device)
        memory = f"peak memory {(torch.cuda.max_memory_allocated() - before) / 2 ** 30:.2f} GiB"
    else:
        block = model.blocks[0] if forward is model else torch.compile(model.blocks[0], dynamic=False)
        kept = kept_for_backward(block, model, tokens, autocast)
        memory = f"{kept:,.0f} = {kept / config.width:.1f}·d bytes a token and block kept for backward"
    return (step, forward_backward, update), model.flops_per_token(), memory


def compare(configs, tokens, product, device, autocast):
    """[((seconds of step, forward and backward, update, product), FLOPs a token, memory), …], with all models built."""
    models = [contestant(config, tokens, device, autocast) for config in configs]
    turns = [[[seconds(function, device) for function in (*functions, product)] for functions, _, _ in models]
             for _ in range(TURNS)]
    return [(times, *rest) for times, (_, *rest) in zip(np.median(turns, axis=0), models)]


def main():
    config = train.Config(**train.parse_args(sys.argv[1:])[0])
    train.check(config)
    device, autocast = train.open_device(config)
    config.vocab_size = config.vocab_size or 50304
    configs, results = [config, replace(config, parametrization="gpt_sp")], []
    shape = min(config.micro_batch_size or config.batch_size, config.batch_size), config.seq_len
    tokens, n = torch.randint(config.vocab_size, shape, device=device), 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, config.dtype))
    try:
        try:
            results = compare(configs, tokens, lambda: a @ b, device, autocast)
        except torch.OutOfMemoryError:
            print("the two models do not fit into memory together: one after the other")
        results = results or [compare([one], tokens, lambda: a @ b, device, autocast)[0] for one in configs]
    except (ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"bench.py: {error}")
    peak, parts = 2 * n ** 3 / np.median([times[3] for times, _, _ in results]), LARGE_STEP / tokens.numel()
    print(f"matrix product of {n} × {n}, {config.dtype}: {peak / 1e12:.3f} TFLOP/s")
    for name, ((step, _, update, _), flops, memory) in zip(("normalized", "plain"), results):
        rate = tokens.numel() / step
        print(f"{name:>10}: step {1e3 * step:.2f} ms, of which the update {1e3 * update:.2f}; {rate:,.0f} tokens/s, "
              f"MFU {rate * flops / peak:.1%}; {memory}")
    ratios = [normalized / plain for normalized, plain in zip(*((
        times[0], times[1] * parts + times[2]) for times, _, _ in results))]
    print(f"ratio normalized/plain: {ratios[0]:.3f} for this step of {tokens.numel():,} tokens, "
          f"{ratios[1]:.3f} for 0.5 M tokens a step")


if __name__ == "__main__":
    main()
