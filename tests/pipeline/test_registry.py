"""Finding passes: built-in, from packages, by hand; clashes and broken ones."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from actgraph.errors import OptionError, PassError
from actgraph.pipeline import Pass, all_passes, get_pass_class, pass_names, register, registry
from tests.pipeline.toys import Scale, Tidy

BUILT_IN = {"ablate", "cast", "clip", "cse", "dce", "fold", "identity", "prune", "quantize", "sparsify", "steer", "tap"}


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    registry._table.cache_clear()
    registry._load.cache_clear()
    yield
    registry._table.cache_clear()
    registry._load.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in points.items()]
    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: found if group == registry.ENTRY_POINTS else []
    )


def test_every_built_in_pass_loads_under_its_name() -> None:
    assert set(pass_names()) >= BUILT_IN
    assert all(cls.name == name for name, cls in all_passes().items())


def test_listing_passes_imports_none_of_them() -> None:
    code = (
        "import sys; from actgraph.pipeline import pass_names; pass_names();"
        "heavy = ('torch', 'onnxruntime', 'numba', 'transformers');"
        "bad = [m for m in sys.modules if m.startswith('actgraph.passes.') or m in heavy];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_add_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, toy_entry="tests.pipeline.test_registry:Entry")
    assert "toy_entry" in pass_names()
    assert get_pass_class("toy_entry") is Entry


def test_a_package_may_not_take_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, dce="tests.pipeline.test_registry:Entry")
    with pytest.raises(PassError, match="two passes are called 'dce'"):
        pass_names()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.module:X", "cannot be loaded from no.such.module:X"),
        ("tests.pipeline.test_registry:Missing", "cannot be loaded"),
        ("tests.pipeline.test_registry:BUILT_IN", "not a subclass"),
        ("tests.pipeline.test_registry:Entry", "calls itself 'toy_entry'"),
        ("tests.pipeline.test_registry:NoRun", "has no run method"),
        ("tests.pipeline.test_registry:Shadow", "has an option called 'preserves'"),
    ],
)
def test_broken_entry_points_are_named_when_asked_for(monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    _install(monkeypatch, toy_broken=path)
    assert "toy_broken" in pass_names()
    with pytest.raises(PassError, match=message):
        get_pass_class("toy_broken")


def test_names_registered_by_hand_may_not_clash() -> None:
    class Other(Tidy):
        name: ClassVar[str] = "toy_scale"

    class BuiltIn(Tidy):
        name: ClassVar[str] = "dce"

    for cls in (Other, BuiltIn):
        with pytest.raises(PassError, match="exists already"):
            register(cls)
    assert register(Scale) is Scale  # the same class again is fine
    with pytest.raises(PassError, match="cannot be the name"):

        class Bad(Tidy):
            name: ClassVar[str] = "9 lives"

        register(Bad)


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean quantize"):
        get_pass_class("quantise")


class Entry(Tidy):
    """Installed by a package."""

    name: ClassVar[str] = "toy_entry"


class NoRun(Pass):
    """Forgot to say what it does."""

    name: ClassVar[str] = "toy_broken"
    family: ClassVar[str] = "toy"
    extra: Any = None


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pydantic's own remark on the same thing

    class Shadow(Tidy):
        """Calls an option like a member of every pass."""

        name: ClassVar[str] = "toy_broken"
        preserves: str = ""  # type: ignore[assignment,misc]
