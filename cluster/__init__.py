"""Tandem's composition: configuration, routing, the gateway, Ray, the command line, and `LLM` for scripts.

`from cluster import LLM, SamplingParams` needs neither Ray nor ZeroMQ.
"""

from cluster.llm import LLM
from cluster.outputs import CompletionOutput, RequestOutput
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "DiffusionParams", "RequestOutput", "SamplingParams"]
