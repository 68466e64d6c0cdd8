"""Writes trained networks as a pipeline folder: safetensors and JSON, about 11 MB."""

import json
from pathlib import Path

from diffusers import WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from dittools.pipelines.demo.codec import Codec
from dittools.pipelines.demo.model import build_scheduler, build_tokenizer
from dittools.pipelines.demo.vae import build_vae

LARGE = 4096  # values from which a tensor is stored in bfloat16


def write_pipeline(
    folder: Path, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel, codec: Codec
) -> None:
    """Write a folder that `WanPipeline.from_pretrained` reads.

    Large matrices of the transformer and the VAE are stored in bfloat16; without a dtype they
    load as fp32. The networks passed in are changed to what was stored.
    """
    vae = build_vae(codec)
    for part in (transformer, vae):
        for parameter in part.parameters():
            if parameter.numel() >= LARGE:
                parameter.data = parameter.data.bfloat16()
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    _name_tokenizer_class(folder)
    for part in (transformer, vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.float()


def _name_tokenizer_class(folder: Path) -> None:
    """Write the tokenizer class that transformers 4 and 5 both know; 5 writes its own new name."""
    stable = "PreTrainedTokenizerFast"
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["tokenizer"] = ["transformers", stable]
    index.write_text(json.dumps(content, indent=2) + "\n")
    config = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text())
    content["tokenizer_class"] = stable
    config.write_text(json.dumps(content, indent=2) + "\n")


def stored_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
