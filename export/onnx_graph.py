"""The ONNX graph: the same lookup in standard operators, its rows where they lie in the weight file.

It exists for servers that run ONNX Runtime and no torch. Tables are initializers whose external data point into the
artifact's one weight file, so the graph is small whatever they hold, and ONNX Runtime maps them. Only operators of opset
18 are used, and neither Loop, Scan nor If: torch.onnx makes an EmbeddingBag a Loop over bags, which is what is slow.

How a bag is added up. ScatterND with the reduction "add" would be the obvious segment sum, and is wrong: ONNX Runtime's
threads add to one row without a lock where an index occurs twice (with four threads one run of five lost 37 % of a sum).
ScatterElements adds on one thread, in 15 ns a value, 70 times as long. So every bag is cut along the binary digits of its
length: 13 ids are a piece of 8, one of 4 and one of 1. All pieces of one size are a dense [m, size, D] that Gather and
ReduceSum take at full speed, without padding, and each bag has at most one piece of a size, so that no index of a ScatterND
occurs twice. What exceeds 127 ids is cut into pieces of 128, of which a bag may have many: ScatterElements adds their sums,
one row for every 128.

Ids outside their table are taken out before that, with their weights, and count in a mean. Lengths that are negative, that
do not add up to N or that F does not divide raise in ONNX Runtime (Reshape; in the first two cases it is the node
`lengths_add_up`), before anything is looked up, and so does another number of weights than N (`weights_add_up`); and its
operators check every index that they are given.

How far from TorchScript. The order of the additions is another one (that of ReduceSum depends on the number of threads and
of pieces, so that a bag may differ in its last bits from batch to batch), a product with a weight is rounded before it is
added, and a quantized value is code * scale + bias, rounded once, where FBGEMM adds both to the sum. Of a bag of L ids, a
term goes through at most L + 3 roundings here: one each for value and weight, L - 1 additions, two for a mean. A sum is
then within gamma(L + 3) * sum |w| m of the exact one, gamma(k) = k u / (1 - k u), u = 2**-24, whatever its order (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1); m is |x| of a value, and |code * scale| + |bias| of a quantized
one. FBGEMM makes at most t (L + 1) + 2 roundings, t = 2 for quantized rows and else 1, which is no fewer. So the two differ
by at most 2 gamma(t (L + 1) + 2) * sum |w| m, divided by L for a mean, as in `export.parity`; unless a sum overflows or is
subnormal. Sums of fp32 and fp16 rows without weights are bit-equal for bags of at most five ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.publish import write_file
from runtime_py.manifest import ROW_FORMATS, WEIGHTS, Feature, Table

if TYPE_CHECKING:  # a configuration is read, and most artifacts are built, without onnx
    import onnx

__all__ = ["EMBEDDINGS", "OPSET", "point_into_weights", "write_onnx"]

OPSET = 18  # the first with BitwiseAnd and with ScatterND's reductions as they are; ONNX Runtime 1.14 and later
IR_VERSION = 8  # the one of opset 18
EMBEDDINGS = "surgery/embeddings"  # what a surgery takes, float32 [B, sum(D)]

_CHUNK = 128  # ids in the largest piece; its power of two levels below cost some operators each
_SCALE_BIAS_BYTES = ROW_FORMATS["int8"].scale_bias_bytes
_SINGLE = 4  # pieces up to this size are gathered id by id and added: ReduceSum is slow over few rows


def write_onnx(
    tables: Sequence[Table],
    features: Sequence[Feature],
    weights_offset_bytes: int,
    path: Path,
    surgery: "onnx.GraphProto | None" = None,
) -> None:
    """Writes the lookup over `features`, in their order, to `path`, in the folder that holds `weights/`.

    Inputs `values` int64 [N], `lengths` int32 [F * B] and, where a feature is weighted, `per_sample_weights` float32 [N];
    output `pooled` float32 [B, sum(D)]. The bytes are a function of the arguments and the version of onnx.

    Args:
        tables: as in the manifest; those without a feature are left out.
        features: the inputs, in graph order.
        weights_offset_bytes: where the data of the weight file starts.
        path: the file; its folder exists. The weight file need not exist yet.
        surgery: what the pooled embeddings go through, with the input `EMBEDDINGS` and one output, float32 [B, W]; see
            `export.onnx_surgery`.
    """
    by_name = {table.name: table for table in tables}
    slots = [_Slot(feature, by_name[feature.table]) for feature in features]
    graph = _Graph()
    weighted = any(feature.weighted for feature in features)
    for name in dict.fromkeys(feature.table for feature in features):
        graph.add_table(by_name[name], weights_offset_bytes)
    batch = _read_batch(graph, slots, weighted=weighted)
    levels = _cut_bags(graph, len(slots), batch)
    blocks = [_pool(graph, number, slot, batch, levels) for number, slot in enumerate(slots)]
    total_dim = sum(slot.table.embedding_dim for slot in slots)
    if surgery is None:
        graph.add("Concat", *blocks, output="pooled", axis=1)
    else:
        graph.add("Concat", *blocks, output=EMBEDDINGS, axis=1)
        graph.extend(surgery)
        graph.add("Identity", surgery.output[0].name, output="pooled")
        total_dim = surgery.output[0].type.tensor_type.shape.dim[1].dim_value
    write_file(path, graph.model(total_dim, weighted=weighted).SerializeToString(deterministic=True))


@dataclass(frozen=True)
class _Slot:
    """One feature and its table."""

    feature: Feature
    table: Table

    @property
    def bits(self) -> int:
        """Bits of a code, or 0 of rows that are not quantized."""
        row_format = ROW_FORMATS[self.table.serving_precision]
        return row_format.bits if row_format.scale_bias_bytes else 0


class _Graph:
    """Nodes and constants under construction. Values are known by their names, which `add` returns."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names = 0

    def _new_name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def add(self, operator: str, *inputs: str, output: str = "", name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        from onnx import helper

        output = output or self._new_name()
        self._nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def split(self, value: str, counts: str, parts: int) -> list[str]:
        """Cuts `value` along its first axis into `parts`, of as many rows each as the int64 [parts] `counts` says."""
        from onnx import helper

        outputs = [self._new_name() for _ in range(parts)]
        self._nodes.append(helper.make_node("Split", [value, counts], outputs, axis=0))
        return outputs

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant; equal ones are one."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._new_name()
            self._initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def cast(self, value: str, to: str) -> str:
        """`value` as the type of that name in TensorProto."""
        from onnx import TensorProto

        return self.add("Cast", value, to=TensorProto.DataType.Value(to))

    def zeros(self, shape: str, dtype: Any) -> str:
        """Zeros of the shape that the int64 [rank] `shape` says."""
        from onnx import numpy_helper

        return self.add("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, dtype)))

    def columns(self, value: str, start: int, end: int) -> str:
        """The columns from `start` up to, not including, `end`."""
        return self.add("Slice", value, *(self.constant([number]) for number in (start, end, 1)))

    def extend(self, other: "onnx.GraphProto") -> None:
        """Takes over the nodes and the constants of another graph, whose names none of this one has."""
        self._nodes.extend(other.node)
        self._initializers.extend(other.initializer)

    def add_table(self, table: Table, weights_offset_bytes: int) -> None:
        """An initializer whose data are the table's rows in the weight file."""
        from onnx import TensorProto

        types = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8}
        tensor = TensorProto(name=_rows(table), data_type=types[table.dtype], dims=table.shape)
        point_into_weights(tensor, weights_offset_bytes + table.offset_bytes, table.bytes)
        self._initializers.append(tensor)

    def model(self, total_dim: int, *, weighted: bool) -> "onnx.ModelProto":
        """The finished model."""
        from onnx import TensorProto, helper

        inputs = [
            helper.make_tensor_value_info("values", TensorProto.INT64, ["N"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["F*B"]),
        ]
        if weighted:
            inputs.append(helper.make_tensor_value_info("per_sample_weights", TensorProto.FLOAT, ["N"]))
        output = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", total_dim])
        graph = helper.make_graph(self._nodes, "lookup", inputs, [output], self._initializers)
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="large-embeddings-export",
        )


def point_into_weights(tensor: "onnx.TensorProto", offset_bytes: int, length_bytes: int) -> None:
    """Makes bytes of the weight file the data of an initializer."""
    from onnx import TensorProto

    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": offset_bytes, "length": length_bytes}.items():
        tensor.external_data.add(key=key, value=str(value))


def _rows(table: Table) -> str:
    """The name of a table's initializer, which no other value has."""
    return f"tables/{table.name}"


# --- All features at once: whole numbers only ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The batch without the ids outside their tables. K ids are left; bags are numbered feature by feature."""

    bags: str  # int64 [1]: B
    ids: str  # int64 [K]
    weights: str  # float32 [K], or ""
    lengths: str  # int64 [F * B]: ids left in each bag
    starts: str  # int64 [F * B]: where they start
    reciprocals: str  # float32 [F, B, 1]: of the lengths as they were given, of 0 as of 1


def _read_batch(graph: _Graph, slots: Sequence[_Slot], *, weighted: bool) -> _Batch:
    add, constant = graph.add, graph.constant
    features, first = len(slots), constant(0)
    lengths = add("Max", graph.cast("lengths", "INT64"), constant([0]))
    by_feature = add("Reshape", lengths, constant([features, -1]))
    total = add("ReduceSum", lengths, constant([0]))
    negative = add(
        "ReduceSum", graph.cast(add("Less", graph.cast("lengths", "INT64"), constant(0)), "INT64"), constant([0])
    )
    # -2 is no shape, and so no values have it.
    expected = add("Where", add("Greater", negative, constant(0)), constant([-2]), total)
    values = add("Reshape", "values", expected, name="lengths_add_up", allowzero=1)

    # ONNX Runtime does not hold two inputs of one size to that, and Compress passes over what is too much.
    weights = add("Reshape", "per_sample_weights", total, name="weights_add_up", allowzero=1) if weighted else ""

    # The limit of every value: the differences between features, added up along the values.
    limits = np.array([slot.table.num_embeddings for slot in slots])
    feature_starts = add("CumSum", add("ReduceSum", by_feature, constant([1]), keepdims=0), first, exclusive=1)
    # One more, for features at the end that have no ids. From the values: lengths may add up to more than fits in memory.
    steps = graph.zeros(add("Add", add("Shape", values), constant([1])), np.int64)
    changes = constant(np.diff(limits, prepend=0))
    steps = add("ScatterElements", steps, feature_starts, changes, axis=0, reduction="add")
    limit = add("Slice", add("CumSum", steps, first), constant([0]), constant([-1]))
    inside = add("And", add("GreaterOrEqual", values, constant(0)), add("Less", values, limit))

    ends = add("CumSum", lengths, first)
    kept = add("CumSum", graph.cast(inside, "INT64"), first)
    kept = add("Concat", constant([0]), kept, axis=0)  # [N + 1]: how many are left of those before
    kept_ends = add("GatherElements", kept, ends)
    kept_starts = add("GatherElements", kept, add("Sub", ends, lengths))
    kept_lengths = add("Sub", kept_ends, kept_starts)
    reciprocals = ""
    if any(slot.feature.pooling == "mean" for slot in slots):
        divisors = graph.cast(add("Max", by_feature, constant(1)), "FLOAT")
        reciprocals = add("Div", constant(1, np.float32), add("Unsqueeze", divisors, constant([2])))
    return _Batch(
        bags=add("Shape", by_feature, start=1),
        ids=add("Compress", values, inside, axis=0),
        weights=add("Compress", weights, inside, axis=0) if weighted else "",
        lengths=kept_lengths,
        starts=kept_starts,
        reciprocals=reciprocals,
    )


@dataclass(frozen=True)
class _Part:
    """What a level adds up, of each feature: one id of every piece [m], or all `size` of them [m, size]."""

    ids: list[str]  # int64
    weights: list[str]  # float32 [m, 1], or [m, 1, size] to multiply rows with; none without weights


@dataclass(frozen=True)
class _Level:
    """The pieces of one size: m of a feature, in the bags [m, 1]."""

    size: int
    bags: list[str]
    parts: list[_Part]
    counts: str  # int64 [F]: m of each feature

    @property
    def single(self) -> bool:
        """Whether a part is one id of every piece."""
        return self.size <= _SINGLE


def _cut_bags(graph: _Graph, features: int, batch: _Batch) -> list[_Level]:
    """Every bag as pieces, the largest first, in the order of its ids."""
    add, constant, first, grid = graph.add, graph.constant, graph.constant(0), graph.constant([features, -1])
    numbers = add("Range", first, add("Size", batch.lengths), constant(1))  # of all F * B bags
    counter = add("Range", first, add("Squeeze", batch.bags), constant(1))
    shape = add("Concat", constant([features]), batch.bags, axis=0)
    bags = add("Reshape", add("Expand", counter, shape), constant([-1]))  # number within the feature

    def level(size: int, chosen: str, starts: str, ids: str) -> _Level:
        """The pieces at `starts` [M], of the bags `chosen` [M]; `ids` [F * B]: how many of a bag's are in such."""
        total = add("ReduceSum", add("Reshape", ids, grid), constant([1]), keepdims=0)
        counts = add("Div", total, constant(size))
        local = add("Unsqueeze", add("GatherElements", bags, chosen), constant([1]))
        parts = [
            _make_part(graph, features, batch, size, add("Add", starts, constant(offset)), counts)
            for offset in (range(size) if size <= _SINGLE else [0])
        ]
        return _Level(size, graph.split(local, counts, features), parts, counts)

    short = add("BitwiseAnd", batch.lengths, constant(_CHUNK - 1))
    long = add("Sub", batch.lengths, short)
    levels = [level(_CHUNK, *_list_chunks(graph, numbers, batch.starts, long), long)]
    cursor = add("Add", batch.starts, long)
    size = _CHUNK // 2
    while size:
        digit = add("BitwiseAnd", short, constant(size))
        chosen = add("Compress", numbers, graph.cast(digit, "BOOL"), axis=0)
        levels.append(level(size, chosen, add("GatherElements", cursor, chosen), digit))
        cursor = add("Add", cursor, digit)
        size //= 2
    return levels


def _list_chunks(graph: _Graph, numbers: str, starts: str, long: str) -> tuple[str, str]:
    """The bag of every piece of `_CHUNK` ids, and where the piece starts, both int64 [M]; `long`: a bag's ids in such."""
    add, constant, first = graph.add, graph.constant, graph.constant(0)
    bags = add("Compress", numbers, graph.cast(long, "BOOL"), axis=0)
    chunks = add("Div", add("GatherElements", long, bags), constant(_CHUNK))
    ends = add("CumSum", chunks, first)
    total = add("ReduceSum", chunks, constant([0]))
    # The bag of a chunk: as many as have ended before it. Every bag here has a chunk, so no end occurs twice.
    marks = graph.zeros(add("Add", total, constant([1])), np.int64)
    ones = add("Expand", constant([1]), add("Shape", ends))
    marks = add("ScatterElements", marks, ends, ones, axis=0, reduction="add")
    which = add("Slice", add("CumSum", marks, first), constant([0]), constant([-1]))
    number = add("Range", first, add("Squeeze", total), constant(1))
    before = add("GatherElements", add("Sub", ends, chunks), which)
    bag = add("GatherElements", bags, which)
    start = add("Mul", add("Sub", number, before), constant(_CHUNK))
    return bag, add("Add", start, add("GatherElements", starts, bag))


def _make_part(graph: _Graph, features: int, batch: _Batch, size: int, starts: str, counts: str) -> _Part:
    """The id at each of `starts` [M], or the `size` ids from there on."""
    add, constant = graph.add, graph.constant
    shape, weights_shape = [-1], [-1, 1]
    if size > _SINGLE:
        starts = add("Add", add("Unsqueeze", starts, constant([1])), constant(np.arange(size)))
        starts = add("Reshape", starts, constant([-1]))
        shape, weights_shape = [-1, size], [-1, 1, size]
    ids = add("Reshape", add("GatherElements", batch.ids, starts), constant(shape))
    weights: list[str] = []
    if batch.weights:
        found = add("Reshape", add("GatherElements", batch.weights, starts), constant(weights_shape))
        weights = graph.split(found, counts, features)
    return _Part(graph.split(ids, counts, features), weights)


# --- One feature: its rows -------------------------------------------------------------------------------------------


def _pool(graph: _Graph, number: int, slot: _Slot, batch: _Batch, levels: Sequence[_Level]) -> str:
    """The output block of feature `number`, float32 [B, D]."""
    add, constant, dim = graph.add, graph.constant, slot.table.embedding_dim
    pooled = graph.zeros(add("Concat", batch.bags, constant([dim]), axis=0), np.float32)
    looked_up = (_quantized_rows if slot.bits else _plain_rows)(graph, number, slot, levels)
    for level, rows in zip(levels, looked_up, strict=True):
        if slot.feature.weighted:
            times = "Mul" if level.single else "MatMul"
            weights = [part.weights[number] for part in level.parts]
            rows = [add(times, weight, row) for weight, row in zip(weights, rows, strict=True)]
        if level.single:
            sums = rows[0] if len(rows) == 1 else add("Sum", *rows)
        elif slot.feature.weighted:
            sums = add("Squeeze", rows[0], constant([1]))
        else:
            sums = add("ReduceSum", rows[0], constant([1]), keepdims=0)
        bags = level.bags[number]
        if level.size == _CHUNK:  # the only pieces of which a bag may have several: see above
            bags = add("Expand", bags, add("Shape", sums))
            pooled = add("ScatterElements", pooled, bags, sums, axis=0, reduction="add")
        else:
            pooled = add("ScatterND", pooled, bags, sums, reduction="add")
    if slot.feature.pooling == "mean":
        pooled = add("Mul", pooled, add("Gather", batch.reciprocals, constant(number), axis=0))
    if 0 < slot.bits < 8:  # out of planes
        per_byte = 8 // slot.bits
        planes = add("Reshape", pooled, constant([0, per_byte, dim // per_byte]))
        pooled = add("Reshape", add("Transpose", planes, perm=[0, 2, 1]), constant([0, dim]))
    return pooled


def _plain_rows(graph: _Graph, number: int, slot: _Slot, levels: Sequence[_Level]) -> list[list[str]]:
    """For every level, the rows of each of its parts, float32 [m, D] or [m, size, D]: looked up part by part."""
    rows = [
        [graph.add("Gather", _rows(slot.table), part.ids[number], axis=0) for part in level.parts] for level in levels
    ]
    return rows if slot.table.dtype == "F32" else [[graph.cast(row, "FLOAT") for row in parts] for parts in rows]


def _quantized_rows(graph: _Graph, number: int, slot: _Slot, levels: Sequence[_Level]) -> list[list[str]]:
    """As `_plain_rows`, but looked up and decoded all together: decoding takes many operators."""
    add, constant = graph.add, graph.constant
    flat = [add("Reshape", part.ids[number], constant([-1])) for level in levels for part in level.parts]
    counts = add("Concat", *(add("Shape", ids) for ids in flat), axis=0)
    decoded = iter(graph.split(_dequantize(graph, slot, add("Concat", *flat, axis=0)), counts, len(flat)))
    rows = [[next(decoded) for _ in level.parts] for level in levels]
    return [
        parts if level.single else [add("Reshape", parts[0], constant([-1, level.size, slot.table.embedding_dim]))]
        for level, parts in zip(levels, rows, strict=True)
    ]


def _dequantize(graph: _Graph, slot: _Slot, ids: str) -> str:
    """The rows of a feature's ids [n], float32 [n, D].

    Of codes that share a byte, the columns come in planes: first those in the lowest bits of all bytes, and so on.
    """
    add, constant = graph.add, graph.constant
    rows = add("Gather", _rows(slot.table), ids, axis=0)
    scale, bias = _decode_scale_bias(graph, graph.columns(rows, 0, _SCALE_BIAS_BYTES))
    codes = graph.columns(rows, _SCALE_BIAS_BYTES, slot.table.row_bytes)
    if slot.bits < 8:
        planes = []
        for shift in range(0, 8, slot.bits):
            plane = add("BitShift", codes, constant([shift], np.uint8), direction="RIGHT") if shift else codes
            mask = constant([(1 << slot.bits) - 1], np.uint8)
            planes.append(add("BitwiseAnd", plane, mask) if shift + slot.bits < 8 else plane)
        codes = add("Concat", *planes, axis=1)
    products = add("DequantizeLinear", codes, scale, axis=0)  # exact: 8 bits times 11
    return add("Add", products, add("Unsqueeze", bias, constant([1])))


def _decode_scale_bias(graph: _Graph, header: str) -> tuple[str, str]:
    """The scales and the biases, float32 [n] each, of what rows start with, uint8 [n, 4]: two binary16 numbers. Exact.

    The high byte is sign, exponent and two bits of the mantissa, so that it alone says in which unit the mantissa counts, and
    what to add to the low byte: two tables of 256 numbers. BitCast would do, from opset 26 on. All are finite, as FORMAT.md
    says.
    """
    add, constant = graph.add, graph.constant
    high = np.arange(256)
    exponent, sign = high >> 2 & 31, 1 - 2 * (high >> 7)
    units = constant(sign * 2.0 ** (np.maximum(exponent, 1) - 25), np.float32)
    bases = constant((high & 3) * 256 + (exponent > 0) * 1024, np.float32)
    by_byte = add("Transpose", header, perm=[1, 0])
    halves = []
    for number in range(2):
        low, high_byte = (add("Gather", by_byte, constant(2 * number + byte), axis=0) for byte in range(2))
        which = graph.cast(high_byte, "INT32")
        mantissas = add("Add", add("GatherElements", bases, which), graph.cast(low, "FLOAT"))
        halves.append(add("Mul", mantissas, add("GatherElements", units, which)))
    return halves[0], halves[1]
