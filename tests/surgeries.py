"""Surgery modules as users write them, good and bad; the tests name them as `surgeries:<class>`."""

import torch
from torch import nn

Pooled = dict[str, torch.Tensor]


class Head(nn.Module):
    """An MLP head over all keys, with a parameter of every kind.

    Batch norm with its counter, a kernel of three dimensions, weights that two layers share, a scalar, float16, booleans, a
    transposed and an expanded tensor. One tensor is returned.
    """

    def __init__(self, width: int, hidden: int = 6) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.mix = nn.Conv1d(1, 2, 3, padding=1)
        self.hidden = nn.Linear(2 * width, hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.once_more = nn.Linear(hidden, hidden)
        self.once_more.weight = self.again.weight
        self.out = nn.Linear(hidden, 2, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.low = nn.Parameter(torch.randn(hidden, 3).half().t())
        self.register_buffer("mask", torch.ones(hidden, dtype=torch.bool))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, hidden), persistent=False)
        self.register_buffer("shift", torch.full((1,), 0.25).expand(3), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        joined = self.norm(torch.cat(list(pooled.values()), dim=1))
        mixed = self.mix(joined.unsqueeze(1)).flatten(1)
        hidden = torch.nn.functional.gelu(self.hidden(mixed)) * self.scale
        hidden = self.once_more(torch.tanh(self.again(hidden))).masked_fill(~self.mask, 0.0)
        low = torch.sigmoid(hidden @ self.low.float().t() + self.shift) * self.temperature.exp()
        return self.out(hidden + low.sum(1, keepdim=True))


class Passing(nn.Module):
    """No parameters: keys renamed and added up, and one as it is."""

    def forward(self, pooled: Pooled) -> Pooled:
        return {"sum": pooled["item"] + pooled["last_item"], "age": pooled["age"]}


class Unguarded(nn.Module):
    """Of an empty bag, the logarithm of zero and a quotient of zeros."""

    def forward(self, pooled: Pooled) -> Pooled:
        user = pooled["user"]
        return {"log": torch.log(user.abs()), "unit": user / user.pow(2).sum(1, keepdim=True).sqrt()}


class Narrow(nn.Module):
    """Computes in a narrower type; `keep` is whether it rounds what it computes to that type."""

    def __init__(self, name: str = "float16", keep: bool = True) -> None:
        super().__init__()
        self.dtype = getattr(torch, name) if keep else torch.float32

    def forward(self, pooled: Pooled) -> torch.Tensor:
        x = pooled["user"].to(self.dtype)
        y = (x * 1.7 + 0.3) * 1.1 - x * 0.7
        return (torch.sigmoid(y) @ y.t() @ x).float()


class AtMost(nn.Module):
    """Raises for a batch that no check of a build has."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        if pooled["user"].shape[0] > 5000:
            raise ValueError("at most 5000 examples")
        return pooled["user"] * 2


class Scaled(nn.Module):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        x = pooled["user"].half()
        return ((x * 1.7 + 0.3) * 1.1 - x * 0.7).float()


class Returns(nn.Module):
    """Returns what no graph can."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, pooled: Pooled):
        user = pooled["user"]
        if self.what == "counting":
            self.count = getattr(self, "count", 0) + 1
            return user + self.count
        return {
            "list": [user],
            "empty": {},
            "text": {"a": "b"},
            "number key": {1: user},
            "half": user.half(),
            "integers": {"a": user.long()},
            "other batch": torch.cat([user, user]),
            "vector": {"a": user[:, 0]},
            "no columns": user[:, :0],
            "by batch": {"a": user} if len(user) > 1 else {"b": user},
            "random": user + torch.rand(()),
        }[self.what]


class Raises(nn.Module):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        raise LookupError("no such thing\nmore of it")


class Refusing(nn.Module):
    def __init__(self, width: int) -> None:
        raise OSError(f"no file for {width}")


class Counting(nn.Module):
    """Writes to a buffer, which is read-only when it is served."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        self.calls += 1
        return pooled["user"]


class Hiding(nn.Module):
    """Keeps a tensor where no state dict sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(8)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * self.mask


class Infinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("big", torch.tensor([1.0, float("inf")]), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] + self.big.sum()


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(0), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"]


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(2, dtype=torch.int16), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"]


class Untyped(nn.Module):
    def forward(self, pooled):
        return pooled["user"]


class Generator(nn.Module):
    """Python that TorchScript does not know."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return torch.cat(list(part for part in pooled.values()), dim=1)  # noqa: C400


class Branching(nn.Module):
    """Looks at a value: TorchScript can, torch.export and ONNX cannot."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        if bool(pooled["user"].sum() > 0):
            return pooled["user"]
        return -pooled["user"]


class Printing(nn.Module):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        print("called")
        return pooled["user"]


class MakingConstants(nn.Module):
    """Makes a tensor of Python numbers whenever it is called."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])


class Unknown(nn.Module):
    """An operator that ONNX has no form for."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return torch.special.bessel_j0(pooled["user"])


def function(pooled: Pooled) -> torch.Tensor:
    return pooled["user"]


class NoModule:
    pass
