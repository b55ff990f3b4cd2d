"""What a stretch of code costs: wall and CPU seconds, floating point operations, and the bytes it holds at its peak."""

import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# PyTorch's counter knows the attention kernels of GPUs but not the CPU's, which it would count as free. As on a GPU,
# masked scores count: a row of L tokens costs L x L, whatever it may see.
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *a, **_: sdpa_backward_flop_count(*a[:4]),
}


GPU = torch.cuda.is_available()


class Meter:
    """A context that fills `result` with what was asked for by `what`.

    time: wall and cpu, in seconds. flops: all flops, and those of attention. memory: peak_bytes, the most bytes of
    tensors alive at once above what was alive on entry. One at a time: counting costs time and holds tensors.
    """

    def __init__(self, what: str):
        self.what, self.result = what, {}

    def __enter__(self):
        if self.what == "memory":
            self.memory = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        if self.what == "flops":
            self.flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION).__enter__()
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *problem):
        if GPU:
            torch.cuda.synchronize()
        if self.what == "time":
            self.result = {"wall": time.perf_counter() - self.start[0], "cpu": time.process_time() - self.start[1]}
        if self.what == "flops":
            self.flops.__exit__(*problem)
            by_kind = self.flops.get_flop_counts()["Global"]
            attention = sum(count for kind, count in by_kind.items() if "scaled_dot_product" in str(kind))
            self.result = {"flops": self.flops.get_total_flops(), "attention_flops": attention}
        if self.what == "memory":
            self.memory.__exit__(*problem)
            peak = torch.cuda.max_memory_allocated() - self.held if GPU else _peak_bytes(self.memory)
            self.result = {"peak_bytes": peak}


def _peak_bytes(memory) -> int:
    """Highest running sum of the profiler's allocations (positive) and releases (negative)."""
    events = [e for e in memory.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
