"""The surgery in ONNX: torch.onnx exports the module alone, and its nodes are appended to those of the lookup.

It is traced, in the exporter that needs no other package than onnx. What tracing would silently take for a constant (a size,
a value that Python looked at) it warns of: here such a warning is a refusal. The module's parameters are not in the model:
as the tables, they are external data in the weight file.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.jit._trace import TracerWarning

from export.errors import SurgeryError
from export.onnx_graph import EMBEDDINGS, OPSET, point_into_weights
from export.surgery_errors import quiet, reason
from runtime_py.manifest import StoredParameter

if TYPE_CHECKING:
    import onnx

    from export.splice import OpenedSurgery

__all__ = ["export_onnx", "place_parameters"]

_EXAMPLES = 3
_MOST_BYTES = 1 << 20  # of nodes and constants, without the parameters
_PREFIX, _INPUT = EMBEDDINGS.split("/")


def export_onnx(surgery: "OpenedSurgery") -> "onnx.GraphProto":
    """The module as a graph from `EMBEDDINGS` to one output, float32 [B, W], every name with a prefix.

    Its parameters are initializers without data: see `place_parameters`.

    Raises:
        SurgeryError: ONNX cannot express it, or only for what it was traced with.
    """
    model = _trace(surgery)
    for initializer in model.graph.initializer:
        if initializer.name.removeprefix("module.") in surgery.tensors:
            initializer.ClearField("raw_data")
    size = model.ByteSize()
    if size > _MOST_BYTES:
        raise SurgeryError(f"onnx: the graph would hold {size:,} bytes beside the parameters, at most {_MOST_BYTES:,}")
    foreign = sorted({entry.domain for entry in model.opset_import if entry.domain not in ("", "ai.onnx")})
    if foreign or len(model.functions):
        raise SurgeryError(f"onnx: it needs operators that are no standard ones: {', '.join(foreign) or 'functions'}")
    from onnx.compose import add_prefix_graph

    graph: onnx.GraphProto = add_prefix_graph(model.graph, f"{_PREFIX}/")
    return graph


def _trace(surgery: "OpenedSurgery") -> "onnx.ModelProto":
    import onnx

    splice, file = surgery.splice, io.BytesIO()
    example = torch.linspace(-1, 1, _EXAMPLES * sum(splice.feature_dims)).view(_EXAMPLES, -1)
    try:
        with quiet(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.onnx.export(
                splice,
                (example,),
                file,  # type: ignore[arg-type]  # its other exporter takes no file
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,  # a folded parameter would lie in the model
                input_names=[_INPUT],
                output_names=["pooled"],
                dynamic_axes={_INPUT: {0: "B"}, "pooled": {0: "B"}},
            )
        model: onnx.ModelProto = onnx.load_model_from_string(file.getvalue())
    except (Exception, SystemExit) as error:  # torch raises nearly anything here
        raise SurgeryError(f"onnx cannot express it: {reason(error)}") from error
    for warning in warned:
        if issubclass(warning.category, TracerWarning):
            said = str(warning.message).partition(". ")[0]
            raise SurgeryError(f"onnx would hold it only for the batch that it was traced with: {said}")
    shape: Any = model.graph.output[0].type.tensor_type.shape
    shape.dim[1].dim_value = sum(output.dim for output in surgery.outputs)
    return model


def place_parameters(
    graph: "onnx.GraphProto", parameters: Sequence[StoredParameter], weights_offset_bytes: int
) -> None:
    """Says where in the weight file the data of each of the graph's parameters are."""
    by_name = {f"{_PREFIX}/module.{parameter.parameter}": parameter for parameter in parameters}
    for initializer in graph.initializer:
        parameter = by_name.get(initializer.name)
        if parameter is not None:
            if list(initializer.dims) != parameter.dims or math.prod(parameter.dims) < 1:
                raise SurgeryError(
                    f"onnx: torch exports '{parameter.parameter}' as {list(initializer.dims)}, it is {parameter.dims}"
                )
            point_into_weights(initializer, weights_offset_bytes + parameter.offset_bytes, parameter.bytes)
