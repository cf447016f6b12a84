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

def kept_for_backward(block, h, rope):
    """Bytes that a block keeps for backward of its input h. A storage that is kept twice counts once."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block(h, rope)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())

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
    else:       # what a second batch adds, so that weights do not count
        block, h = torch.compile(model.blocks[0], dynamic=False, disable=not config.compile), model.embedding[tokens]
        with autocast:
            one, two = (kept_for_backward(block, h.repeat(n, 1, 1), model.rope) for n in (1, 2))
        memory = f"{(two - one) / tokens.numel() / config.width:.1f}·d bytes a token and block kept for backward"
    return forward_backward, update, model.flops_per_token() * tokens.numel(), memory

def compare(configs, product, *arguments):
    """[(seconds of forward with backward, of update, of product; FLOPs; memory), …], with all models in memory."""
    models = [contestant(config, *arguments) for config in configs]
    turns = [[[seconds(function, arguments[1]) for function in (*model[:2], product)] for model in models]
             for _ in range(TURNS)]
    return [(*map(statistics.median, zip(*times)), *model[2:]) for times, model in zip(zip(*turns), models)]

def main():
    config = train.Config(**train.parse_args(sys.argv[1:])[0])
    train.check(config)
    device, autocast = train.open_device(config)
    config.vocab_size = config.vocab_size or 50304
    shape = min(config.micro_batch_size or config.batch_size, config.batch_size), config.seq_len
    tokens, n = torch.randint(config.vocab_size, shape, device=device), 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, config.dtype))
    configs, rest = [config, replace(config, parametrization="gpt_sp")], (lambda: a @ a, tokens, device, autocast)
    try:
        results = compare(configs, *rest)
    except torch.OutOfMemoryError:      # both do not fit: one after the other
        results = [compare([alone], *rest)[0] for alone in configs]
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    peak = 2 * n ** 3 / statistics.median(result[2] for result in results)
    for name, (forward_backward, update, _, flops, memory) in zip(("normalized", "plain"), results):
        step = forward_backward + update
        print(f"{name:>10}: step {1e3 * step:.2f} ms, of which the update {1e3 * update:.2f}; {tokens.numel() / step:,.0f} "
              f"tokens/s, MFU {flops / step / peak:.1%} of {peak / 1e12:.3f} TFLOP/s, {config.dtype}; {memory}")
    for size in (tokens.numel(), LARGE_STEP):
        normalized, plain = (result[0] * size / tokens.numel() + result[1] for result in results)
        print(f"ratio normalized/plain: {normalized / plain:.3f} for a step of {size:,} tokens")

if __name__ == "__main__":
    main()
