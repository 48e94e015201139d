"""An ONNX artifact in onnxruntime on the CPU, called as the trained model is, as a whole and layer by layer.

    session("model/model.onnx").run(None, {"pixel_values": images})

A session has onnxruntime's own optimizations but two, which would compute something else than what was trained: by
default it multiplies weights of up to 8 bits with inputs that it quantizes for that (measured: 45 dB), and on x86
turns int8 activations into uint8, whose products with int8 overflow 16 bits where a CPU has no VNNI (measured: 25 dB).
`SESSION` switches both off, and whoever makes a session of their own sets it, too.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlightning.export.inputs import Call
from qlightning.export.onnx_trace import arguments
from qlightning.export.onnx_weights import float_values
from qlightning.export.trained import Trained

SESSION = {"session.qdq_matmulnbits_accuracy_level": "1", "session.qdqisint8allowed": "1"}
"""Entries of onnxruntime's session config under which it computes what was trained."""


class Runtime(nn.Module):
    """The artifact's graph, with a module of its name for every layer that has quantized weights.

    Args:
        file: The graph.
        trained: What it was made from, for the names of its arguments.
    """

    def __init__(self, file: Path, trained: Trained) -> None:
        import onnx_ir as ir

        super().__init__()
        self.file, self.trained = file, [trained]
        self.graph = ir.load(file)
        self.facts = json.loads(self.graph.metadata_props["qlightning"])
        self.session = session(file)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.fed: dict[str, Any] = {}
        for name, borders in self.facts["layers"].items():
            _insert(self, name, Part(self, borders["inputs"], list(borders["outputs"].values())))

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        given = arguments(self.trained[0].model, Call(args, kwargs))
        self.fed = {name: _array(value) for name, value in given.items() if isinstance(value, Tensor)}
        self._check(given)
        return [torch.from_numpy(output) for output in self.session.run(None, self.fed)]

    def _check(self, given: dict[str, Any]) -> None:
        if set(self.fed) != set(self.inputs):
            raise ValueError(f"the artifact takes {', '.join(self.inputs)}; it was given {', '.join(self.fed)}")
        for name, value in given.items():
            fixed = self.facts["constants"].get(name)
            if name not in self.fed and value is not None and repr(value) != fixed:
                raise ValueError(f"the artifact was written for {name}={fixed}, and was called with {name}={value!r}")

    def part(self, inputs: list[str], outputs: list[str]) -> tuple[Any, list[str]]:
        """A session for the part of the graph between some values, and the inputs of the whole that it needs as well.

        Such as token ids, from which a layer's batch size may be read.
        """
        import onnx_ir as ir

        values = ir.convenience.create_value_mapping(self.graph.graph)
        more = _reached(self.graph.graph, [values[name] for name in outputs], {values[name] for name in inputs})
        graph = ir.convenience.extract(self.graph.graph, [*inputs, *more], outputs)
        bare = ir.to_proto(ir.Model(graph, ir_version=self.graph.ir_version)).SerializeToString()
        folder = {"session.model_external_initializers_file_folder_path": str(self.file.parent)}
        return _session(bare, folder), more

    def weight(self, name: str) -> Tensor:
        """A weight as onnxruntime's DequantizeLinear gives it."""
        found, _ = self.part([], [self.facts["weights"][name]])
        return torch.from_numpy(found.run(None, {})[0])

    def check_weights(self, trained: Trained) -> None:
        """Raise ValueError unless every stored weight is, bit for bit, what its codes mean in float32."""
        for weight in trained.weights:
            if weight.name not in self.facts["weights"]:
                continue
            theirs, ours = self.weight(weight.name), float_values(weight)
            if not torch.equal(theirs.view(ours.shape), ours):
                raise ValueError(f"{weight.name} is not what was trained once onnxruntime has dequantized it")


class Part(nn.Module):
    """One layer of the artifact, with a session of its own.

    Args:
        whole: The artifact.
        inputs: Values by the place or name of the layer's arguments.
        outputs: Values.
    """

    def __init__(self, whole: Runtime, inputs: dict[str, str], outputs: list[str]) -> None:
        super().__init__()
        self.whole, self.inputs, self.outputs = [whole], inputs, outputs
        self.built: tuple[Any, list[str]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        whole = self.whole[0]
        if self.built is None:
            self.built = whole.part(list(dict.fromkeys(self.inputs.values())), self.outputs)
        session, more = self.built
        given = {**{str(i): x for i, x in enumerate(args)}, **kwargs}
        feed = {self.inputs[name]: _array(x) for name, x in given.items() if isinstance(x, Tensor)}
        feed |= {name: whole.fed[name] for name in more}
        return [torch.from_numpy(output) for output in session.run(None, feed)]


def session(file: str | Path) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU that computes what was trained.

    Args:
        file: The graph, with its tensors beside it.
    """
    return _session(str(file), {})


def _session(source: str | bytes, entries: dict[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of graphs that it makes itself
    for name, value in {**SESSION, **entries}.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _reached(graph: Any, outputs: list[Any], borders: set[Any]) -> list[str]:
    """Names of the graph's inputs that outputs depend on other than through the borders."""
    own, pending, seen = set(graph.inputs), list(outputs), set(borders)
    found: list[str] = []
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value in own:
            found.append(value.name)
        elif (node := value.producer()) is not None:
            pending += node.inputs
    return found


def _insert(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root._modules[step]  # type: ignore[assignment]
    root.add_module(last, module)


def _array(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().numpy()
