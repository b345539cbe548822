"""Megatron's modules see a `torch` whose CUDA device is the CPU.

About a hundred places in megatron.core allocate with `device="cuda"`, ask for `torch.cuda.current_device()` or synchronise
streams. They all go through the module's global name `torch`. That name is bound to a stand-in, inside megatron.core only: the
real torch and torch.cuda keep their behaviour for every other library.
"""

import contextlib
import importlib
import importlib.abc
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from .patch import TESTED_VERSIONS, Host, source_changed, without_cuda

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


class _NullStream:
    """A stream on a device without streams: everything is already in order."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return _NullEvent() if event is None else event

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _NullEvent:
    """An event that has always happened. It has no elapsed_time, for which there is no honest value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _CudaOnCpu(ModuleType):
    """`torch.cuda` as seen by megatron.core. Attributes not defined here are the real ones, which raise without a GPU."""

    Stream = _NullStream
    Event = _NullEvent
    nvtx = SimpleNamespace(
        range_push=lambda message: None, range_pop=lambda: None, range=lambda message: contextlib.nullcontext()
    )
    random = SimpleNamespace(get_rng_state=lambda device="cuda": torch.get_rng_state())

    def current_device(self) -> torch.device:
        return _CPU

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(state)

    def current_stream(self, device: Any = None) -> _NullStream:
        return _NullStream()

    def default_stream(self, device: Any = None) -> _NullStream:
        return _NullStream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _DeviceType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.device)

    def __call__(cls, device: Any, *index: int) -> torch.device:
        return _CPU if _names_cuda(device) else torch.device(device, *index)


class _Device(metaclass=_DeviceType):
    """`torch.device`: constructs real devices, and isinstance() against it holds for them."""


class _TorchOnCpu(ModuleType):
    """`torch` as seen by megatron.core; other attributes are those of the real module."""

    cuda = _CudaOnCpu("torch.cuda")
    device = _Device

    def autocast(self, device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return torch.autocast("cpu" if _names_cuda(device_type) else device_type, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(torch, name, value)


def _factory_on_cpu(name: str) -> staticmethod:
    factory: Callable[..., torch.Tensor] = getattr(torch, name)

    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # pinning is a property of transfers to a GPU
        return factory(*args, **kwargs)

    return staticmethod(create)


for _name in _FACTORIES:
    setattr(_TorchOnCpu, _name, _factory_on_cpu(_name))

TORCH_ON_CPU = _TorchOnCpu("torch")


def _rebind(module: ModuleType) -> None:
    if vars(module).get("torch") is torch:
        vars(module)["torch"] = TORCH_ON_CPU


class _RebindOnImport(importlib.abc.MetaPathFinder):
    """Rebinds `torch` in modules of megatron.core that are imported later."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_PACKAGE + "."):
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_rebind(module: ModuleType) -> None:
                execute(module)
                _rebind(module)

            spec.loader.exec_module = execute_and_rebind  # type: ignore[method-assign]
        return spec


class DeviceProxy:
    name = "device_proxy"
    why = "megatron.core allocates on the device 'cuda' and synchronises CUDA streams whatever the process groups' backend is"
    versions: SpecifierSet = TESTED_VERSIONS
    expected = (
        ("megatron.core.pipeline_parallel.schedules", 'total_num_tokens = torch.zeros([], dtype=torch.int, device="cuda")'),
        ("megatron.core.pipeline_parallel.p2p_communication", "device=torch.cuda.current_device()"),
        ("megatron.core.tensor_parallel.layers", "device=torch.cuda.current_device()"),
        ("megatron.core.distributed.param_and_grad_buffer", "device=torch.cuda.current_device()"),
        ("megatron.core.optimizer.clip_grads", "torch.zeros(1, dtype=torch.int, device='cuda')"),
    )
    """(module, text) of typical places. A release that chooses its device differently needs another patch, or none."""

    @property
    def locations(self) -> tuple[str, ...]:
        return (f"{_PACKAGE}.*: the global name `torch`",)

    def needs(self, host: Host) -> bool:
        return without_cuda(host)

    def check(self, version: str) -> None:
        for name, text in self.expected:
            module = importlib.import_module(name)
            if vars(module).get("torch") not in (torch, TORCH_ON_CPU):
                raise source_changed(self.name, name, version, "was expected to bind the global name `torch`")
            if text not in inspect.getsource(module):
                raise source_changed(self.name, name, version, f"was expected to contain `{text}`")

    def apply(self) -> None:
        for name, module in list(sys.modules.items()):
            if name == _PACKAGE or name.startswith(_PACKAGE + "."):
                _rebind(module)
        if not any(isinstance(finder, _RebindOnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RebindOnImport())


DEVICE_PROXY = DeviceProxy()
