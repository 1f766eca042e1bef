"""Imports that transformers asks for and a server does not use: half of its import, and 75 MiB of memory.

torch's compiler (``torch._dynamo``, with sympy) comes with the file of every model, for one class and three decorators.
Here it stays away until somebody needs more of it, and comes then as it always does.  transformers' parallelism over
several processes is told that there is none, as it is with builds of torch that have none; accelerate, which comes with
adapters and brings boto3 where that is installed, is left out for models that need neither.

Nothing depends on it: where another version of either is built differently, the imports are as long as they were.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
HARMLESS = "_trace_wrapped_higher_order_op"
"""What each model's file imports of it; asks for nothing else of the compiler."""

PATIENCE_S = 60.0
"""For another thread that executes the package: one that waits for this thread in turn would wait for ever."""

Function = Callable[..., Any]


def defer_compiler() -> None:
    """Let ``torch._dynamo`` be imported when it is first used.  torch has been imported before."""
    defer(COMPILER, HARMLESS)


def defer(name: str, harmless: str) -> None:
    """Let a package be executed when more of it is used than ``harmless``, one of its modules, and three decorators.

    Does nothing where it was imported already, or is not there.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    parent, _, own = name.rpartition(".")
    module = sys.modules[name] = _Deferred(spec, spec.loader)
    setattr(sys.modules[parent], own, module)
    sys.meta_path.insert(0, _Watch(module, f"{name}.{harmless}"))


def forgo_parallelism() -> None:
    """Let transformers find no ``torch.distributed``, for good: it asks once and remembers the answer."""
    import torch.distributed  # noqa: PLC0415
    from transformers.utils import import_utils  # noqa: PLC0415

    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import_utils.is_torch_distributed_available()
    except AttributeError:
        pass  # of another version: it will find what is there
    finally:
        torch.distributed.is_available = is_available


@contextmanager
def without(name: str) -> Generator[None]:
    """Let transformers, imported for the first time meanwhile, find no such package; it remembers the answer."""
    if name in sys.modules or "transformers" in sys.modules:
        yield
        return
    # With None in its place the import system says that there is none.
    modules: dict[str, Any] = sys.modules
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


class _Deferred(ModuleType):
    """The package, not executed yet.  The decorators that modules use while they are imported wait with it."""

    def __init__(self, spec: importlib.machinery.ModuleSpec, loader: importlib.abc.Loader) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__ = spec, loader, spec.origin
        self.trimaran_loader = loader
        self.__package__, self.__path__ = spec.name, list(spec.submodule_search_locations or ())
        self.trimaran_lock = threading.RLock()
        self.trimaran_allowed: list[Any] = []
        self.trimaran_owner: int | None = None
        """The thread that executes it."""
        self.trimaran_is_done = False
        self.assume_constant_result = _assume_constant_result
        self.allow_in_graph = self.trimaran_allow
        self.disable = self.trimaran_disable

    def __getattr__(self, name: str) -> Any:
        # As while any module is imported, its own thread sees what is there so far; others wait.
        if name.startswith("__") or self.trimaran_owner == threading.get_ident():
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        _complete(self, name)
        return object.__getattribute__(self, name)

    def trimaran_execute(self) -> None:
        """Become the package.  The lock is held."""
        self.trimaran_owner = threading.get_ident()
        try:
            for name in ("assume_constant_result", "allow_in_graph", "disable"):
                vars(self).pop(name, None)
            self.trimaran_loader.exec_module(self)
            package: Any = self
            for function in self.trimaran_allowed:
                package.allow_in_graph(function)
            self.trimaran_is_done = True
            object.__setattr__(self, "__class__", ModuleType)
        finally:
            self.trimaran_owner = None

    def trimaran_allow(self, fn: Any) -> Any:
        self.trimaran_allowed.append(fn)
        return fn

    def trimaran_disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """What matters while something is compiled, and then the compiler is there."""
        if fn is None:
            return functools.partial(self.trimaran_disable, recursive=recursive, **options)
        real: list[Function] = []

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.trimaran_is_done:
                return fn(*args, **kwargs)
            if not real:
                module: Any = self
                real.append(module.disable(fn, recursive, **options))
            return real[0](*args, **kwargs)

        return call


def _assume_constant_result(fn: Any) -> Any:
    fn._dynamo_marked_constant = True
    return fn


def _complete(module: ModuleType, asked_for: str) -> None:
    """Execute the package, as the import would have done."""
    if not isinstance(module, _Deferred):
        return
    if not module.trimaran_lock.acquire(timeout=PATIENCE_S):
        return
    try:
        if not module.trimaran_is_done and module.trimaran_owner is None:
            logger.info("%s is imported after all, for %s", module.__name__, asked_for)
            module.trimaran_execute()
    finally:
        module.trimaran_lock.release()


class _Watch(importlib.abc.MetaPathFinder):
    """Whoever imports another part of the package needs all of it first."""

    def __init__(self, module: ModuleType, harmless: str) -> None:
        self._module, self._harmless = module, harmless

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Never finds anything itself."""
        del path, target
        if fullname.startswith(self._module.__name__ + ".") and fullname != self._harmless:
            _complete(self._module, fullname)
