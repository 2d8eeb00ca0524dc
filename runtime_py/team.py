"""A few threads that stand ready, so that one large request uses several cores.

FBGEMM's CPU kernel runs on the thread that calls it, whatever `torch.set_num_threads` says. Bags are independent, so that a
request may be cut between any two; every piece is copied, checked and looked up by one thread. All of that is compiled
(`_team.c`) and needs no interpreter: handing it over to a helper that is awake takes a microsecond, and half of 10,000
ids are looked up in some 50 to 100.

So it is not the artifact's graph that runs here but the operator underneath, with the constants that follow from the
manifest. `load_artifact` compares its answers with the graph's before it returns.
"""

import torch

from runtime_py.constants import make_constants
from runtime_py.manifest import Manifest

try:
    from runtime_py._team import run as _run
    from runtime_py._team import start as _start_helpers
except ImportError as error:
    raise ImportError(
        f"runtime_py's compiled part cannot be imported ({error}); install the project with pip, which compiles it"
    ) from error

__all__ = ["OVERLAP", "WRONG", "Team"]

WRONG = -1
OVERLAP = -2

PIECE_IDS = 8192  # at least, but for the last pieces of a request: each piece costs 5 to 15 us, as 500 to 1,500 ids do
_AHEAD_BYTES = 3 * 2**18  # of rows that the caller looks up before a thread that slept has begun
_OPERATOR = "int_nbit_split_embedding_codegen_lookup_function"
_ARGUMENTS = (
    "Tensor Tensor Tensor Tensor Tensor Tensor int int int int int int Tensor Tensor int Optional[Tensor] int "
    "Optional[Tensor] Optional[Tensor] Optional[int] Optional[int] Optional[int] Optional[int]"
)


class Team:
    """`threads` threads, of which the caller is one, for the lookups of one artifact without a surgery.

    Any number of callers may use one team at once: a helper works for one of them, and who gets none works alone. Threads do
    not survive `fork`: a child starts its own when it first needs them.
    """

    def __init__(self, manifest: Manifest, weights: torch.Tensor, threads: int, spin_us: int) -> None:
        """Of `weights`, uint8, the mapped rows. A helper looks out for work for `spin_us` before it sleeps.

        Raises:
            RuntimeError: the process may have no more threads, or torch and FBGEMM are not those that this was made for.
        """
        self.threads = threads
        self._spin_us = spin_us
        self._features = len(manifest.features)
        tables = [manifest.table[feature.table] for feature in manifest.features]
        self._ahead = _AHEAD_BYTES * self._features // sum(table.row_bytes for table in tables)
        self._constants = make_constants(manifest, weights)  # what is compiled has their addresses
        self._last = self._constants["num_embeddings"] - 1
        self._most_dims = [
            max((table.embedding_dim for table in tables if table.serving_precision == precision), default=0)
            for precision in ("int2", "int4", "int8", "fp16", "fp32")
        ]
        _check_operator()
        self._start()

    def look_up(
        self,
        values: torch.Tensor,
        weights: torch.Tensor | None,
        pooled: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> int:
        """Looks int64 [N] up into `pooled`, float32 [B, sum(D)]; weights are float32 [N]. All are flat or contiguous.

        Given are either lengths, int32 [F * B], which are checked here, and so are the ids, each as it is copied; or what
        lengths add up to, int64 [F * B + 1], and then all was checked.

        Returns:
            How many pieces the helpers did. `WRONG` where something is wrong with lengths or ids, or a tensor has no memory;
            `pooled` may hold anything then. `OVERLAP` where it lies over the request: nothing was done.
        """
        try:
            ids, rows = values.data_ptr(), pooled.data_ptr()
            given_lengths = 0 if lengths is None else lengths.data_ptr()
            given_offsets = 0 if offsets is None else offsets.data_ptr()
            given_weights = 0 if weights is None else weights.data_ptr()
        except RuntimeError:  # of a tensor of torch's transforms
            return WRONG
        bags = lengths.numel() if lengths is not None else offsets.numel() - 1 if offsets is not None else 0
        helped = _run(
            self._helpers,
            ids,
            values.numel(),
            given_lengths,
            given_offsets,
            bags,
            given_weights,
            weights is not None,
            rows,
            PIECE_IDS,
            self._ahead,
        )
        if helped is None:  # in a child of the process whose helpers they are
            self._start()
            return self.look_up(values, weights, pooled, lengths=lengths, offsets=offsets)
        return helped

    def _start(self) -> None:
        constants = self._constants
        weights = constants["weights"]
        self._helpers = _start_helpers(
            self.threads - 1,
            self._spin_us * 1000,
            self._features,
            self._last.data_ptr(),
            constants["is_mean"].data_ptr(),
            constants["is_weighted"].data_ptr(),
            weights.data_ptr(),
            weights.numel(),
            constants["weights_placements"].data_ptr(),
            constants["weights_offsets"].data_ptr(),
            constants["weights_types"].data_ptr(),
            constants["dim_offsets"].data_ptr(),
            *self._most_dims,
        )


def _check_operator() -> None:
    """The operator's arguments are passed by their place."""
    schema = getattr(torch.ops.fbgemm, _OPERATOR).default._schema
    found = " ".join(str(argument.type) for argument in schema.arguments)
    if found != _ARGUMENTS:
        raise RuntimeError(f"fbgemm::{_OPERATOR} takes ({found}), expected ({_ARGUMENTS})")
