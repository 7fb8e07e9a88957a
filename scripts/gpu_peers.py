"""What PyTorch needs on a GPU for the ragged-rank delta of bench/ragged_experts_gpu.cu, the same shapes and draws of experts.

Two ways that people write it, both captured in a CUDA graph so that launches cost nothing, bf16, the lists of tokens per
expert made beforehand (our time includes making them):
  loop     per expert: gather, two products, scaled sum into y
  grouped  torch._grouped_mm over tokens sorted by expert, factors padded to the largest rank
Prints the peak of an 8192^3 product first, before and after. Median of 25 replays, as the benchmark.
"""
import numpy
import torch

D, SLOTS = 4096, 2
CASES = {"mix8": [1, 4, 16, 32, 64, 256, 1024, 2048], "small8": [1, 2, 4, 8, 8, 16, 16, 32], "uniform16": [16] * 8}


def median_ms(work):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(25):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[12]


def peak():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9


def experts_of(pairs, experts):
    """The benchmark's draws: NumPy's legacy generator is std::mt19937."""
    draws = numpy.random.RandomState(7).randint(0, 2**32, size=pairs, dtype="uint64")
    return torch.from_numpy((draws % experts).astype("int64")).cuda()


def case(ranks, tokens, backward):
    torch.manual_seed(0)
    options = dict(device="cuda", dtype=torch.bfloat16)
    index = experts_of(tokens * SLOTS, len(ranks))
    x, y, dy = (0.05 * torch.randn(tokens, D, **options) for _ in range(3))
    a = [(0.05 * torch.randn(r, D, **options)).requires_grad_(backward) for r in ranks]
    b = [(0.05 * torch.randn(D, r, **options)).requires_grad_(backward) for r in ranks]
    x.requires_grad_(backward)
    rows = [(index == e).nonzero().squeeze(1) // SLOTS for e in range(len(ranks))]
    chosen = [e for e in range(len(ranks)) if rows[e].numel()]

    def loop():
        out = y
        for e in chosen:
            out = out.index_add(0, rows[e], 0.5 * (x[rows[e]] @ a[e].t() @ b[e].t()))
        return out

    order = torch.cat([rows[e] for e in range(len(ranks))])
    ends = torch.tensor([rows[e].numel() for e in range(len(ranks))], device="cuda").cumsum(0).int()
    width = max(max(ranks), 16)
    pad_a = torch.stack([torch.nn.functional.pad(m.detach(), (0, 0, 0, width - m.shape[0])) for m in a]).transpose(1, 2).contiguous().requires_grad_(backward)
    pad_b = torch.stack([torch.nn.functional.pad(m.detach(), (0, width - m.shape[1])) for m in b]).transpose(1, 2).contiguous().requires_grad_(backward)

    def grouped():
        low = torch._grouped_mm(x[order], pad_a, offs=ends)
        return y.index_add(0, order, 0.5 * torch._grouped_mm(low, pad_b, offs=ends))

    def timed(forward, inputs):
        if not backward:
            with torch.no_grad():
                return median_ms(forward)
        return median_ms(lambda: torch.autograd.grad(forward(), inputs, dy))

    out = {}
    for name, forward, inputs in (("loop", loop, [x] + [a[e] for e in chosen] + [b[e] for e in chosen]), ("grouped", grouped, [x, pad_a, pad_b])):
        try:
            out[name] = f"{timed(forward, inputs):8.4f} ms"
        except (RuntimeError, NotImplementedError) as error:
            out[name] = "failed: " + str(error).splitlines()[0][:60]
            torch.cuda.synchronize()
    return out


def main():
    print(f"bf16 peak {peak():.0f} TFLOP/s (torch {torch.__version__}, 8192^3), {torch.cuda.get_device_name()}")
    for tokens in (1, 16, 64, 256, 4096, 8192):
        for name, ranks in CASES.items():
            for backward in (False, True):
                times = case(ranks, tokens, backward)
                print(f"{'fwd+bwd' if backward else 'fwd':7} O1 {D}x{D} T={tokens:<5} k={SLOTS} {name:9} | loop {times['loop']} | grouped {times['grouped']}", flush=True)
    print(f"bf16 peak after {peak():.0f} TFLOP/s")


main()
