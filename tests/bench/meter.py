"""What a stretch of code costs: wall and CPU seconds, floating point operations, and peak bytes."""

import contextlib
import time
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# PyTorch's counter knows the attention kernels of GPUs but not the CPU's, which it would count as
# free. Masked scores count, as on a GPU: a row of L tokens costs L x L, whatever it may see.
# And it stops at an addmm that is told the dtype of its result, as TRL's head is on GPUs.
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
COUNTS = {
    torch.ops.aten.addmm: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
    getattr(torch.ops.aten, FLASH): lambda *a, **_: sdpa_flop_count(*a[:3]),
    getattr(torch.ops.aten, FLASH + "_backward"): lambda *a, **_: sdpa_backward_flop_count(*a[:4]),
}
GPU = torch.cuda.is_available()


class Meter:
    """A context that fills `result` with what `what` asks for, one thing at a time.

    time: wall and cpu, in seconds. flops: all of them, and attention's. memory: the most bytes of
    tensors alive at once, above what was alive on entry.
    """

    def __init__(self, what: str):
        self.what, self.result, self.counter = what, {}, contextlib.nullcontext()
        if what == "memory" and not GPU:
            self.counter = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        if what == "flops":
            self.counter = FlopCounterMode(display=False, custom_mapping=COUNTS)

    def __enter__(self):
        self.counter.__enter__()
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *problem):
        if GPU:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.counter.__exit__(*problem)
        if self.what == "time":
            self.result = {"wall": wall, "cpu": cpu}
        if self.what == "flops":
            kinds = self.counter.get_flop_counts()["Global"]
            attention = sum(n for kind, n in kinds.items() if "scaled_dot_product" in str(kind))
            self.result = {"flops": sum(kinds.values()), "attention_flops": attention}
        if self.what == "memory":
            peak = torch.cuda.max_memory_allocated() - self.held if GPU else _peak(self.counter)
            self.result = {"peak_bytes": peak}


def _peak(memory) -> int:
    """Highest running sum of the profiler's allocations (positive) and releases (negative)."""
    events = [e for e in memory.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))
