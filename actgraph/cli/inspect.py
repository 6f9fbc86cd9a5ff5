"""``actgraph inspect``: what is in a model, and what was done to it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from actgraph.cli import options
from actgraph.cli.options import example

if TYPE_CHECKING:
    from actgraph.graph import Graph

EXAMPLE = example("actgraph inspect small.onnx", "actgraph inspect small.onnx --json", "actgraph inspect small.onnx --text")

_ACCURACY = "session.qdq_matmulnbits_accuracy_level"


def inspect(
    model: options.Model,
    text: options.Text = False,
    dtype: options.Dtype = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show what is in a model and what was done to it.

    Signature, sizes, the passes that ran, which nodes they made, functions, notes, and how to run the file; of a program
    its driver and slots, and this for each graph. -v also counts the nodes by op.
    """
    from actgraph.cli.models import open_any
    from actgraph.cli.output import dump_json

    program = open_any(model, dtype=dtype, notes=False)
    if text:
        print(program.text(), end="")
    elif len(program) == 1:
        facts = describe(program.graph)
        dump_json(facts) if json else _print(facts, verbose)
    elif json:
        graphs = {name: describe(graph) for name, graph in program.graphs.items()}
        slots = [slot.to_dict() for slot in program.slots.values()]
        dump_json({"name": program.name, "driver": program.driver.to_dict(), "slots": slots, "graphs": graphs})
    else:
        print(f"{program.name}: a program of {len(program)} graphs")
        print(f"driver: {program.driver}")
        for slot in program.slots.values():
            print(f"slot: {slot}")
        print(f"shared weights: {len(program.shared())}")
        for name, graph in program.graphs.items():
            print(f"\n# {name}")
            _print(describe(graph), verbose)


def describe(graph: Graph) -> dict[str, Any]:
    """Everything that ``inspect`` shows, as plain data."""
    from actgraph.graph.graph import parameter_bytes

    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for parameter in graph.parameters():
        dtype = parameter.dtype.value if parameter.dtype is not None else "?"
        sizes[dtype] += parameter_bytes(parameter)
        counts[dtype] += 1
    nodes = graph.nodes()
    facts: dict[str, Any] = {
        "name": graph.name,
        "dialect": graph.dialect,
        "source": graph.companions.source,
        "tokenizer": graph.companions.tokenizer is not None,
        "inputs": [_signature(graph, value.name, str(value.type)) for value in graph.inputs()],
        "outputs": [_signature(graph, name, str(value.type)) for name, value in graph.outputs()],
        "nodes": len(nodes),
        "ops": dict(Counter(node.op for node in nodes).most_common()),
        "parameters": {dtype: {"tensors": counts[dtype], "bytes": size} for dtype, size in sizes.most_common()},
        "history": [record.to_dict() for record in graph.history],
        "made by": dict(Counter(node.origin.options or node.origin.created_by for node in nodes if node.origin.created_by)),
        "folds": [
            {"site": f.site, "op": f.op, "rule": f.rule, "condition": f.condition, "bytes": f.nbytes} for f in graph.folds
        ],
        "notes": list(graph.notes),
        "metadata": dict(graph.metadata),
    }
    if graph.dialect == "onnx":
        facts |= _onnx_facts(graph)
    return facts


def _signature(graph: Graph, name: str, type: str) -> dict[str, str]:
    return {"name": name, "type": type, "role": graph.role(name).value}


def _onnx_facts(graph: Graph) -> dict[str, Any]:
    from actgraph.graph.onnx import OnnxGraph

    assert isinstance(graph, OnnxGraph)
    model = graph.model
    calls = Counter(node.op_identifier() for node in model.graph.all_nodes())
    facts = {
        "ir version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "functions": {"::".join(part for part in key if part): calls[key] for key in model.functions},
        "session options": {},
    }
    int8_weights = any(node.op_type in ("DequantizeLinear", "Dequantize") for node in model.graph.all_nodes())
    if int8_weights:
        facts["session options"] = {_ACCURACY: "1"}
    return facts


def _print(facts: dict[str, Any], verbose: bool) -> None:
    from actgraph.pipeline.report import human

    kind = facts["dialect"]
    if kind == "onnx":
        opsets = ", ".join(f"{domain} {version}" for domain, version in facts["opsets"].items())
        kind = f"ONNX, IR {facts['ir version']}, opsets {opsets}"
    print(f"{facts['name']}: {kind}, {facts['nodes']} nodes")
    if facts["source"]:
        print(f"source: {facts['source']}")
    print(f"tokenizer: {'yes' if facts['tokenizer'] else 'none'}")
    for title in ("inputs", "outputs"):
        for item in facts[title]:
            role = "" if item["role"] == "user" else f"  ({item['role']})"
            print(f"{title[:-1]}: {item['name']}: {item['type']}{role}")
    total = sum(entry["bytes"] for entry in facts["parameters"].values())
    each = ", ".join(f"{dtype} {human(e['bytes'])} in {e['tensors']}" for dtype, e in facts["parameters"].items())
    print(f"parameters: {human(total)} ({each})")
    print("passes:" if facts["history"] else "passes: none")
    for number, record in enumerate(facts["history"], 1):
        counts = ", ".join(f"{rule} {count}" for rule, count in record["counts"].items() if count)
        print(f"  {number}. {record['text'] or record['name']}: {counts or 'nothing to do'}")
    for step, count in facts["made by"].items():
        print(f"nodes made by {step}: {count}")
    for fold in facts["folds"]:
        recorded = human(fold["bytes"])
        print(f"folded: {fold['op']} at {fold['site']} into the {fold['rule']} ({recorded} recorded; `unfold` takes it out)")
    for name, count in facts.get("functions", {}).items():
        print(f"function {name}: called {count} times")
    for note in facts["notes"]:
        print(f"note: {note}")
    for key, value in facts["metadata"].items():
        print(f"metadata: {key} = {value}")
    if facts.get("session options"):
        print(f"run it with the onnxruntime session option {_ACCURACY}=1: without it int8 weights are multiplied by")
        print("  activations quantized on the fly, which is faster and about a percent off")
    if verbose:
        for op, count in facts["ops"].items():
            print(f"op {op}: {count}")


command = inspect
