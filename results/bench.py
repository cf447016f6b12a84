"""Times a training step of the normalized Transformer beside one of the plain GPT of the same shape, taking turns.

    python results/bench.py --width=1024 [any option of train.py]

A step is one micro-batch of random tokens: forward, backward, and the update by Adam and normalization. Times are
medians over turns. MFU is relative to the rate of a large matrix product."""
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
    kept = {}
    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(h, rope)        # the graph of out keeps the storages, so that no address comes twice
    return sum(kept.values())

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
        for _ in range(2):      # the first compiles, and makes Adam's state
            torch.cuda.reset_peak_memory_stats()
            forward_backward()
            update()
        memory = f"peak memory {(torch.cuda.max_memory_allocated() - before) / 2 ** 30:.2f} GiB"
    else:
        block = torch.compile(model.blocks[0], dynamic=False, disable=forward is model)
        h = model.embedding[tokens]
        with autocast:      # what a second batch adds, so that weights do not count
            kept = kept_for_backward(block, h.repeat(2, 1, 1), model.rope) - kept_for_backward(block, h, model.rope)
        memory = f"{kept / tokens.numel() / config.width:.1f}·d bytes a token and block kept for backward"
    return forward_backward, update, model.flops_per_token() * tokens.numel(), memory

def compare(configs, tokens, product, device, autocast):
    """[(seconds of forward with backward, of update, of product; FLOPs; memory), …], with all models in memory."""
    models = [contestant(config, tokens, device, autocast) for config in configs]
    turns = [[[seconds(function, device) for function in (*model[:2], product)] for model in models]
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
    configs, arguments = [config, replace(config, parametrization="gpt_sp")], (tokens, lambda: a @ a, device, autocast)
    try:
        results = compare(configs, *arguments)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    except torch.OutOfMemoryError:
        print("the two models do not fit into memory together: one after the other")
        results = []
    results = results or [compare([alone], *arguments)[0] for alone in configs]
    peak = 2 * n ** 3 / statistics.median(result[2] for result in results)
    print(f"matrix product of {n} × {n}, {config.dtype}: {peak / 1e12:.3f} TFLOP/s")
    for name, (forward_backward, update, _, flops, memory) in zip(("normalized", "plain"), results):
        step = forward_backward + update
        print(f"{name:>10}: step {1e3 * step:.2f} ms, of which the update {1e3 * update:.2f}; "
              f"{tokens.numel() / step:,.0f} tokens/s, MFU {flops / step / peak:.1%}; {memory}")
    for size in (tokens.numel(), LARGE_STEP):
        normalized, plain = (result[0] * size / tokens.numel() + result[1] for result in results)
        print(f"ratio normalized/plain: {normalized / plain:.3f} for a step of {size:,} tokens")

if __name__ == "__main__":
    main()
