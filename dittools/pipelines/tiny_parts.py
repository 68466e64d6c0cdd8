"""Tokenizers, text encoders and autoencoders at toy size, shared by the toy pipelines."""

from typing import Any

_WORDS = (
    "a the red green blue yellow circle square triangle moving left right up down over striped "
    "plain background and cat dog in on of"
)


def tokenizer(kind: str = "t5", length: int = 16) -> Any:
    """Return an in-memory word tokenizer.

    Args:
        kind: "t5" (text, end), "clip" (begin, text, end) or "chat" (text, with a chat template).
        length: model_max_length.
    """
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "</s>", "<s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *_WORDS.split()])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = {"t5": "$A </s>", "clip": "<s> $A </s>", "chat": "$A"}[kind]
    tokens = [(name, vocabulary[name]) for name in ("<s>", "</s>") if name in template]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
    )
    if kind == "chat":
        wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def t5(kind: str = "t5", width: int = 32) -> Any:
    """Return a T5 or UMT5 encoder of that width."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 1000, "d_model": width, "d_kv": 8, "d_ff": 37}
    sizes |= {"num_layers": 2, "num_heads": 4}
    if kind == "umt5":
        return UMT5EncoderModel(UMT5Config(**sizes))
    return T5EncoderModel(T5Config(**sizes))


def wan_vae() -> Any:
    """Return a toy Wan autoencoder: 8x in space, 4x in time, 16 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def clip(width: int = 32, projection: int = 0) -> Any:
    """Return a CLIP text encoder, with a projection head of that width when it is above 0."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=3,
        eos_token_id=2,
        projection_dim=projection or width,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def image_vae(channels: int, blocks: int = 1) -> Any:
    """Return a toy image autoencoder: one block keeps the size, two halve it."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,) if blocks == 1 else (8, 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=1 if blocks == 1 else 4,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def flow(**options: Any) -> Any:
    """Return the flow-matching Euler scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def qwen3(causal: bool = False) -> Any:
    """Return a toy Qwen3 text model, 16 wide."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=3,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config) if causal else Qwen3Model(config)


def gemma2() -> Any:
    """Return a toy Gemma 2 text model, 8 wide."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=1000,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            attn_implementation="eager",
            bos_token_id=3,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
