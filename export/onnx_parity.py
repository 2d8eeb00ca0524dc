"""Parity of the ONNX graph: what ONNX Runtime answers, against torchrec's quantized module and the float32 model.

ONNX adds in another order, so that question 2 is not one of equal bits: the answers differ by no more than the float32
summation bound of `parity.rounding_bounds`. The session has one thread, as its sums depend on how many share them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export.errors import GateError
from export.parity import Case, References, check_surgery, rounding_bounds
from runtime_py.inputs import Request
from runtime_py.manifest import Graph

__all__ = ["check_onnx_parity"]

_QUIET = 4  # onnxruntime prints what it raises, unless told not to


def check_onnx_parity(
    artifact: Path, graph: Graph, references: References, cases: Sequence[Case], seed: int
) -> list[dict[str, Any]]:
    """Runs every case through the graph of a staged artifact; returns the outcome of each, as `parity.check_parity`.

    Raises:
        GateError: ONNX Runtime cannot load or run it, or an answer is too far from either reference.
    """
    import onnxruntime  # only where there is such a graph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _QUIET
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    )  # of 300 features, all take 14 s
    outcomes = []
    try:
        session = onnxruntime.InferenceSession(artifact / graph.path, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        for number, case in enumerate(cases):
            request = case.request(references.slots, seed + number)
            inputs = [part.numpy() for part in request if part is not None]
            [pooled] = session.run(None, dict(zip(names, inputs, strict=True)))
            outcomes.append(_check_case(references, case, request, torch.from_numpy(pooled)))
    except GateError:
        raise
    except Exception as error:  # onnxruntime's own have no base class in common
        raise GateError(f"{graph.path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
    return outcomes


def _check_case(references: References, case: Case, request: Request, pooled: torch.Tensor) -> dict[str, Any]:
    outcome = {"name": case.name, "bags": len(case.bags[0]), "ids": request.values.numel()}
    renumbered = references.renumber(case)
    features = references.features(case, request, renumbered)
    bounds = [rounding_bounds(references, slot, features, renumbered[i]) for i, slot in enumerate(references.slots)]
    if references.surgery is not None:
        noise = {slot.feature: summation for slot, (_, summation) in zip(references.slots, bounds, strict=True)}
        figures, _ = check_surgery(references, case, "the onnx graph", pooled, features, noise)
        return outcome | {"max_error": 0.0, "max_share_of_bound": 0.0} | figures
    return outcome | _check_embeddings(references, case, pooled, features, bounds)


def _check_embeddings(
    references: References,
    case: Case,
    pooled: torch.Tensor,
    features: KeyedJaggedTensor,
    bounds: list[tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    dims = [slot.table.embedding_dim for slot in references.slots]
    bags = len(case.bags[0])
    if pooled.shape != (bags, sum(dims)):
        raise GateError(f"parity case '{case.name}': onnx gives {list(pooled.shape)}, expected {[bags, sum(dims)]}")
    largest = share = 0.0
    if bags:
        quantized, eager = references.quantized(features), references.eager(features)
        columns = pooled.split(dims, dim=1)
        for slot, got, (conversion, summation) in zip(references.slots, columns, bounds, strict=True):
            for expected, bound, what in (
                (quantized[slot.feature], summation, "torchrec's quantized module"),
                (eager[slot.feature], conversion + summation, "the float32 model"),
            ):
                error = np.abs(got.double().numpy() - expected.double().numpy())
                if not (error <= bound).all():
                    bag, column = (int(part) for part in np.argwhere(~(error <= bound))[0])
                    raise GateError(
                        f"parity case '{case.name}': feature '{slot.feature}' (table '{slot.table.name}'), bag {bag}, column "
                        f"{column}: onnx is {error[bag, column]:.6g} from {what}, the bound is {bound[bag, column]:.6g}"
                    )
            largest = max(largest, float(error.max()))
            share = max(share, float(np.divide(error, bound, out=np.zeros_like(error), where=bound > 0).max()))
    return {"max_error": largest, "max_share_of_bound": share}
