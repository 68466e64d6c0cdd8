"""Builds the demo model's untrained parts: transformer, text encoder, tokenizer, scheduler.

All are stock diffusers and transformers classes; only their starting weights are chosen here.
"""

import math
from itertools import product

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dittools.metrics.scene import WORDS
from dittools.pipelines.demo.codec import CHANNELS

HEADS, HEAD_DIM, LAYERS = 3, 64, 6
TEXT_DIM = 64
VOCAB = ("<pad>", "</s>", "<unk>", *WORDS)
FLOW_SHIFT = 10.0
TIME_PLANES, ROW_PLANES, COLUMN_PLANES = 12, 10, 10  # rotary planes per axis in a 64-wide head


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: lower case, punctuation dropped, "</s>" appended."""
    ids = {word: i for i, word in enumerate(VOCAB)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex(r"[\W_]+"), behavior="removed")
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Return a two-layer UMT5 encoder; its relative positions tie a colour to its noun."""
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        # A direction all words share, so that attention can tell words from zero padding.
        encoder.shared.weight.normal_(0, 1)
        encoder.shared.weight[:, 0] += 6.0
        for block in encoder.encoder.block:
            _look_next_door(block.layer[0].SelfAttention.relative_attention_bias.weight)
    return encoder


def _look_next_door(bias: torch.Tensor) -> None:
    """Start the heads on the next, previous, second next and second previous word.

    A colour must learn whose it is from the words around it. These biases start at zero
    otherwise, and a thousand steps are not enough to grow them.
    """
    ahead = bias.shape[0] // 2  # buckets of words to the right start half-way
    for head, bucket in enumerate((ahead + 1, 1, ahead + 2, 2)):
        bias[bucket, head] += 4.0


def build_scheduler() -> UniPCMultistepScheduler:
    """Return UniPC for flow matching, with the shift the model was tuned for."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def build_transformer() -> WanTransformer3DModel:
    """Return the untrained transformer with gates open and quadrant heads in place."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=576,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table[:, [2, 5]] += 0.3  # gates start near zero otherwise
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        _plant_quadrant_heads(model)
    return model


def _plant_quadrant_heads(model: WanTransformer3DModel) -> None:
    """Bias two heads of blocks 1 to 4 towards later or earlier x left, right, up or down.

    Wan has relative positions only, and gradient descent is slow to discover an oriented head.
    """
    kinds = product((1, -1), ("column", "row"), (-1, 1))
    slots = product(range(1, 5), (1, 2))
    for (layer, head), (time, axis, side) in zip(slots, kinds, strict=True):
        attention = model.blocks[layer].attn1
        across, along = TIME_PLANES, TIME_PLANES + ROW_PLANES
        moving, other = (along, across) if axis == "column" else (across, along)
        half = math.pi / 2
        planes = {2: time * half, 3: time * half, moving + 1: side * half, moving + 2: side * half}
        _orient(attention, head, {**planes, other + 1: 0.0})


def _orient(attention: WanAttention, head: int, planes: dict[int, float]) -> None:
    """Make one head prefer keys at a rotary angle ahead of the query, plane by plane."""
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    size = 1.6 / math.sqrt(3)  # 1.6 x the rms of a default linear layer's output
    for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        linear.weight[rows] *= 0.5
        for plane in planes:
            norm.weight[rows.start + 2 * plane : rows.start + 2 * plane + 2] = 2.5
    for plane, angle in planes.items():
        first = rows.start + 2 * plane
        attention.to_q.bias[first], attention.to_q.bias[first + 1] = size, 0.0
        # score ~ cos((key - query) * frequency - angle)
        attention.to_k.bias[first] = size * math.cos(angle)
        attention.to_k.bias[first + 1] = -size * math.sin(angle)


@torch.no_grad()
def aim_at_words(model: WanTransformer3DModel, encoder: UMT5EncoderModel) -> None:
    """Make cross-attention look at words rather than at the hundreds of zero pads.

    Without biases a pad's key and value are exactly zero; the query bias then points at what
    all words' keys have in common.
    """
    embedder = model.condition_embedder.text_embedder
    embedder.linear_1.bias.zero_()
    embedder.linear_2.bias.zero_()
    words = encoder(torch.arange(1, len(VOCAB))[None]).last_hidden_state[0]
    embedded = embedder(words)
    embedder.linear_2.weight *= 1.0 / embedded.std()
    embedded = embedder(words)
    for block in model.blocks:
        attention = block.attn2
        attention.to_k.bias.zero_()
        attention.to_v.bias.zero_()
        keys = attention.norm_k(attention.to_k(embedded)).mean(0)
        attention.to_q.bias.copy_(keys / keys.square().mean().sqrt() * 1.1)
