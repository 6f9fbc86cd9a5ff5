"""Running a graph with Python functions at sites: what forward hooks do, in either dialect.

The slow and plain way to edit activations, as a reference for edits that are nodes: nothing of the graph's operations is
changed. The graph is cut at each site, which becomes an output (what its producer makes) and an input (what its readers
see), and is run once more for each site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from actgraph.graph.executor import executor_for
from actgraph.ops.dtypes import DType

if TYPE_CHECKING:
    from actgraph.graph.graph import Array, Graph

Hook = Callable[["Array"], "Array"]


def run_with_hooks(graph: Graph, inputs: Mapping[str, Array], hooks: Mapping[str, Hook]) -> dict[str, Array]:
    """The outputs of ``graph`` where what readers of each site see is ``hooks[site](value)``.

    hooks: by site name, each a function of the site's value that returns an array of the same shape. They are applied in the
    order of execution, so each sees what the former ones did. Raises SiteError for an unknown site, InputError for inputs
    that do not fit, and ValueError for a hook that changes the shape.
    """
    cut = graph.clone()
    order = [site.name for site in cut.sites(list(hooks))] if hooks else []
    names: dict[str, tuple[str, str]] = {}
    with cut.edit("hooks") as editor:
        for number, name in enumerate(order):
            site = cut.site(name)
            value = editor.site_value(site)
            uses = site.uses(cut)
            given = editor.add_input(f"hook.{number}.in", value.type)
            editor.redirect(value, given, uses)
            editor.add_output(value, f"hook.{number}.out")
            names[name] = (given.name, f"hook.{number}.out")
    runner = executor_for(cut).open(cut)
    given_now: dict[str, Array] = {}
    shapes = _shapes(graph, inputs, order)
    for name in order:
        dtype = cut.value(names[name][0]).dtype or DType.F32
        given_now[names[name][0]] = np.zeros(shapes[name], dtype.numpy)
    for name in order:
        entry, exit_ = names[name]
        seen = runner({**inputs, **given_now})[exit_]
        made = np.asarray(hooks[name](seen)).astype(seen.dtype, copy=False)
        if made.shape != seen.shape:
            raise ValueError(f"the hook at {name} made {list(made.shape)} of {list(seen.shape)}")
        given_now[entry] = made
    results = runner({**inputs, **given_now})
    return {name: array for name, array in results.items() if not name.startswith("hook.")}


def _shapes(graph: Graph, inputs: Mapping[str, Array], names: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each site's value for these inputs."""
    tapped = graph.clone()
    with tapped.edit("hooks") as editor:
        values = {name: editor.site_value(tapped.site(name)) for name in names}
    found = executor_for(tapped).open(tapped, list(dict.fromkeys(values.values())))(dict(inputs))
    return {name: found[value.name].shape for name, value in values.items()}
