"""Choose the backend that runs, and log the choice; tell plain data from traced or wrapped data."""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Set, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

logger = logging.getLogger(__name__)
_get_mode = torch._C._get_dispatch_mode

BACKENDS = ("torch", "numba", "triton")
FASTEST = {"cpu": "numba", "cuda": "triton"}  # elsewhere torch
PLAIN = (Tensor, nn.Parameter)
TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())
SAYS_WHY = TorchVersion(torch.__version__) >= "2.8"  # breaks of graphs have messages
PROCESS = os.getpid()  # the process that imported this module

Function = TypeVar("Function", bound=Callable[..., Any])

_given_up: Dict[str, str] = {}  # backends that cannot run here, and why
_said: Set[str] = set()  # lines already logged


class CannotRunError(Exception):
    """A backend cannot run here; it has done nothing yet."""


def is_plain(*tensors: Tensor) -> bool:
    """Whether tensors are plain data, which kernels may read and write directly.

    Tensors are not plain while torch traces, exports, compiles or transforms, while a mode watches
    torch's operations (``FakeTensorMode``, ``make_fx``, ``FlopCounterMode``), or if they are
    wrapped (``FakeTensor``, ``DTensor``, ``vmap``). Without arguments: whether new tensors would
    be plain.
    """
    if is_traced() or torch._C._len_torch_dispatch_stack():
        return False
    return not any(map(is_wrapped, tensors))


def is_traced() -> bool:
    """Whether operations are recorded or transformed, so that code must not look at numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(_get_mode, TRACING_MODES))


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor is not just memory: of a subclass, or batched by ``vmap``."""
    return type(x) not in PLAIN or torch._C._functorch.is_legacy_batchedtensor(x)


def is_compiled() -> bool:
    """Whether ``torch.compile`` is tracing. Its graph may break; an export's graph must not."""
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 lacks it
    return torch.compiler.is_dynamo_compiling() and not is_exporting()


def is_in_graph(*tensors: Tensor) -> bool:
    """Whether graphs of ``torch.compile`` hold registered operations for these tensors.

    They do not for subclasses of tensors, or under transforms.
    """
    if not is_compiled() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in PLAIN for x in tensors)


def outside_graphs(function: Function, reason: Optional[str] = None) -> Function:
    """The function, in a form that ``torch.compile`` calls but does not trace.

    Args:
        function: the function.
        reason: the error message under ``fullgraph=True``, which cannot work then.
    """
    if reason is not None and SAYS_WHY:
        torch._dynamo.graph_break(msg=reason)
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def needs_torch(*tensors: Tensor) -> bool:
    """Whether these tensors need torch's own operations; outside of tracing, log the reason."""
    if is_plain(*tensors):
        return False
    if not is_traced():
        kinds = sorted({type(x).__name__ for x in tensors if is_wrapped(x)})
        reason = f"of tensors of type {kinds[0]}" if kinds else "a mode watches torch's operations"
        _say(logging.WARNING, f"memory kernels: torch, which is slower, because {reason}")
    return True


def run(x: Tensor, operation: str, *args: Any) -> Any:
    """Run an operation with the backend for x, or with torch if that backend cannot run.

    Raises:
        ValueError: PKM_BACKEND names a backend that does not exist or cannot run.
    """
    backend = backend_for(x)
    try:
        return getattr(backend, operation)(*args)
    except CannotRunError as error:
        name = _name(backend)
        give_up(name, f"{name} cannot run here ({one_line(error)})")
        return run(x, operation, *args)


def backend_for(x: Tensor) -> ModuleType:
    """The module that runs operations on plain tensors of this device and dtype.

    While a mode watches torch's operations, it is the torch backend.

    Raises:
        ValueError: PKM_BACKEND names a backend that does not exist or cannot run.
    """
    if torch._C._len_torch_dispatch_stack():
        return _load("torch")
    return _choose(os.environ.get("PKM_BACKEND") or None, x.device.type, x.dtype)


def give_up(name: str, reason: str) -> None:
    """Do not use a backend any more."""
    _given_up[name] = reason
    _choose.cache_clear()


def choose_anew() -> None:
    """Forget all choices, and all backends that were given up."""
    _given_up.clear()
    _said.clear()
    _choose.cache_clear()


@cache
def _choose(forced: Optional[str], device: str, dtype: torch.dtype) -> ModuleType:
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"PKM_BACKEND is {forced}, must be one of {', '.join(BACKENDS)}")
    name = forced or FASTEST.get(device, "torch")
    problem = _problem(name, device, dtype)
    if problem and forced:
        raise ValueError(f"PKM_BACKEND is {forced}, but {problem}")
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    if problem:
        _say(logging.WARNING, f"memory kernels: torch {where}, which is slower: {problem}")
        name = "torch"
    else:
        _say(logging.INFO, f"memory kernels: {name} {where}")
    return _load(name)


def _say(level: int, line: str) -> None:
    """Log a line, once."""
    if line not in _said:
        _said.add(line)
        logger.log(level, "%s", line)


def _load(name: str) -> ModuleType:
    return import_module(f".{name}_backend", __package__)


def _name(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2].removesuffix("_backend")


def _problem(name: str, device: str, dtype: torch.dtype) -> Optional[str]:
    """Why a backend cannot run; None if it can."""
    if name in _given_up:
        return _given_up[name]
    try:
        backend = _load(name)
    except Exception as error:  # numba raises RuntimeError if it finds no folder for its cache
        return f"{name} cannot run here ({one_line(error)})"
    if device not in backend.DEVICES:
        return f"{name} does not run on {device}"
    if dtype not in backend.DTYPES:
        return f"{name} does not know {str(dtype).removeprefix('torch.')}"
    return None


def one_line(error: Exception) -> str:
    """The message of an error in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
