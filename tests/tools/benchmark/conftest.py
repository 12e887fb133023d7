"""Fixtures of the tests of what measures time: one thread, the tool, a small picture's work."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from il_net.benchmark.workload import Workload, make_workload

REPO = Path(__file__).parents[3]
SIZE = (64, 96)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/benchmark.py as a module."""
    path = REPO / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload(SIZE)


@pytest.fixture
def count_calls() -> Callable[[dict[str, nn.Module]], dict[str, int]]:
    """Counts the forward passes of layers from now on, by their names."""

    def start(layers: dict[str, nn.Module]) -> dict[str, int]:
        calls = dict.fromkeys(layers, 0)
        for name, layer in layers.items():

            def count(*_: object, name: str = name) -> None:
                calls[name] += 1

            layer.register_forward_pre_hook(count)
        return calls

    return start
