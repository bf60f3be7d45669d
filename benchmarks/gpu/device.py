"""Where the suite measures: a CUDA device, timed by its events, or the CPU, timed by the host's clock.

Both have the same methods, so that a dry run on the CPU goes through the code that measures. Relies on torch;
`bench`, `linear` and `exercise` rely on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


class Device(Protocol):
    """What the benchmark asks of the place it runs on. Times are in seconds."""

    torch: torch.device
    compiler: str  # backend of torch.compile
    latency_calls: int  # per sample of a small case
    host_calls: int  # per sample of the host's time; the device's queue of some thousand launches must not fill up
    least_rounds: int  # of samples, however long they last
    most_rounds: int

    def elapsed(self, run: Run, *, cold: bool) -> float:
        """Time from the first work of `run` to the last. `cold`: the cache is emptied before."""

    def enqueue(self, run: Run) -> float:
        """Time that the host is busy with `run`, without waiting for the device."""

    def launches(self, run: Run) -> int:
        """Kernels, copies and fills that `run` starts."""

    def peak(self, run: Run) -> int | None:
        """Bytes that `run` takes at its peak, above what is there before; None where memory is not counted."""

    def synchronize(self) -> None: ...

    def free(self) -> None: ...

    def profiled(self, run: Run) -> None:
        """Do `run` where a profiler that waits for the program's own start and stop looks on."""


def device(name: str) -> Device:
    return Cuda() if name == "cuda" else Cpu()


class Cuda:
    """The current CUDA device."""

    compiler = "inductor"
    latency_calls, host_calls, least_rounds, most_rounds = 20, 5, 7, 200

    # While the device spins this long, about half a millisecond, the host gets ahead of it: a cold call is then timed
    # without gaps in which the device waits for the host.
    HEAD_START = 1_000_000  # cycles

    def __init__(self) -> None:
        self.torch = torch.device("cuda")
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._other_data = torch.zeros(2 * cache // 4, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed(self, run: Run, *, cold: bool) -> float:
        torch.cuda.synchronize()
        if cold:
            self._other_data.sum()  # read, not written: lines to write back would be on the account of `run`
            torch.cuda._sleep(self.HEAD_START)
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def enqueue(self, run: Run) -> float:
        torch.cuda.synchronize()
        return _host_time(run)

    def launches(self, run: Run) -> int:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in seen.events())

    def peak(self, run: Run) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        torch.cuda.empty_cache()

    def profiled(self, run: Run) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


class Cpu:
    """The host, for dry runs."""

    compiler = "eager"  # traces as for a device, and leaves out a C++ compiler's seconds
    latency_calls, host_calls, least_rounds, most_rounds = 1, 1, 2, 2

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self._other_data = torch.zeros(1 << 14)

    def elapsed(self, run: Run, *, cold: bool) -> float:
        if cold:
            self._other_data.sum()
        return _host_time(run)

    def enqueue(self, run: Run) -> float:
        return _host_time(run)

    def launches(self, run: Run) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
        return sum(event.device_type == DeviceType.CPU for event in seen.events())

    def peak(self, run: Run) -> int | None:
        run()
        return None

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        pass

    def profiled(self, run: Run) -> None:
        run()


def _host_time(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
