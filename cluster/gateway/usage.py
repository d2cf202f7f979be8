"""Token counts in OpenAI's shape, while a request runs and at its end."""

from __future__ import annotations

from typing import Any

from cluster.gateway.generation import Event
from cluster.served import RequestStats


class UsageCounter:
    """Counts one HTTP request's tokens over all its prompts; prompt tokens include the images'."""

    def __init__(self) -> None:
        self._num_prompt: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}
        self._num_generated = 0

    def note(self, event: Event) -> None:
        """A chunk that is on its way to the client."""
        chunk, prompt = event.chunk, event.prompt
        self._num_generated += len(chunk.token_ids)
        self._num_prompt[prompt] = max(self._num_prompt.get(prompt, 0), chunk.num_prompt_tokens)
        self._num_cached[prompt] = max(self._num_cached.get(prompt, 0), chunk.num_cached_tokens)

    def now(self) -> dict[str, Any]:
        """What the chunks so far say."""
        return self._shape(sum(self._num_prompt.values()), self._num_generated)

    def final(self, stats: dict[int, RequestStats]) -> dict[str, Any]:
        """What the workers counted."""
        num_prompt = sum(s.num_prompt_tokens for s in stats.values())
        usage = self._shape(num_prompt, sum(s.num_generated_tokens for s in stats.values()))
        if len(stats) == 1:  # an extension: the figures of each hop of the request's path
            (only,) = stats.values()
            usage["hops"] = {name: value for name, value in only.hops.items() if name != "logits"}
        return usage

    def _shape(self, num_prompt: int, num_generated: int) -> dict[str, Any]:
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }
