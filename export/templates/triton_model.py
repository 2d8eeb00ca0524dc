"""Serves the artifact beside this file from the Python backend of Triton Inference Server.

The backend's Python needs torch, numpy, the FBGEMM kernels and this project's `runtime_py`. Every instance is a process;
all of them map one weight file. Parameters of config.pbtxt: `graph` (torchscript or aot_inductor), `invalid_ids` ("error"
refuses a request with an id outside its table, "zero" gives it a zero vector), `verify` ("sizes" starts without reading
the rows).
"""

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # the server's

from runtime_py import InvalidInputError, load_artifact


class TritonPythonModel:
    """What the backend calls; requests are answered one by one."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the artifact, once an instance."""
        torch.set_num_threads(1)  # more instances, not more threads: those of one request wait for one another
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._artifact = load_artifact(
            Path(__file__).parent / "artifact",
            backend=parameters["graph"],
            invalid_ids=parameters["invalid_ids"],
            verify=parameters["verify"],
        )
        self._names = [entry["name"] for entry in config["input"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; a bad request spoils no other one."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._names]
            pooled = self._artifact.lookup(*map(torch.from_numpy, inputs))
        except InvalidInputError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # a surgery is somebody else's module, and what it raises is of this request alone
            message = " ".join(str(error).split()) or type(error).__name__
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
        return pb_utils.InferenceResponse([pb_utils.Tensor("pooled", pooled.numpy())])
