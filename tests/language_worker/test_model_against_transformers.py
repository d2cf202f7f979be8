"""Logits and greedy tokens equal the reference implementation's, in float32, on random tiny checkpoints."""

import re
from pathlib import Path

import pytest
import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.qwen2_5_vl import Qwen2_5_VLConfig
from tests.language_worker.helpers import Media, drive, make_engine, request
from tests.tiny_models import (
    QWEN2_5_VL_CONFIGS,
    make_qwen2_5_vl,
    random_image,
    reference,
    reference_inputs,
)
from tests.tiny_tokenizer import TOKEN_IDS
from transfer.checkpoint import CheckpointError

TOLERANCE = 1e-4
NUM_NEW = 16
SIZES = [(28, 28), (57, 90), (120, 40), (84, 84), (30, 200)]


def _reference_run(folder, pieces):
    """(inputs, logits of every prompt position, greedy tokens, media rows) by transformers."""
    model = reference(folder)
    inputs = reference_inputs(folder, pieces)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        model.generation_config.eos_token_id = None
        out = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
        tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
        rows = None
        if "pixel_values" in inputs:
            features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            rows = torch.cat(list(features.pooler_output))
    return inputs, logits, tokens, rows


def _collapsed(ids):
    """One placeholder per image, as a request carries them."""
    pad = TOKEN_IDS["<|image_pad|>"]
    return [t for i, t in enumerate(ids) if t != pad or ids[i - 1] != pad]


def _check(folder, pieces, **config):
    inputs, logits, tokens, rows = _reference_run(folder, pieces)
    engine = make_engine(folder, **config)
    media = {}
    if rows is not None:
        media["a"] = Media(grids=[tuple(g) for g in inputs["image_grid_thw"].tolist()], rows=rows)
    from language_worker.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    asked = request(
        "a",
        _collapsed(inputs["input_ids"][0].tolist()),
        sampling,
        num_media=len(media["a"].grids) if media else 0,
        return_logits=True,
    )
    result = drive(engine, [asked], media)["a"]
    assert result.error is None
    assert result.done.num_prompt_tokens == logits.shape[0]
    difference = (result.logits - logits).abs().max().item()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    assert result.tokens() == tokens


@pytest.mark.parametrize("index", range(len(QWEN2_5_VL_CONFIGS)))
def test_every_config_with_text_and_images(index: int, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, seed=index, **QWEN2_5_VL_CONFIGS[index])
    images = [random_image(*size, seed=index) for size in SIZES[: 1 + index % 3]]
    pieces = ["<|im_start|>user\n"]
    for i, image in enumerate(images):
        pieces += [image, f" number {i}? "]
    _check(folder, [*pieces, "What is it?<|im_end|>\n<|im_start|>assistant\n"])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_five_images_in_chunks(chunk: int, tiny: Path) -> None:
    pieces = [random_image(*size, seed=i) for i, size in enumerate(SIZES)]
    _check(tiny, ["Look: ", *pieces, " how many?"], max_prefill_chunk=chunk)


def test_text_only(tiny: Path) -> None:
    _check(tiny, ["<|im_start|>user\nWhat number is in the image?<|im_end|>\n<|im_start|>assistant\n"])


def test_image_first_and_last(tiny: Path) -> None:
    _check(tiny, [random_image(40, 90), "between", random_image(90, 40)])


def test_missing_extra_and_misshaped_tensors_are_named_together(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_qwen2_5_vl(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        make_engine(folder)
    for name in ("layers.1.self_attn.k_proj.weight", "model.norm.weight", "layers.0.mlp.up_proj", "layers.0.extra"):
        assert re.search(re.escape(name), str(caught.value))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_unserved_options_are_refused_by_name(change, word, tiny: Path) -> None:
    import json

    config = json.loads((tiny / "config.json").read_text()) | change
    with pytest.raises(ModelNotSupported, match=word):
        Qwen2_5_VLConfig.read(config)


def test_nested_text_config_reads_like_a_flat_one(tiny: Path) -> None:
    import json

    flat = json.loads((tiny / "config.json").read_text())
    outer = {"architectures", "vision_config", "image_token_id", "tie_word_embeddings", "model_type"}
    nested = {key: value for key, value in flat.items() if key in outer}
    nested["text_config"] = {key: value for key, value in flat.items() if key not in outer}
    nested["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": nested["text_config"].pop("rope_theta"),
        "mrope_section": nested["text_config"].pop("rope_scaling")["mrope_section"],
    }
    assert Qwen2_5_VLConfig.read(nested) == Qwen2_5_VLConfig.read(flat)
