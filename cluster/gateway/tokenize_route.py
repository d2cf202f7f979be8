"""/tokenize and /detokenize: the tokenizer as requests see it."""

from __future__ import annotations

from typing import Any

from cluster.errors import BadRequest
from cluster.gateway.body import validate
from cluster.gateway.chat_route import render_prompt
from cluster.gateway.sampling import check_token_ids
from cluster.gateway.schema import DetokenizeRequest, TokenizeRequest
from cluster.gateway.state import GatewayState


def tokenize(state: GatewayState, fields: dict[str, Any]) -> dict[str, Any]:
    """Ids of a prompt, or of a chat's prompt with one placeholder for each image."""
    request = validate(TokenizeRequest, fields)
    state.check_model(request.model)
    context = state.context
    if request.messages is not None:
        token_ids, _ = render_prompt(
            context, request.messages, request.add_generation_prompt, request.chat_template_kwargs
        )
    else:
        prompt, limit = request.prompt or "", context.config.max_prompt_chars
        if len(prompt) > limit:
            raise BadRequest(f"the prompt has {len(prompt)} characters; at most {limit} are allowed", "prompt")
        token_ids = context.tokenizer.encode(prompt, True, add_special_tokens=True)
    return {"count": len(token_ids), "max_model_len": context.max_model_len, "tokens": token_ids}


def detokenize(state: GatewayState, fields: dict[str, Any]) -> dict[str, Any]:
    """The text of ids, special tokens by their literals."""
    request = validate(DetokenizeRequest, fields)
    state.check_model(request.model)
    check_token_ids(request.tokens, state.context.tokenizer.vocab_size, "tokens")
    return {"prompt": state.context.tokenizer.decode(request.tokens, skip_special_tokens=False)}
