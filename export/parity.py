"""Parity questions 2 and 3, asked of the staged artifact through the real loader.

2. Serving: the artifact's output equals, bit for bit, that of torchrec's quantized module over the same stored rows.
3. Quantization: it is within a derived bound of the float32 eager `LargeEmbeddings` over the trained rows.

Where there is a surgery, both are asked of the embeddings that the TorchScript graph pools before it; and what every graph
answers is compared with the module in eager mode (`surgery_parity`).

Both references hold only the rows that the batches name (`Probe`), with ids renumbered, so that their size does not
depend on the tables'. An id outside its table is given to them as the number of an extra row of zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantizedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from export.accuracy import ProbeRows, dequantize
from export.config import DataType, EmbeddingBagConfig, LargeEmbeddingsConfig, Precision
from export.errors import GateError
from export.large_embeddings import LargeEmbeddings, torchrec_tables
from export.quantize import SCALE_BIAS_BYTES, levels, quantized
from export.splice import OpenedSurgery
from export.surgery_parity import check_answer, surgery_bound
from runtime_py import Artifact, InvalidInputError, load_artifact
from runtime_py.golden import GoldenCase
from runtime_py.inputs import Request
from runtime_py.manifest import ParitySummary
from runtime_py.manifest_reader import read_manifest

__all__ = [
    "Case",
    "References",
    "Slot",
    "check_parity",
    "check_surgery",
    "make_cases",
    "make_slots",
    "probe_ids",
    "rounding_bounds",
]

_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class Slot:
    """One feature and its table, in graph order."""

    feature: str
    table: EmbeddingBagConfig


@dataclass(frozen=True)
class Case:
    """One batch: for every slot, B bags of ids."""

    name: str
    bags: list[list[np.ndarray]]  # by slot, then by bag
    random: bool = False

    def request(self, slots: Sequence[Slot], seed: int) -> Request:
        """The batch in the raw signature; weights, where a slot takes them, are drawn from `seed`."""
        lengths = [len(bag) for feature in self.bags for bag in feature]
        values = np.concatenate([np.empty(0, np.int64), *(bag for feature in self.bags for bag in feature)])
        weights = None
        if any(slot.table.weighted for slot in slots):
            drawn = np.random.default_rng(seed).normal(1.0, 1.0, len(values)).astype(np.float32)
            weights = torch.from_numpy(drawn)
        return Request(torch.from_numpy(values), torch.tensor(lengths, dtype=torch.int32), weights)


def make_slots(config: LargeEmbeddingsConfig) -> list[Slot]:
    """Every feature with its table, in the order of `EmbeddingBagCollection`'s output: tables, then their features."""
    return [Slot(feature, table) for table in config.tables for feature in table.features]


# --- Batches -------------------------------------------------------------------------------------------------------


