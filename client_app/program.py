"""A model with its normalisation, and the file that it is as a whole program.

Shapes: B examples, C outputs.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.files import PRIVATE, replace_file

EXPORTING = threading.Lock()
"""torch.export patches torch itself while it runs: no other thread may use a model meanwhile."""

MOST_KNOWN = 8
"""Programs that a process keeps, to put other weights into: tracing a model takes the most time."""
_KNOWN: dict[Hashable, Any] = {}

_OF_SOURCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class Classifier(nn.Module):
    """A model with its normalisation: uint8 pictures (B, C, H, W) in, logits (B, classes) out.

    Without mean and std examples are no pictures, and the model gets them as they are. Numbers
    (B, C) come out in the units of the labels.
    """

    scale: Tensor
    shift: Tensor
    label_mean: Tensor
    label_std: Tensor

    def __init__(
        self, model: nn.Module, mean: Tensor, std: Tensor, label_mean: Tensor, label_std: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("label_mean", label_mean)
        self.register_buffer("label_std", label_std)
        # the same two constants as in training, so that not one rounding differs
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise and classify."""
        if self.scale.numel():
            images = torch.addcmul(self.shift, images, self.scale)
        logits: Tensor = self.model(images)
        return logits * self.label_std + self.label_mean if self.label_std.numel() else logits


def save_program(
    program: tuple[nn.Module, Tensor],
    path: Path,
    require: Callable[[nn.Module], None],
    *,
    maker: Hashable,
) -> None:
    """Export a module to a .pt2 file, for any batch size, if it is what `require` wants.

    What one `maker` makes differs in weights and buffers alone.
    """
    module, example = program
    exported = _exported(module, example, maker)
    packed = io.BytesIO()
    torch.export.save(exported, packed)
    packed.seek(0)
    again = torch.export.load(packed).module()
    if not torch.allclose(again(example), module(example), rtol=1e-4, atol=1e-5):
        raise RuntimeError("the exported program gives other logits than the model")
    require(again)
    replace_file(path, packed.getvalue(), mode=PRIVATE)


def _exported(
    module: nn.Module, example: Tensor, maker: Hashable
) -> Any:  # ExportedProgram, whose import takes seconds
    """Export a module, or put its weights into the program of one from the same maker."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
    key = (maker, shapes, example.shape, example.dtype)
    if known := _KNOWN.get(key):
        for held in (known.state_dict, known.constants):
            held.update({name: tensors[name] for name in held})
        return known
    dynamic = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's own recurrent layers
        found = torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=False)
    _without_source(found.graph_module)
    found.example_inputs = None  # torch would store it pickled; nobody needs it
    if {*found.state_dict, *found.constants} <= tensors.keys():  # nothing else is in it
        while len(_KNOWN) >= MOST_KNOWN:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = found
    return found


def _without_source(module: torch.fx.GraphModule) -> None:
    """Take out of a program what torch notes of its source: lines, paths, names of modules."""
    parts = (part for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    for node in (node for part in parts for node in part.graph.nodes):
        for told in _OF_SOURCE:
            node.meta.pop(told, None)


def save_onnx(program: tuple[nn.Module, Tensor], path: Path) -> None:
    """Export a module to ONNX, for any batch size, if it gives the same outputs there.

    Raises ConfigError where the extra `onnx` is not installed, RuntimeError where outputs differ,
    and whatever torch's exporter does with an operation that ONNX does not have.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"ONNX needs `pip install 'mh-pfedhn[onnx]'` ({error}).") from error
    module, example = program
    dynamic = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        made = torch.onnx.export(
            module, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
    assert made is not None  # with dynamo
    proto = made.model_proto
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        del part.metadata_props[:]  # lines of the model's source, and where it lies
    packed = proto.SerializeToString()
    session = onnxruntime.InferenceSession(packed)
    many = torch.cat([example, example, example])
    (found,) = session.run(None, {session.get_inputs()[0].name: many.numpy()})
    if not torch.allclose(torch.from_numpy(found), module(many), rtol=1e-3, atol=1e-4):
        raise RuntimeError("the ONNX program gives other outputs than the model")
    replace_file(path, packed, mode=PRIVATE)
