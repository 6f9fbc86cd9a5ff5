"""Canonical text and content hash, on a toy container (both dialects: tests of the containers and goldens of the passes)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from actgraph.graph import text
from actgraph.graph.provenance import Origin, PassRecord
from actgraph.graph.sites import SiteTable, value_anchor
from actgraph.ops.dtypes import DType
from tests.graph import onnx_models as models
from tests.graph.toy import ToyGraph


def small() -> ToyGraph:
    g = ToyGraph("small")
    x = g.add_input("x", "f32", ("batch", "seq", 4))
    weight = g.add_parameter("layer.weight", np.arange(16, dtype=np.float32).reshape(4, 4))
    half = g.add_parameter("half", np.float32(0.5))
    axes = g.add_parameter("axes", np.array([1, 2]))
    g.add_parameter("never_read", np.zeros(3, np.float32))
    h = g.add_node("toy.matmul", x, weight, name="h", transpose=True, alpha=1e-5)
    s = g.add_node("toy.scale", h, half, axes, None, name="s")
    g.add_result("logits", s)
    g._sites = SiteTable()
    g._sites.add("blocks.0.mlp.hidden", value_anchor(h), "hidden", ["linear.0"], ["blocks.0.mlp.hidden"])
    g._sites.add("linear.1", value_anchor(s), "linear")
    return g


def test_the_whole_text() -> None:
    g = small()
    g.body[1].origin = Origin(("s",), "", "sparsify", "sparsify{method=teal}")
    g.history.append(PassRecord("sparsify", "sparsify{method=teal}"))
    digest = text.array_hash(g.read(g.value("layer.weight")))[:12]
    assert (
        g.text()
        == f"""\
