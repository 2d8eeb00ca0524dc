"""The checks of a request whose tensors lie on a GPU already, without an assertion there and with one answer to wait for.

FBGEMM's own check raises on the device, which ends the process's use of it. Here four numbers are computed beside the
lookup, which is safe whatever the request holds, and the host reads these. Only where they are bad does the request itself
move to the host, where `RequestChecker` says what is wrong with it.
"""

import torch

from runtime_py.checks import RequestChecker
from runtime_py.errors import InvalidInputError
from runtime_py.inputs import Request

__all__ = ["inspect_request", "is_plain", "move", "raise_if_bad"]

_MOST_LENGTH = 2**31


def is_plain(request: Request, features: int, weighted: bool, device: torch.device) -> bool:
    """Whether the request has the graph's types and shapes, and lies on `device`: what the host sees without waiting."""
    values, lengths, weights = request
    parts = [values, lengths, *([] if weights is None else [weights])]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return False
    if any(part.layout is not torch.strided or part.is_nested or part.dim() != 1 for part in parts):
        return False
    if any(part.device != device for part in parts):
        return False
    if values.dtype not in (torch.int64, torch.int32) or lengths.dtype not in (torch.int64, torch.int32):
        return False
    if (weights is not None) != weighted or values.numel() >= _MOST_LENGTH or lengths.numel() % features:
        return False
    return weights is None or (weights.dtype.is_floating_point and weights.numel() == values.numel())


def inspect_request(values: torch.Tensor, lengths: torch.Tensor, num_embeddings: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest length, their sum, and how many ids are outside their tables: int64 [4], where these are.

    Never raises for what the tensors hold, and never waits. Ids behind the sum of the lengths are not counted.

    Args:
        values: int64 or int32 [N].
        lengths: int64 or int32 [F * B], at least one.
        num_embeddings: int64 [F], of each feature's table.
    """
    lengths = lengths.to(torch.int64)
    low, high = torch.aminmax(lengths)
    ends = lengths.view(num_embeddings.numel(), -1).sum(1).cumsum(0)
    positions = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    features = torch.searchsorted(ends, positions, right=True).clamp_(max=num_embeddings.numel() - 1)
    limits = num_embeddings.index_select(0, features)
    outside = (values < 0).logical_or_(values >= limits).logical_and_(positions < ends[-1])
    return torch.stack([low, high, ends[-1], outside.sum()])


def raise_if_bad(verdict: list[int], request: Request, checker: RequestChecker) -> None:
    """Raises what the request would raise on a CPU, where the four numbers say that it would.

    Args:
        verdict: of `inspect_request`.
        request: the request that was inspected, which only moves to the host where it is bad.
        checker: the artifact's, which says whether an id outside its table is an error.

    Raises:
        InvalidInputError: naming feature, position, value and what is allowed.
    """
    low, high, total, outside = verdict
    if low >= 0 and high < _MOST_LENGTH and total == request.values.numel() and not (outside and checker.refuses_ids):
        return
    checker.check(*move(request, torch.device("cpu")))
    raise InvalidInputError(
        "the request changed while it was looked up; leave its tensors alone until the answer is there"
    )


def move(request: Request, device: torch.device) -> Request:
    """The request's tensors on another device."""
    values, lengths, weights = request
    return Request(values.to(device), lengths.to(device), None if weights is None else weights.to(device))
