"""ONNX: a graph for onnxruntime, TensorRT and others, whose weights are our codes behind DequantizeLinear.

    trained model -> onnx_trace.py (the graph, with marks) -> onnx_weights.py (codes for marks) -> onnx_runtime.py

| in training | in the graph |
| --- | --- |
| integers of at most 8 bits, fp8e4m3, fp8e5m2 | INT2 (see `opset`), INT4, INT8, FLOAT8 codes -> DequantizeLinear |
| int8 or uint8 activations of one constant scale | QuantizeLinear -> DequantizeLinear |
| all other quantizers of activations, the KV cache and attention | their arithmetic, operation by operation |
| other weights | float values on their grid, with `--drop codes` |

Weights are what was trained, bit for bit, which is checked when an artifact is loaded. Graph and tensors are two files,
`model.onnx` and `model.onnx.data`, so that models may be larger than the 2 GB of a protobuf message.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlightning.export import pretrained
from qlightning.export.inputs import Call, random_inputs
from qlightning.export.onnx_runtime import SESSION, Runtime
from qlightning.export.onnx_trace import arguments, trace
from qlightning.export.onnx_weights import misfit, store_weights, take_borders
from qlightning.export.plain import rounded
from qlightning.export.target import Plan, Target, Tolerance
from qlightning.export.trained import Layer, Trained, Weight
from qlightning.export.verify import run

FILE, DATA = "model.onnx", "model.onnx.data"


class ONNX(Target):
    """A graph `model.onnx` with its tensors beside it, proven in onnxruntime on the CPU.

    Args:
        opset: Version of the operator set, from 21 on. From 25 on weights of at most 2 bits take 2 bits each, and 4
            before.
        batch: Fixed batch size; any when left out.
        tokens: Fixed number of tokens; any when left out.
    """

    name = "onnx"

    def __init__(self, *, opset: int = 21, batch: int | None = None, tokens: int | None = None) -> None:
        if not 21 <= opset <= 25:
            raise ValueError(f"ONNX(opset={opset}): from 21 to 25, for example options={{'opset': 21}}")
        self.opset = opset
        self.sizes = {name: size for name, size in (("batch", batch), ("tokens", tokens)) if size is not None}

    def refuses(self, trained: Trained, dtype: torch.dtype) -> str | None:
        if dtype != torch.float32:
            return f"onnxruntime computes in float32 on a CPU, not in {dtype}: write dtype='float32' (--dtype float32)"
        return None

    def misfit(self, weight: Weight, dtype: torch.dtype) -> str | None:
        return misfit(weight)

    def misplaced(self, layer: Layer, placement: str, dtype: torch.dtype) -> str | None:
        return None

    def write(self, plan: Plan, folder: Path) -> None:
        import onnx_ir as ir
        from onnx_ir.passes import common

        call = plan.example or random_inputs(plan.trained, batches=1).calls[0]
        call = run(lambda *args, **kwargs: Call(args, kwargs), call, plan.dtype)
        model = trace(_in_dtype(plan), call, opset=self.opset, sizes=self.sizes)
        common.InlinePass()(model)
        common.ClearMetadataAndDocStringPass()(model)  # which is many times the graph
        borders = take_borders(model)
        weights = store_weights(model, plan, opset=self.opset)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        given = arguments(plan.trained.model, call).items()
        facts = {
            "session": SESSION,
            "constants": {name: repr(value) for name, value in given if not isinstance(value, Tensor)},
            "layers": {name: border.names() for name, border in borders.items()},
            "weights": {name: value.name for name, value in weights.items()},
        }
        model.metadata_props["qlightning"] = json.dumps(facts)
        ir.save(model, folder / FILE, external_data=DATA)
        pretrained.write_config(plan.trained, folder, dtype=plan.dtype)

    def load(self, folder: Path, trained: Trained) -> Callable[..., Any]:
        runtime = Runtime(folder / FILE, trained)
        runtime.check_weights(trained)
        return runtime

    def tolerance(self, plan: Plan) -> Tolerance:
        activations = {place for layer in plan.trained.layers for place in layer.activations}
        if plan.dtype != plan.trained.dtype:
            found = rounded(plan)
            return found._replace(sqnr=20.0, layer_sqnr=30.0) if activations else found
        reason = "sums in another order"
        if activations:
            reason += ", after which a value between two codes may become the other one"
        return Tolerance(None, 20.0 if activations else 100.0, 30.0 if "output" in activations else 110.0, reason)


def _in_dtype(plan: Plan) -> Trained:
    """The model in the dtype of the artifact; a copy if it was trained in another one."""
    if plan.trained.dtype == plan.dtype:
        return plan.trained
    return Trained(copy.deepcopy(plan.trained.model).to(plan.dtype))
