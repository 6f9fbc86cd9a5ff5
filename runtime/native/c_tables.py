"""The C file of a plugin: its ops and kernels as static tables, and the choice among processor levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actgraph.runtime.kernels.numba.kernel import NumbaKernel, OpKernels, Stage
from actgraph.runtime.native.compile_objects import kernels_of, stages_of, symbol
from actgraph.runtime.native.levels import Level
from actgraph.runtime.native.tables import OpTable, key_of, table_of

_HEAD = """/* Written by `actgraph build-plugin`. */
#include "kernel.h"

int64_t ag_add_op(const ag_op *op);
int64_t ag_add_variant(const char *op, const ag_variant *variant);
const char *ag_compiled_in(void);
"""

#: F16C, MOVBE and LZCNT, which not every C compiler can ask for by name.
_REST_OF_V3 = """
#include <cpuid.h>
static int has_rest_of_v3(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 29 & 1) || !(c >> 22 & 1)) return 0;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c >> 5 & 1);
}
"""


def source(kernels: Mapping[str, OpKernels], levels: Sequence[Level], only: Sequence[str] = ()) -> str:
    """The text of the file. only: names of stages; kernels without one of them are left out."""
    parts, ops = [_HEAD], list(kernels.values())
    if any("has_rest_of_v3" in level.test for level in levels):
        parts.append(_REST_OF_V3)
    parts += [f"int64_t {symbol(level.tag, s)}(int64_t *, int64_t, int64_t);\n" for level in levels for s in _stages(ops, only)]
    tables = [table_of(each) for each in ops]
    parts += [_texts(number, table) for number, table in enumerate(tables)]
    parts.append("static const ag_op ops[] = {\n" + "".join(_op(n, table) for n, table in enumerate(tables)) + "};\n")
    for level in levels:
        rows = [_variant(n, each, k, level) for n, each in enumerate(ops) for k in kernels_of(each, only)]
        parts.append(f"static const struct {{ int op; ag_variant variant; }} variants_{level.tag}[] = {{\n{''.join(rows)}}};\n")
    return "".join(parts) + _chooser(levels)


def _stages(ops: Sequence[OpKernels], only: Sequence[str]) -> list[Stage]:
    return list({name: stage for each in ops for name, stage in stages_of(each, only).items()}.values())


def _text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(values: Sequence[object]) -> str:
    return "{" + (", ".join(map(str, values)) or "0") + "}"


def _word(value: int) -> str:
    return f"INT64_C({value})" if value != -(1 << 63) else "INT64_MIN"


def _texts(number: int, table: OpTable) -> str:
    rows = [_list([_text(a.name), a.kind, _word(a.fallback), _text(a.choices), int(a.required)]) for a in table.attributes] or [
        "{0}"
    ]
    errors = [_text(text) for text in table.errors] or ["0"]
    return (
        f"static const ag_attribute attributes_{number}[] = {_list(rows)};\n"
        f"static const char *const errors_{number}[] = {_list(errors)};\n"
    )


def _op(number: int, table: OpTable) -> str:
    fields = {
        "name": _text(table.name), "inputs": len(table.input_types), "outputs": len(table.output_types),
        "attributes": len(table.attributes), "input_type": _list(table.input_types), "optional": _list(table.optional),
        "accepts": _list(table.accepts), "input_names": _text(table.input_names), "result_attribute": table.result_attribute,
        "result_type": _list(table.result_types), "written_type": _list(table.written_types),
        "output_type": _list(table.output_types), "follows": int(table.follows), "key_input": _list(table.key_inputs),
        "key_inputs": len(table.key_inputs), "key_attribute": _list(table.key_attributes),
        "key_attributes": len(table.key_attributes), "attribute": f"attributes_{number}", "error": f"errors_{number}",
        "errors": len(table.errors),
    }  # fmt: skip
    return "  {" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "},\n"


def _variant(number: int, kernels: OpKernels, kernel: NumbaKernel, level: Level) -> str:
    fields = {
        "key": _list(key_of(kernels, kernel)), "shape": symbol(level.tag, kernel.shape),
        "scratch": symbol(level.tag, kernel.scratch) if kernel.scratch is not None else 0, "stages": len(kernel.stages),
        "stage": _list([symbol(level.tag, stage) for stage in kernel.stages]),
        "parallel": _list([int(stage.parallel) for stage in kernel.stages]),
    }  # fmt: skip
    return f"  {{{number}, {{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}},\n"


def _chooser(levels: Sequence[Level]) -> str:
    lines = ["const char *ag_compiled_in(void) {"]
    if any("__builtin_cpu" in level.test for level in levels):
        lines.append("  __builtin_cpu_init();")
    for level in reversed(levels):
        size = f"sizeof variants_{level.tag} / sizeof *variants_{level.tag}"
        lines += [
            f"  if ({level.test}) {{",
            "    int64_t full = 0;",
            "    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) full |= ag_add_op(ops + i);",
            f"    for (size_t i = 0; i < {size}; i++)",
            f"      full |= ag_add_variant(ops[variants_{level.tag}[i].op].name, &variants_{level.tag}[i].variant);",
            '    return full ? "actgraph: there are more kernels than the plugin has room for" : 0;',
            "  }",
        ]
    built = " and ".join(level.name for level in levels)
    lines += [f'  return "actgraph: this processor is none for which the plugin was built ({built})";', "}", ""]
    return "\n".join(lines)
