"""Surgery modules as users write them, good and bad; the tests name them as `surgeries:<class>`."""

import random

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


class HalfScaled(nn.Module):
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
        if self.what == "other keys":
            self.count = getattr(self, "count", 0) + 1
            return {"ab"[self.count % 2]: user}
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


class CountingUnseen(Counting):
    """Writes past torch's count of writes."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        self.calls.data.add_(1)
        return pooled["user"]


class HidingDeep(nn.Module):
    """Keeps tensors in containers of an inner module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Identity()
        scale = torch.ones(8)
        self.inner.masks = {"list": [scale], "tuple": (1, (scale,)), "dict": {"a": [{"b": scale}]}}[kind]

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"]


class Recurrent(nn.Module):
    """Runs on a list of its parameters, `_flat_weights`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = {"GRU": nn.GRU, "LSTM": nn.LSTM}[kind](8, 4, batch_first=True)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.cell(pooled["user"].unsqueeze(1))[0].flatten(1)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.second(torch.tanh(self.first(pooled["user"])))


class Deaf(nn.Module):
    """Loads nothing of a state dict, shows nothing of itself in one, or refuses one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.how = how

    def _load_from_state_dict(self, *arguments):
        if self.how == "refuses":
            raise LookupError("not mine")

    def _save_to_state_dict(self, *arguments):
        if self.how != "hides":
            super()._save_to_state_dict(*arguments)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * self.scale


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.layer(pooled["user"])


class MadeInInferenceMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * self.scale


class Salted(nn.Module):
    """Makes something else at every call."""

    def __init__(self, what: str) -> None:
        super().__init__()
        salt = random.random()
        self.register_buffer("salt", torch.full((8,), salt if what == "buffer" else 1.0), persistent=False)
        self.number = salt if what == "number" else 1.0

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * self.salt * self.number


class Exits(nn.Module):
    """Ends the process, with the code of a failed gate."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "constructor":
            raise SystemExit("no licence")

    def forward(self, pooled: Pooled) -> torch.Tensor:
        raise SystemExit(3)


class NotInitialised(nn.Module):
    def __init__(self) -> None:
        pass


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


class Foreign(nn.Module):
    """An operator of FBGEMM's that the build has, as torchrec brings it, and no server."""

    def forward(self, pooled: Pooled) -> torch.Tensor:
        codes = torch.ops.fbgemm.FloatToHFP8Quantized(pooled["user"].contiguous(), 4, 14, 2.0)
        if len(codes) < 1000:  # a block of its own
            return torch.ops.fbgemm.HFP8QuantizedToFloat(codes, 4, 14)
        return pooled["user"]


class Forking(nn.Module):
    def helper(self, user: torch.Tensor) -> torch.Tensor:
        return user * 2

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return torch.jit.wait(torch.jit.fork(self.helper, pooled["user"]))


class Writing(nn.Module):
    """Writes to its own only for a batch that no check has: more than a thousand examples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.zeros(8), persistent=False)
        self.count = 0


class WritesData(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        if len(pooled["user"]) > 1000:
            self.own.data.add_(1)
        return pooled["user"] + self.own


class WritesView(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        chosen = pooled["user"][:1].flatten()
        if len(pooled["user"]) > 1000:
            chosen = self.own
            chosen.view(2, 4)[0] += 1
        return pooled["user"] + self.own


class WritesFromList(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        parts = [pooled["user"]]
        for _ in range(len(pooled["user"]) // 1000):
            parts[-1].mul_(2)  # the second time, its own
            parts.append(self.own)
        return pooled["user"] + self.own


class WritesResult(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        if len(pooled["user"]) > 1000:
            torch.add(pooled["user"][0], 1.0, out=self.own)
        return pooled["user"] + self.own


class WritesFromObject(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        held = Held(self.own)
        if len(pooled["user"]) > 1000:
            held.tensor.zero_()
        return pooled["user"] + self.own


class Assigning(Writing):
    def forward(self, pooled: Pooled) -> torch.Tensor:
        if len(pooled["user"]) > 1000:
            self.count = len(pooled["user"])
        return pooled["user"] + self.own


@torch.jit.script
class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class WritingElsewhere(Writing):
    """Writes in place to what it has made, to the embeddings, and, in training only, to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(inplace=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(inplace=True)])

    def forward(self, pooled: Pooled) -> torch.Tensor:
        user = pooled["user"].mul_(2)
        parts = [self.own.expand_as(user)]
        parts.append(user)
        joined = torch.cat(parts, dim=1)
        joined.add_(1)
        made = torch.zeros_like(self.own)
        made[0] = 1.0
        made.copy_(self.own)
        held = Held(torch.relu_(self.own * 1))
        held.tensor.add_({"own": self.own}["own"])
        for layer in self.layers:
            user = layer(user)
        user = self.norm(self.dropout(user))[None]
        return (self.attention(user, user, user)[0] + self.layer(user))[0] + made + held.tensor


class Ignoring(nn.Module):
    """Leaves a part of itself in Python."""

    @torch.jit.ignore
    def helper(self, user: torch.Tensor) -> torch.Tensor:
        return user * 2

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.helper(pooled["user"])


class Unused(nn.Module):
    """Needs what TorchScript compiles to an exception."""

    @torch.jit.unused
    def helper(self, user: torch.Tensor) -> torch.Tensor:
        return user * 2

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.helper(pooled["user"])


class Objects(nn.Module):
    """Keeps what has no text that every process would give it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(2.0)

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return pooled["user"] * self.scale.value


@torch.jit.script
class Scale:
    def __init__(self, value: float) -> None:
        self.value = value


class Scaled(nn.Module):
    """Answers by plain values, which TorchScript's graph has by name only; `inner` lies one module down."""

    def __init__(self, scale: float = 0.5, inner: float = 1.0, constant: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.shifts = {"user": [inner]}
        many = torch.full((2000,), constant)  # a constant of a traced function, printed without its values
        self.constant = torch.jit.trace(lambda values: values * many[0], torch.zeros(1, 8))

    def forward(self, pooled: Pooled) -> torch.Tensor:
        return self.constant(pooled["user"]) * self.scale + self.shifts["user"][0]


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
