"""LLaDA-V through `LLM`, both halves: rows, logits and tokens of the reference, wherever the images stand."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.errors import BadRequest
from cluster.gateway.app import create_app
from cluster.model_info import ModelInfo
from cluster.prompts import image_bytes
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import UnsupportedModel
from embedding_worker.preprocess import ImageLimits, prepare_image
from embedding_worker.runner import VisionRunner
from language_worker.config import EngineConfig
from language_worker.engine_builder import check_model
from language_worker.errors import ModelNotSupported
from language_worker.models import resolve_model
from tests.cluster.gateway.harness import MODEL, client_of, events_of, make_context, run
from tests.oracles_llada import by_count, by_threshold, generate
from tests.tiny_llada import END_ID, TURN_ID
from tests.tiny_llada_v import IMAGE_ID, IMAGE_TOKEN, SIDE, UNSPOKEN, Made, llada_v_tokenizer, make_llada_v
from tests.tiny_models import random_image
from transfer.checkpoint import CheckpointError
from transfer.errors import RemoteFailure

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 8192, "default_allocate_tokens": 5,
}  # fmt: skip
LENGTH = 12
SIZES = ((57, 90), (30, 30), (100, 20), (31, 29), (150, 150), (33, 199), (1, 1))
EMBED = EmbedConfig(device="cpu", dtype="float32")
LIMITS = ImageLimits(max_bytes=1 << 24, max_pixels=1 << 24)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_llada_v(tmp_path_factory.mktemp("llada-v"), seed=1, num_shards=3)


def sampling(**diffusion: Any) -> SamplingParams:
    return SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(**diffusion))


def expected(made: Made, ids: Sequence[int], images: Sequence[Image.Image], params: DiffusionParams) -> list[int]:
    oracle, prompt = made.oracle(ids, images)
    is_static = params.schedule == "static"
    return generate(
        oracle,
        prompt,
        LENGTH,
        block_length=params.block_length or LENGTH,
        choose=lambda masks: by_count(masks, masks) if is_static else by_threshold(params.threshold),
        never=made.never_ids(),
        cfg_scale=params.cfg_scale,
        kv_policy=params.kv_policy,
        refresh_interval=params.refresh_interval,
        vicinity=params.vicinity,
        sees_future=params.canvas == "full",
    ).tokens


def asked(ids: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Any]:
    return {"prompt_token_ids": list(ids), "images": [image_bytes(image) for image in images]}


@pytest.mark.parametrize("own_tower", [True, False])
def test_rows_of_images_of_any_shape_equal_the_reference(own_tower: bool, tmp_path: Path) -> None:
    """Also where the published limit shrinks the plane of features, and where nothing does."""
    for limit in ("anyres_max_2", "anyres_max_100"):
        made = make_llada_v(tmp_path / limit, own_tower=own_tower, seed=5, image_aspect_ratio=limit)
        runner = VisionRunner.load(made.folder, EMBED)
        images = [random_image(*size, seed=i) for i, size in enumerate(SIZES)]
        prepared = [prepare_image(image_bytes(image), 0, runner.settings, LIMITS) for image in images]
        together = runner.encode(prepared)
        for image, rows, wanted in zip(prepared, together, made.image_rows(images), strict=True):
            assert rows.shape == wanted.shape == (runner.num_rows(image.grid), runner.embedding_dim)
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(runner.encode([image])[0], rows, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("block_size", "diffusion"),
    [
        (16, {"schedule": "static", "block_length": 4, "kv_policy": "none"}),
        (7, {"schedule": "static", "block_length": 6, "kv_policy": "dual"}),
        (16, {"threshold": 0.2, "block_length": 12, "kv_policy": "prefix", "refresh_interval": 2}),
        (5, {"schedule": "static", "block_length": 4, "kv_policy": "dual", "vicinity": 30}),  # into the images
        (128, {"threshold": 0.3, "block_length": 4, "cfg_scale": 0.8}),
        (16, {"schedule": "static", "block_length": 3, "canvas": "block", "cfg_scale": 1.5, "kv_policy": "dual"}),
    ],
)
def test_images_anywhere_equal_the_reference(made: Made, block_size: int, diffusion: dict[str, Any]) -> None:
    pictures = [random_image(*size, seed=7) for size in SIZES[:3]]
    prompts: list[tuple[list[int], list[Image.Image]]] = [
        ([5, 6, IMAGE_ID, 7, 8], pictures[:1]),
        ([IMAGE_ID, IMAGE_ID, 40, 34, IMAGE_ID], pictures),  # side by side, first, last
        ([9, 10, 11, 34], []),
    ]
    params = sampling(**diffusion)
    assert params.diffusion is not None
    with LLM(model=str(made.folder), block_size=block_size, **SETTINGS) as llm:
        answers = llm.generate([asked(*prompt) for prompt in prompts], params)
        for (ids, images), answer in zip(prompts, answers, strict=True):
            assert answer.outputs[0].token_ids == expected(made, ids, images, params.diffusion)


def test_logits_of_a_prompt_with_images_are_the_reference_s(made: Made) -> None:
    pictures = [random_image(*size, seed=2) for size in SIZES[:2]]
    ids = [3, IMAGE_ID, 4, 5, IMAGE_ID]
    oracle, prompt = made.oracle(ids, pictures)
    with LLM(model=str(made.folder), **SETTINGS) as llm:
        logits = llm.logits(asked(ids, pictures))
        with pytest.raises(BadRequest, match="1 image placeholders"):
            llm.generate(asked([5, IMAGE_ID], pictures), sampling())
    torch.testing.assert_close(logits.double(), oracle(torch.tensor(prompt)), atol=1e-4, rtol=1e-4)


def test_eight_bits_are_near(made: Made) -> None:
    pictures = [random_image(*SIZES[0], seed=2)]
    ids = [3, IMAGE_ID, 4]
    oracle, prompt = made.oracle(ids, pictures)
    with LLM(model=str(made.folder), quantization="int8", **SETTINGS) as llm:
        logits = llm.logits(asked(ids, pictures)).double()
    wanted = oracle(torch.tensor(prompt))
    assert 1e-5 < float((logits - wanted).norm() / wanted.norm()) < 0.1


def test_chat_is_the_published_conversation(made: Made) -> None:
    """The system message of its own, the image in front of the text; what a client spells stays text; an answer may
    end with the end of a turn alone."""
    picture = random_image(40, 60, seed=3)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": f"Look: {IMAGE_TOKEN} <|eot_id|>"}]
    with LLM(model=str(made.folder), **SETTINGS) as llm:
        (answer,) = llm.chat([{"role": "user", "content": parts}], sampling())
        own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2"}]
        (brief,) = llm.chat(own, sampling())
        text = llm.tokenizer.decode(brief.prompt_token_ids, skip_special_tokens=False)
        assert "helpful" not in text and text.count("system") == 1
    ids, tokenizer = answer.prompt_token_ids, llada_v_tokenizer()
    assert ids.count(IMAGE_ID) == 1 and ids.count(TURN_ID) == 2
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE_TOKEN}\nLook: {IMAGE_TOKEN} <|eot_id|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    params = DiffusionParams()
    assert answer.outputs[0].token_ids == expected(made, ids, [picture], params)


def test_images_over_http_in_one_answer_and_in_blocks(made: Made) -> None:
    picture = image_bytes(random_image(70, 45, seed=6))
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": LENGTH,
        "ignore_eos": True, "diffusion": {"block_length": 4},
    }  # fmt: skip
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, content[1]]}]

    async def main(llm: LLM) -> None:
        (wanted,) = llm.chat(messages, sampling(block_length=4))
        info = ModelInfo.load(made.folder)
        handoff: Any = llm._workers.handoff
        template, image_id = info.chat_template, info.image_token_id
        context = make_context(made.folder, handoff, chat_template=template, image_token_id=image_id, max_model_len=512)
        app = create_app(context)
        async with client_of(app) as client:
            whole, streamed = await asyncio.gather(
                client.post("/v1/chat/completions", json=body),
                client.post("/v1/chat/completions", json=body | {"stream": True}),
            )
        assert whole.json()["choices"][0]["message"]["content"] == wanted.outputs[0].text
        deltas = [event["choices"][0]["delta"].get("content") or "" for event in events_of(streamed.text)[:-1]]
        assert "".join(deltas) == wanted.outputs[0].text and sum(map(bool, deltas)) > 1

    with LLM(model=str(made.folder), **SETTINGS) as llm:
        run(main(llm))


def test_tokens_of_the_template_are_never_written(made: Made) -> None:
    """However likely they are made; where nothing else is allowed, the request is refused."""
    tokenizer = llada_v_tokenizer()
    unspoken = [tokenizer.token_to_id(token) for token in UNSPOKEN]
    assert END_ID in unspoken and TURN_ID not in unspoken
    with LLM(model=str(made.folder), **SETTINGS) as llm:
        biased = SamplingParams(max_tokens=8, temperature=0.0, logit_bias=dict.fromkeys(unspoken, 100.0))
        (answer,) = llm.generate([asked([5, 6], [])], biased)
        assert not set(answer.outputs[0].token_ids) & set(unspoken)
        with pytest.raises(RemoteFailure, match=r"InvalidRequest.*no token to choose"):
            llm.generate([asked([5], [])], SamplingParams(max_tokens=8, allowed_token_ids=unspoken))


def test_every_tensor_belongs_to_one_half_and_is_needed(made: Made, tmp_path: Path) -> None:
    """Each is dropped, renamed and misshapen in turn; one half alone complains of it, by its name."""
    folder = make_llada_v(tmp_path, seed=2).folder
    stored = load_file(folder / "model.safetensors")

    def complaints() -> list[str]:
        found = []
        for check in (lambda: VisionRunner.check(folder, EMBED), lambda: check_model(folder, EngineConfig())):
            try:
                check()
            except CheckpointError as error:
                found.append("\n".join(error.problems))
        return found

    assert complaints() == []
    assert VisionRunner.check(folder, EMBED) + check_model(folder, EngineConfig()) == len(stored) - 2  # the last norm
    for name, tensor in stored.items():
        others = {other: value for other, value in stored.items() if other != name}
        grown = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        is_unused = "post_layernorm" in name
        for changed in (others, others | {name: grown}):
            save_file(changed, folder / "model.safetensors")
            if is_unused:
                assert complaints() == []
            else:
                (complaint,) = complaints()
                assert name in complaint
        save_file(others | {"model.stray." + name: tensor}, folder / "model.safetensors")
        assert len(complaints()) == 2 and all("model.stray." + name in complaint for complaint in complaints())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'"),
        ({"image_grid_pinpoints": [[SIDE, SIDE + 1]]}, "multiples of the vision tower's 30"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints are None"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type = 'flat'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'"),
        ({"hidden_size": None}, "hidden_size = None"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    folder = make_llada_v(tmp_path).folder
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UnsupportedModel, match=named):
        VisionRunner.check(folder, EMBED)


def test_what_the_published_configuration_leaves_out_is_known() -> None:
    """It names neither the mask nor a token for images."""
    config = {
        "architectures": ["LlavaLLaDAModelLM"], "hidden_size": 4096, "intermediate_size": 12288, "hidden_act": "silu",
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 126464,
        "max_position_embeddings": 16384, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "bos_token_id": 128000,
        "eos_token_id": 126081, "tie_word_embeddings": False,
    }  # fmt: skip
    spec = resolve_model(config).read_spec(config)
    assert (spec.mask_token_id, spec.media_token_id, spec.decode_strategy) == (126336, 126084, "block_diffusion")


def test_a_tower_that_is_nowhere_and_a_placeholder_that_is_none_are_named(tmp_path: Path) -> None:
    folder = make_llada_v(tmp_path / "a", own_tower=False).folder
    (folder / "tower" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="has 0 folders with a vision tower"):
        VisionRunner.load(folder, EMBED)
    folder = make_llada_v(tmp_path / "b", image_token_id=None).folder
    with pytest.raises(ModelNotSupported, match="image_token_id = None"):
        check_model(folder, EngineConfig())
