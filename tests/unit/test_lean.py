"""Packages that are executed when they are used, on one that notes what happens to it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serve.engine import lean

PACKAGE = """
from outer.slow import within

import sys, time
assert not hasattr(sys.modules["outer.slow"], "VALUE")
time.sleep(0.05)
allowed = []
VALUE = within.VALUE
def allow_in_graph(fn):
    allowed.append(fn)
    return fn
def disable(fn, recursive, reason=None):
    return lambda *given: ("disabled", recursive, reason, fn(*given))
def assume_constant_result(fn):
    raise AssertionError("too late")
"""


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package with the deferred one in it."""
    folder = tmp_path / "outer" / "slow"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "light.py").write_text("import outer.slow\nNAME = 'light'\n")
    (folder / "within.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield importlib.import_module("outer")
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == "outer"]:
        del sys.modules[name]


def deferred(outer: Any) -> Any:
    lean.defer("outer.slow", "light")
    assert importlib.import_module("outer.slow") is outer.slow
    return outer.slow


def is_executed(module: Any) -> bool:
    return "VALUE" in vars(module)


def test_deferred_package_waits_for_its_first_use(outer: Any) -> None:
    slow = deferred(outer)
    assert importlib.import_module("outer.slow.light").NAME == "light"
    assert not hasattr(slow, "__all__"), "who looks at all modules does not use them"
    assert not is_executed(slow)
    assert slow.VALUE == 7
    assert type(slow) is ModuleType
    assert slow is sys.modules["outer.slow"]
    assert slow.light.NAME == "light"
    with pytest.raises(AttributeError):
        _ = slow.nothing_of_the_kind


def test_deferred_package_is_executed_once_for_all_threads(outer: Any) -> None:
    slow = deferred(outer)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: slow.VALUE, range(4))) == [7] * 4
        assert len({id(each) for each in pool.map(lambda _: slow.allowed, range(4))}) == 1


def test_deferred_package_comes_before_its_other_parts(outer: Any) -> None:
    slow = deferred(outer)
    assert importlib.import_module("outer.slow.within").VALUE == 7
    assert is_executed(slow)


def test_deferred_decorators_do_later_what_they_promise(outer: Any) -> None:
    slow = deferred(outer)
    calls: list[int] = []

    @slow.allow_in_graph
    @slow.assume_constant_result
    def note(number: int) -> int:
        calls.append(number)
        return number

    careful, plain = slow.disable(recursive=False, reason="why")(note), slow.disable(note)
    assert (careful(1), plain(2), note(3)) == (1, 2, 3)
    assert not is_executed(slow)
    assert note._dynamo_marked_constant
    assert slow.allowed == [note]
    assert careful(4) == ("disabled", False, "why", 4)
    assert plain(5) == ("disabled", True, None, 5)
    assert calls == [1, 2, 3, 4, 5]


def test_deferred_package_that_fails_is_tried_again(outer: Any, tmp_path: Path) -> None:
    slow = deferred(outer)
    init = tmp_path / "outer" / "slow" / "__init__.py"
    init.write_text("raise RuntimeError('not today')\n")
    with pytest.raises(RuntimeError, match="not today"):
        _ = slow.VALUE
    init.write_text("VALUE = 123456\n")
    assert slow.VALUE == 123456


def test_defer_leaves_alone_what_is_there_or_is_not(outer: Any) -> None:
    within = importlib.import_module("outer.slow.within")
    lean.defer("outer.slow", "light")
    assert type(outer.slow) is ModuleType
    lean.defer("outer.absent", "light")
    lean.defer("outer.slow.within", "light")
    assert not hasattr(outer, "absent")
    assert within.VALUE == 7


def test_package_is_not_found_while_it_is_left_out(outer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with lean.without("outer.slow"):
        assert importlib.util.find_spec("outer.slow") is None
        with pytest.raises(ImportError):
            importlib.import_module("outer.slow")
    assert importlib.util.find_spec("outer.slow") is not None
    with pytest.raises(RuntimeError), lean.without("outer.slow"):
        raise RuntimeError
    assert "outer.slow" not in sys.modules


@pytest.mark.parametrize("known", ["outer", "transformers"])
def test_package_that_is_known_already_stays(outer: Any, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers has asked for it: its answer would be another one than before."""
    monkeypatch.setitem(sys.modules, known, outer)
    name = "outer" if known == "outer" else "outer.slow"
    with lean.without(name):
        assert importlib.util.find_spec(name) is not None
    assert sys.modules[known] is outer