graph small(x: f32[batch, seq, 4])
    -> (logits: f32[batch, seq, 4]) {{
  %h = toy.matmul(%x, %layer.weight) {{alpha = 1e-05, transpose = true}}           : f32[batch, seq, 4]  @blocks.0.mlp.hidden
  %s = toy.scale(%h, 0.5, [1, 2], none)                                          : f32[batch, seq, 4]  by sparsify
  return %s
}}
parameters {{
  %layer.weight : f32[4, 4]  #{digest}
}}
history {{
  sparsify{{method=teal}}
}}
"""
    )
    bare = g.text(sites=False, provenance=False)
    assert "@" not in bare and "sparsify" not in bare


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.float32(1e-5), "1e-05"), (np.float32(0.1), "0.1"), (np.float64(0.1), "0.1:f64"), (np.int64(3), "3"),
        (np.int32(3), "3:i32"), (np.bool_(True), "true"), (np.array([True, False]), "[true, false]"), (np.array([7]), "[7]"),
        (np.array([], dtype=np.int64), "[]"), (np.array([], dtype=np.int32), "[:i32]"), (np.float32("nan"), "nan"),
        (np.array([-1, 2], np.int32), "[-1:i32, 2:i32]"), (np.float16(0.5), "0.5:f16"),
    ],
)  # fmt: skip
def test_small_constants_in_place_keep_dtype_and_rank(array: np.ndarray, expected: str) -> None:
    g = ToyGraph()
    assert text.value_text(g.add_parameter("c", array)) == expected


def test_constants_that_differ_print_differently() -> None:
    arrays = [
        np.asarray(v, d) for v in (0, 1, [0], [1], [0, 1]) for d in ("i8", "i4", "f4", "f8", "f2", "?", "u1")
        if not (isinstance(v, list) and len(v) > 1 and d[0] == "f")
    ] + [np.zeros((1, 1), np.float32), np.zeros(2, np.float32)]  # fmt: skip
    g = ToyGraph()
    shown = set()
    for i, array in enumerate(arrays):
        value = g.add_parameter(f"p{i}", array)
        shown.add(text.value_text(value) if text._is_inline(value) else f"{value.type} {text.data_hash(value)}")
    assert len(shown) == len(arrays)


def test_attributes() -> None:
    shown = text.attribute_text
    assert shown(DType.F32) == "f32" and shown(None) == "none" and shown((1, "seq", 2.0)) == '[1, "seq", 2.0]'
    assert shown(np.zeros(100, np.float32)).startswith("f32[100] #") and shown(np.arange(2)) == "i64[0, 1]"
    assert shown({"b": 1, "a": False}) == "{a = false, b = 1}"
    assert shown(np.zeros(100, np.float32)) != shown(np.ones(100, np.float32))


def test_hash_sees_every_content_and_no_label() -> None:
    base = small().content_hash()
    assert base == small().content_hash() and len(base) == 16
    other = small()
    other.name, other.notes = "renamed", ["a note"]
    assert other.content_hash() == base

    def changed(change: object) -> str:
        g = small()
        change(g)  # type: ignore[operator]
        return g.content_hash()

    flipped = np.arange(16, dtype=np.float32).reshape(4, 4)
    flipped[3, 3] = np.nextafter(np.float32(15), np.float32(16))
    variants = [
        changed(lambda g: g._set_parameter(g.value("layer.weight"), flipped)),
        changed(lambda g: g._set_parameter(g.value("half"), np.float32(0.25))),
        changed(lambda g: g.body[0].attributes.update(alpha=2e-5)),
        changed(lambda g: g.history.append(PassRecord("dce", "dce"))),
        changed(lambda g: setattr(g.body[0], "origin", Origin(("h",), "", "steer"))),
        changed(lambda g: g.outs.append(("more", g.body[0].outputs[0])) or g.roles.update(more=g.roles["logits"])),
        changed(lambda g: setattr(g, "_sites", SiteTable())),
    ]
    assert len({base, *variants}) == len(variants) + 1


def test_unchanged_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    g = small()
    first = g.content_hash()
    calls: list[int] = []
    real = text.array_hash
    monkeypatch.setattr(text, "array_hash", lambda array: (calls.append(array.size), real(array))[1])
    assert g.content_hash() == first and not calls
    assert g.clone().content_hash() == first and not calls  # clones share data
    g._set_parameter(g.value("layer.weight"), np.zeros((4, 4), np.float32))
    assert g.content_hash() != first and calls == [16]


def test_digest_does_not_depend_on_memory_layout() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    strided = np.repeat(array, 2, axis=1)[:, ::2]
    assert text.array_hash(array) == text.array_hash(np.asfortranarray(array)) == text.array_hash(strided)
    assert text.array_hash(array) != text.array_hash(array.reshape(6, 4))
    want = hashlib.sha256(b"float32[4, 6]" + array.tobytes()).hexdigest()
    assert text.array_hash(array) == want


def test_bfloat16_and_big_arrays() -> None:
    import ml_dtypes

    bf16 = np.ones(5, ml_dtypes.bfloat16)
    assert text.array_hash(bf16) != text.array_hash(np.ones(5, np.float16))
    big = np.zeros(text._CHUNK // 4 + 3, np.float32)
    want = hashlib.sha256(f"float32[{big.size}]".encode() + big.tobytes()).hexdigest()
    assert text.array_hash(big) == want


def test_bodies_are_printed_under_path_names(tmp_path: Path) -> None:
    from actgraph import formats

    source = """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 4] x, bool c) => (float[n, 4] y) <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
            h = MatMul(x, w)
            y = If (c) <then_branch = yes () => (float[n, 4] a) { a = Relu(h) },
                        else_branch = no () => (float[n, 4] b) { b = Neg(h) }>
        }"""
    model = onnx.parser.parse_model(source)
    onnx.save(model, tmp_path / "if.onnx")
    graph = formats.load(str(tmp_path / "if.onnx"))
    graph.verify()
    body = graph.text().split("bodies {")[1].split("}")[0]
    assert "then_branch" in body and "onnx.Relu(%h)" in body and "onnx.Neg(%h)" in body
    model.graph.node[1].attribute[0].g.node[0].op_type = "Abs"
    onnx.save(model, tmp_path / "if.onnx")
    assert formats.load(str(tmp_path / "if.onnx")).content_hash() != graph.content_hash()


_FUNCTION = """<ir_version: 9, opset_import: ["": 18, "local": 1]> g (float[n, 4] x, float[n, 4] z) => (float[n, 4] y)
{ y, k = local.F (x, z) }
<opset_import: ["": 18], domain: "local"> F <slope: float = 0.5> (a, b) => (w, q)
{ d = Sub(a, b)  w = LeakyRelu <alpha: float = @slope> (d)  c = Constant <value = float {1.0}> ()  q = Add(d, c) }"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(a, b) =>", "(b, a) =>"),
        ("(w, q)", "(q, w)"),
        ("= 0.5>", "= 0.25>"),
        ("{1.0}", "{2.0}"),
        ("Sub(a", "Add(a"),
        ("q = Add", "q = Mul"),
    ],
)
def test_the_hash_sees_everything_of_a_foreign_function(old: str, new: str) -> None:
    assert old in _FUNCTION
    known = models.graph(_FUNCTION).content_hash()
    assert models.graph(_FUNCTION).content_hash() == known
    assert models.graph(_FUNCTION.replace(old, new)).content_hash() != known