def make_cases(config: LargeEmbeddingsConfig, seed: int, batches: int) -> list[Case]:
    """The adversarial batches, then `batches` random ones."""
    slots = make_slots(config)
    rows = [slot.table.num_embeddings for slot in slots]
    rng = np.random.default_rng(seed)

    def case(name: str, bags: Callable[[int], list[list[int]]]) -> Case:
        return Case(name, [[np.array(bag, np.int64) for bag in bags(count)] for count in rows])

    cases = [
        case("no bags", lambda _: []),
        case("empty bags", lambda _: [[], [], []]),
        case("one bag", lambda count: [[0, count // 2]]),
        case("first and last row", lambda count: [[0], [count - 1], [0, count - 1], []]),
        case("duplicate ids", lambda count: [[count - 1] * 5, [0, 0], [count // 3, 0, count // 3]]),
        case(
            "ids out of range",
            lambda count: [
                [-1],
                [count],
                [0, count, 0],
                [int(_INT64.min), count - 1, int(_INT64.max)],
                [count + 1, -2],
                [],
            ],
        ),
    ]
    for number in range(batches):
        batch = int(rng.integers(1, 33))
        bags = [[rng.integers(0, count, rng.integers(0, 9)) for _ in range(batch)] for count in rows]
        cases.append(Case(f"random {number}", bags, random=True))
    return cases


def probe_ids(config: LargeEmbeddingsConfig, cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """Table name to the ids, ascending and inside the table, that the cases look up."""
    ids: dict[str, list[np.ndarray]] = {table.name: [np.empty(0, np.int64)] for table in config.tables}
    for number, slot in enumerate(make_slots(config)):
        ids[slot.table.name] += [bag for case in cases for bag in case.bags[number]]
    result = {}
    for table in config.tables:
        unique = np.unique(np.concatenate(ids[table.name]))
        result[table.name] = unique[(unique >= 0) & (unique < table.num_embeddings)]
    return result


# --- References ----------------------------------------------------------------------------------------------------


class References:
    """torchrec's quantized module and the eager float32 model, over the probe rows only."""

    def __init__(
        self,
        config: LargeEmbeddingsConfig,
        precisions: Mapping[str, Precision],
        probes: Mapping[str, ProbeRows],
        surgery: OpenedSurgery | None = None,
    ) -> None:
        self.slots = make_slots(config)
        self.surgery = surgery
        self._probes = probes
        small = config.model_copy(
            update={
                "tables": [
                    table.model_copy(
                        update={"num_embeddings": len(probes[table.name].ids) + 1, "data_type": DataType.FP32}
                    )
                    for table in config.tables
                ]
            }
        )
        self.trained = {name: torch.nn.functional.pad(probe.trained, (0, 0, 0, 1)) for name, probe in probes.items()}
        stored = {name: torch.nn.functional.pad(probe.stored, (0, 0, 0, 1)) for name, probe in probes.items()}
        self._eager = [self._eager_model(small, weighted) for weighted in (False, True)]
        tables = torchrec_tables(small)
        for table in tables:
            table.data_type = type(table.data_type)[precisions[table.name].name]
        self._quantized = QuantizedEmbeddingBagCollection(
            tables,
            config.weighted,
            torch.device("cpu"),
            table_name_to_quantized_weights={
                name: _as_torchrec_has_them(rows, precisions[name]) for name, rows in stored.items()
            },
        )
        # What a row adds to a sum: a value, or a code times the scale, and the bias.
        self.terms = {name: 2 if quantized(precisions[name]) else 1 for name in self.trained}
        self.magnitudes, self.error_bounds = {}, {}
        for name, rows in self.trained.items():
            measured = _bound_rows(rows, stored[name], precisions[name])
            self.magnitudes[name], self.error_bounds[name] = measured

    def _eager_model(self, config: LargeEmbeddingsConfig, weighted: bool) -> LargeEmbeddings:
        """The weighted or the other tables; eager torch takes no weights where any table of a collection pools by mean."""
        tables = [table for table in config.tables if table.weighted == weighted]
        model = LargeEmbeddings(config.model_copy(update={"tables": tables}))
        model.fill({table.name: self.trained[table.name] for table in tables})
        return model

    def renumber(self, case: Case) -> list[list[np.ndarray]]:
        """The case's ids as numbers of probe rows; an id outside its table as the row of zeros."""
        renumbered = []
        for slot, bags in zip(self.slots, case.bags, strict=True):
            ids = self._probes[slot.table.name].ids
            inside = [(bag >= 0) & (bag < slot.table.num_embeddings) for bag in bags]
            renumbered.append(
                [np.where(known, np.searchsorted(ids, bag), len(ids)) for bag, known in zip(bags, inside, strict=True)]
            )
        return renumbered

    def features(self, case: Case, request: Request, renumbered: list[list[np.ndarray]]) -> KeyedJaggedTensor:
        """The case, with its `renumbered` ids, as both references take it."""
        numbers = [bag for bags in renumbered for bag in bags]
        weights = request.per_sample_weights
        if weights is not None:
            parts = weights.split([sum(len(bag) for bag in bags) for bags in case.bags])
            weights = torch.cat(
                [
                    part if slot.table.weighted else torch.ones_like(part)
                    for slot, part in zip(self.slots, parts, strict=True)
                ]
            )
        return KeyedJaggedTensor(
            keys=[slot.feature for slot in self.slots],
            values=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *numbers])),
            lengths=request.lengths,
            weights=weights,
        )

    def quantized(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """torchrec's quantized module, float32 [B, D] by feature."""
        result: dict[str, torch.Tensor] = self._quantized(features).to_dict()
        return result

    def eager(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """The float32 eager model, float32 [B, D] by feature."""
        with torch.no_grad():
            pooled = [model(features).to_dict() for model in self._eager if len(model.ebc.embedding_bags)]
        return {key: values for part in pooled for key, values in part.items()}


def _as_torchrec_has_them(stored: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored rows as torchrec's module takes them: values or codes, and scale and bias apart."""
    if quantized(precision):
        return stored[:, SCALE_BIAS_BYTES:], stored[:, :SCALE_BIAS_BYTES]
    return stored.view(torch.uint8), None


def _bound_rows(trained: torch.Tensor, stored: torch.Tensor, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """The magnitudes of what a lookup adds up, and the largest error that storing may make, each float64 [n, D].

    fp32 stores what it gets. fp16 rounds to nearest: half a unit in the last of 11 bits, 2**-11 |x|, and half of 2**-24
    below the normal range (IEEE 754 binary16). A quantized row stands for a grid from bias to bias + levels * scale, steps of
    scale apart: a value is off by half a step, by what the float32 arithmetic of the codes may shift that (each of three
    operations by a relative 2**-24, of at most `levels` steps), and by how far it is outside of the grid, whose ends
    were rounded to fp16. Its lookup adds code * scale and bias, which may be larger than their sum.
    """
    magnitudes = trained.double().abs().numpy()
    if precision is Precision.FP32:
        return magnitudes, np.zeros_like(magnitudes)
    if precision is Precision.FP16:
        return magnitudes, np.maximum(magnitudes * 2.0**-11, 2.0**-25)
    x, y = trained.double().numpy(), dequantize(stored, trained.shape[1], precision).double().numpy()
    scale, bias = stored[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).double().numpy().T[:, :, None]
    top = levels(precision)
    ends = np.stack([bias, bias + top * scale])
    outside = np.maximum(np.maximum(ends.min(0) - x, x - ends.max(0)), 0.0)
    error = np.abs(scale) * (0.5 + 4 * top * 2.0**-24) + outside + 2.0**-24 * np.abs(y)
    return np.maximum(magnitudes, np.abs(y - bias) + np.abs(bias)), error


# --- Checks --------------------------------------------------------------------------------------------------------


def check_parity(
    artifact: Path,
    config: LargeEmbeddingsConfig,
    precisions: Mapping[str, Precision],
    cases: Sequence[Case],
    probes: Mapping[str, ProbeRows],
    seed: int,
    surgery: OpenedSurgery | None = None,
) -> tuple[ParitySummary, list[dict[str, Any]], dict[str, GoldenCase]]:
    """Runs every case through the staged artifact and both references.

    The artifact's digests are compared before, by whoever calls.

    Returns:
        the summary, each case's outcome, and the answers to keep as golden cases.

    Raises:
        GateError: naming the case, the feature, its table, the place and the numbers.
    """
    wanted = probe_ids(config, cases)  # the others are for measuring lookups
    chosen = {name: probe.only(wanted[name]) for name, probe in probes.items()}
    references = References(config, precisions, chosen, surgery)
    serving = "bit-equal to torchrec's quantized EmbeddingBagCollection"
    results = []
    golden = {}
    manifest = read_manifest(artifact)
    if surgery is not None and manifest.surgery is not None:
        surgery.place_like(manifest.surgery.parameters)
    for graph in manifest.graphs:
        name = f"{graph.backend} for {graph.target}"
        if graph.backend == "onnx":
            from export.onnx_parity import check_onnx_parity  # ONNX Runtime only where there is such a graph

            outcomes = check_onnx_parity(artifact, graph, references, cases, seed)
            results += [{"graph": name, **outcome} for outcome in outcomes]
            if surgery is None:
                serving += "; onnx within the bound of float32 sums"
            continue
        strict = load_artifact(artifact, backend=graph.backend, verify="sizes", invalid_ids="error")
        lenient = strict.with_invalid_ids("zero")
        for number, case in enumerate(cases):
            request = case.request(references.slots, seed + number)
            outcome, answer = _check_case(strict, lenient, references, case, request)
            strict.release_pages()  # the kernel maps 64 KiB around every row
            results.append({"graph": name, **outcome})
            kept = f"{number:02} {case.name}"
            if kept not in golden and (not case.random or not any(kept.random for kept in cases[:number])):
                golden[kept] = GoldenCase(request, *answer)  # without a surgery, every torch graph answers so
    if surgery is not None:
        serving += _describe_surgery(surgery, results)
    summary = ParitySummary(
        seed=seed,
        cases=len(cases),
        serving=serving,
        quantization_max_error=max(result["max_error"] for result in results),
        quantization_max_share_of_bound=max(result["max_share_of_bound"] for result in results),
    )
    return summary, results, golden


def _describe_surgery(surgery: OpenedSurgery, results: Sequence[dict[str, Any]]) -> str:
    """What is said of the surgery, graph by graph."""
    shares: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        shares.setdefault(result["graph"].split()[0], []).append(result)
    said = [
        f"{graph} bit-equal"
        if all(result["surgery_bit_equal"] for result in found)
        else f"{graph} within {max(result['surgery_max_share_of_bound'] for result in found):.2g} of its rounding bound"
        for graph, found in shares.items()
    ]
    return f"; after it, {surgery.config.module} as in eager mode: {', '.join(said)}"


def _check_case(
    strict: Artifact, lenient: Artifact, references: References, case: Case, request: Request
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor | None]]:
    """The outcome of a case; and the answer with, where there is a surgery, how far from it another right one may be."""
    bad = _has_invalid_ids(case, references.slots)
    artifact = lenient if bad else strict
    before = [None if part is None else part.clone() for part in request]
    answer = artifact.lookup(*request)
    if not all(old is None or new is None or torch.equal(old, new) for old, new in zip(before, request, strict=True)):
        raise GateError(f"parity case '{case.name}': the artifact changed its caller's tensors")
    if bad:
        _check_refusal(strict, case, request)
    _check_graph_alone(artifact, case, request, answer)
    _check_strided(artifact, case, request, answer)
    _check_permuted(artifact, case, request, references.slots, answer)
    renumbered = references.renumber(case)
    features = references.features(case, request, renumbered)
    outcome = {"name": case.name, "bags": len(case.bags[0]), "ids": request.values.numel()}
    if references.surgery is None:
        return outcome | _check_embeddings(references, case, answer, features, renumbered), (answer, None)
    if artifact.backend == "torchscript":
        outcome |= _check_embeddings(references, case, artifact.pool(*request), features, renumbered)
    else:  # its embeddings are not to be had
        outcome |= {"max_error": 0.0, "max_share_of_bound": 0.0}
    figures, tolerance = check_surgery(references, case, f"the {artifact.backend} graph", answer, features)
    return outcome | figures, (answer, tolerance)


def _check_embeddings(
    references: References,
    case: Case,
    pooled: torch.Tensor,
    features: KeyedJaggedTensor,
    renumbered: list[list[np.ndarray]],
) -> dict[str, Any]:
    """Asks both questions of the embeddings [B, sum(D)] of a batch."""
    if pooled.shape != (len(case.bags[0]), sum(_dims(references))):
        expected = [len(case.bags[0]), sum(_dims(references))]
        raise GateError(f"parity case '{case.name}': shape {list(pooled.shape)}, expected {expected}")
    largest = share = 0.0
    if case.bags[0]:  # the references have no form for a batch of none; the shape is all there is to compare
        quantized, eager = references.quantized(features), references.eager(features)
        columns = pooled.split(_dims(references), dim=1)
        for number, (slot, got) in enumerate(zip(references.slots, columns, strict=True)):
            _check_equal(case, slot, got, quantized[slot.feature])
            conversion, summation = rounding_bounds(references, slot, features, renumbered[number])
            bound = conversion + summation
            error = np.abs(got.double().numpy() - eager[slot.feature].double().numpy())
            _check_bound(case, slot, error, bound)
            largest = max(largest, float(error.max()))
            share = max(share, float(np.divide(error, bound, out=np.zeros_like(error), where=bound > 0).max()))
    return {"max_error": largest, "max_share_of_bound": share}


def check_surgery(
    references: References,
    case: Case,
    graph: str,
    answer: torch.Tensor,
    features: KeyedJaggedTensor,
    noise: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Compares an answer with the module in eager mode; returns figures, and the distance of two right answers.

    `noise` says how far the graph's embeddings may be from torchrec's, float64 [B, D] by feature.

    Raises:
        GateError: naming the case, the output, the place and the numbers.
    """
    surgery = references.surgery
    if surgery is None:
        raise ValueError("the release has no surgery")
    where = f"parity case '{case.name}': {graph}"
    expected = [len(case.bags[0]), sum(output.dim for output in surgery.outputs)]
    if list(answer.shape) != expected:
        raise GateError(f"{where}: shape {list(answer.shape)}, expected {expected}")
    pooled = {slot.feature: torch.empty(0, slot.table.embedding_dim) for slot in references.slots}
    if case.bags[0]:
        quantized = references.quantized(features)  # in torchrec's order; a module may read the order of the features
        pooled = {name: quantized[name] for name in pooled}
    bound = surgery_bound(surgery, pooled, noise)
    figures = check_answer(where, surgery.outputs, answer, surgery(pooled), bound)
    most = np.finfo(np.float32).max  # as nothing is within infinity of a number
    tolerance = torch.from_numpy(np.nextafter(np.minimum(2 * bound, most / 2).astype(np.float32), most))
    return figures, tolerance


def _dims(references: References) -> list[int]:
    return [slot.table.embedding_dim for slot in references.slots]


def _has_invalid_ids(case: Case, slots: Sequence[Slot]) -> bool:
    return any(
        bool(((bag < 0) | (bag >= slot.table.num_embeddings)).any())
        for slot, bags in zip(slots, case.bags, strict=True)
        for bag in bags
    )


def _check_refusal(strict: Artifact, case: Case, request: Request) -> None:
    try:
        strict.lookup(*request)
    except InvalidInputError:
        return
    raise GateError(f"parity case '{case.name}': the loader accepted an id outside its table")


def _check_graph_alone(artifact: Artifact, case: Case, request: Request, pooled: torch.Tensor) -> None:
    """The graph as a reader calls it that leaves all checks to it gives the same answer."""
    inputs = [part for part in request if part is not None]
    if not _same_bits(artifact.graph(*inputs), pooled):
        raise GateError(f"parity case '{case.name}': the graph's own checks give another answer than the loader's")


def _check_strided(artifact: Artifact, case: Case, request: Request, pooled: torch.Tensor) -> None:
    """The same batch in tensors whose values do not lie side by side gives the same answer."""
    strided = [None if part is None else torch.stack([part, part + 1], dim=1)[:, 0] for part in request]
    if not _same_bits(artifact.lookup(*strided), pooled):  # type: ignore[arg-type]
        raise GateError(f"parity case '{case.name}': another memory layout of the request gives another answer")


def _check_permuted(
    artifact: Artifact, case: Case, request: Request, slots: Sequence[Slot], pooled: torch.Tensor
) -> None:
    """The same batch with its features in reverse order, by name, gives the same answer."""
    counts = [sum(len(bag) for bag in bags) for bags in case.bags]
    weights = request.per_sample_weights
    reverse = KeyedJaggedTensor(
        keys=[slot.feature for slot in reversed(slots)],
        values=torch.cat(request.values.split(counts)[::-1]),
        lengths=request.lengths.view(len(slots), -1).flip(0).reshape(-1),
        weights=None if weights is None else torch.cat(weights.split(counts)[::-1]),
    )
    if not _same_bits(artifact(reverse).values, pooled):
        raise GateError(f"parity case '{case.name}': another order of the features gives another answer")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


def _check_equal(case: Case, slot: Slot, got: torch.Tensor, expected: torch.Tensor) -> None:
    if not _same_bits(got, expected):
        different = got.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
        bag, column = different.nonzero()[0].tolist()
        raise GateError(
            f"parity case '{case.name}': feature '{slot.feature}' (table '{slot.table.name}'), bag {bag}, column {column}: "
            f"the artifact gives {got[bag, column].item()!r}, torchrec's quantized module {expected[bag, column].item()!r}"
        )


def rounding_bounds(
    references: References, slot: Slot, features: KeyedJaggedTensor, rows: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The largest distance of a slot that storing rows explains, and that of adding them up, each float64 [B, D].

    Storing a row is off by at most what `_bound_rows` says. A float32 sum of L products, in any order, fused or not, is off
    by at most gamma(L) * sum |w x|, gamma(k) = k u / (1 - k u), u = 2**-24 (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1); a quantized row adds two products, and mean pooling two roundings. Both sides sum, hence twice.
    """
    table = slot.table.name
    weights = np.ones(sum(len(bag) for bag in rows))
    if features.weights_or_none() is not None:
        weights = features[slot.feature].weights().abs().double().numpy()
    magnitudes, errors = references.magnitudes[table], references.error_bounds[table]
    bounds = np.zeros((2, len(rows), slot.table.embedding_dim))
    start = 0
    for bag, ids in enumerate(rows):
        scale = weights[start : start + len(ids), None]
        start += len(ids)
        conversion = (scale * errors[ids]).sum(0)
        k = (references.terms[table] * (len(ids) + 1) + 2) * 2.0**-24
        summation = 2 * k / (1 - k) * ((scale * magnitudes[ids]).sum(0) + conversion)
        mean = len(ids) if slot.table.pooling == "mean" and len(ids) else 1
        bounds[:, bag] = conversion / mean, summation / mean
    return bounds[0], bounds[1]


def _check_bound(case: Case, slot: Slot, error: np.ndarray, bound: np.ndarray) -> None:
    if not (error <= bound).all():
        bag, column = (int(part) for part in np.argwhere(~(error <= bound))[0])
        raise GateError(
            f"parity case '{case.name}': feature '{slot.feature}' (table '{slot.table.name}'), bag {bag}, column {column}: "
            f"the artifact is {error[bag, column]:.6g} from the float32 model, the bound is {bound[bag, column]:.6g}"
        )
