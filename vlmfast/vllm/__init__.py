"""Fewer visual tokens inside vLLM: a plugin, which vLLM finds by its entry point and which is off unless it is named.

    llm = vllm.LLM(model, **vlmfast.vllm.reduced("visionzip:54+10", model))

Importing this imports no vLLM. See docs/serving.md.
"""

from vlmfast.vllm.naming import ARCHITECTURES, KEY, reduced, server_arguments
from vlmfast.vllm.registration import load, register

__all__ = ["ARCHITECTURES", "KEY", "reduced", "register", "server_arguments"]
__getattr__ = load  # of the reduced models, whose names `register` tells vLLM
