"""Modules for `surgery` that serving often needs; any other `torch.nn.Module` of yours will do as well.

A surgery takes the pooled embeddings by key, float32 [B, D] each, and returns one float32 tensor [B, D] or several by key.
It is exported inside every graph, so it must be what TorchScript, torch.export and ONNX can express: typed arguments,
tensor operations, no tensor made of Python numbers. Its parameters come from the snapshot.
"""

import torch

__all__ = ["NormalizeAndProject"]


class NormalizeAndProject(torch.nn.Module):
    """Scales chosen embeddings to length one, and projects them, side by side, to one vector; other keys pass unchanged.

    What a retrieval model needs between its tables and a nearest-neighbour index: one vector for each example.
    """

    keys: list[str]
    keep: list[str]  # named here, as TorchScript does not know the type of an empty list

    def __init__(
        self,
        keys: list[str],
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        normalize_output: bool = False,
        keep: list[str] | None = None,
        eps: float = 1e-12,
    ) -> None:
        """A linear layer `project`, whose `weight` and `bias` the snapshot has.

        Args:
            keys: whose embeddings are normalised and projected, in this order.
            in_features: the sum of their dims.
            out_features: columns of the output `projected`.
            bias: whether the layer adds one.
            normalize_output: whether the projected vector is scaled to length one, too.
            keep: keys that are outputs themselves, as they were pooled.
            eps: a vector shorter than this is divided by this, so that the zeros of an empty bag stay zeros.

        Raises:
            ValueError: `keep` names `projected`, which would be in the place of the projection.
        """
        if "projected" in (keep or []):
            raise ValueError(
                "keep names 'projected', which is the output of the projection; give that feature another name"
            )
        super().__init__()
        self.keys = list(keys)
        self.keep = list(keep or [])
        self.normalize_output = normalize_output
        self.eps = float(eps)
        self.project = torch.nn.Linear(in_features, out_features, bias=bias)

    def forward(self, pooled: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Float32 [B, D] by key to `projected`, float32 [B, out_features], and what is kept."""
        parts = [torch.nn.functional.normalize(pooled[key], dim=1, eps=self.eps) for key in self.keys]
        projected = self.project(torch.cat(parts, dim=1))
        if self.normalize_output:
            projected = torch.nn.functional.normalize(projected, dim=1, eps=self.eps)
        outputs = {"projected": projected}
        for key in self.keep:
            outputs[key] = pooled[key]
        return outputs
