"""Timing by turns, and what the numbers depend on."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmdet_softnms.files import write_json

OURS = 'ours'
SLOW = 2.0  # seconds; a peer whose first call takes longer is not called again
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
#: ``cpu``: of all threads of this process; what others do on the machine does not count, beyond caches and speed.
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def in_turns(
    timed: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call, and the result of its first, which warms up and is the only one of a slow peer."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    results = {}
    once = set()
    for name, call in timed.items():
        start = clock()
        results[name] = call()
        # A peer in another process tells what it took there.
        if (elapsed := getattr(call, 'seconds', clock() - start)) > SLOW:
            once.add(name)
            times[name].append(elapsed)
    begin, rounds = time.perf_counter(), 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - begin < seconds):
        for name, call in timed.items():
            if name not in once:
                start = clock()
                call()
                times[name].append(getattr(call, 'seconds', clock() - start))
        rounds += 1
    return times, results


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call until the GPU has done its work, too. A peer in another process tells its own time."""
    if hasattr(call, 'seconds'):
        return call

    def call_and_wait() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return call_and_wait


def median(values: Sequence[float]) -> float:
    """In milliseconds, of seconds."""
    return 1e3 * statistics.median(values)


def machine() -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or directories."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        model = names[0] if names else model
    return {
        'cpu': model,
        'cores': os.cpu_count(),
        'load_at_start': round(os.getloadavg()[0], 2),
        'torch_threads': torch.get_num_threads(),
        'python': platform.python_version(),
        **{name: _version(name) for name in ('torch', 'numba', 'numpy', 'ensemble-boxes')},
        'mmcv': _mmcv_version(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _mmcv_version() -> str:
    """By whatever name it was installed."""
    try:
        import mmcv
    except ImportError:
        return 'not installed'
    name = next(iter(metadata.packages_distributions().get('mmcv', ['mmcv'])))
    return f'{name} {mmcv.__version__}'


def finish(arguments: argparse.Namespace, rows: Any, key: str = 'rows') -> None:
    """Say on which machine, and write the numbers where they are wanted."""
    about = machine()
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    if arguments.out:
        write_json(arguments.out / f'benchmark_{arguments.command}.json', {'machine': about, key: rows})


def check_device(device: torch.device) -> None:
    """One clear line instead of a traceback where there is no GPU."""
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise SystemExit(f'--device {device}: this torch ({torch.__version__}) sees no GPU; leave the option out')
