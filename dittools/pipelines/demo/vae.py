"""Writes the linear codec into the weights of a stock AutoencoderKLWan; nothing is trained.

Two tricks make the network linear. A huge constant channel K dominates every RMS norm, which
thereby becomes a fixed scale that gamma cancels. A value moved far above zero, or carried as the
pair (+y, -y), passes SiLU unchanged: silu(y + 64) = y + 64, and silu(y) - silu(-y) = y.

The marks come from borders, as the first frame's do in Wan's own codec: convolutions pad with
zeros, so a tap on K's neighbour reads zero at the border. Five convolutions in a row carry that
five columns or rows, or ten frames, inwards.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm

from dittools.pipelines.demo.codec import (
    CHANNELS,
    COMPONENTS,
    MARK_AMPLITUDE,
    PATCH,
    PATCH_VALUES,
    REACH,
    TIME_REACH,
    Codec,
)

# Widths are perfect squares and the constants powers of two times their roots, so that every
# weight but the basis itself is exact in bfloat16.
ENCODER_WIDTH, DECODER_WIDTH = 64, 49
ENCODER_CONSTANT, DECODER_CONSTANT = 8.0 * 2**17, 7.0 * 2**17
LIFT = 64.0  # moves values clear of SiLU's bend, and is a counting chain's "one"

Tap = tuple[int, int, int]  # (time, row, column) of a causal 3x3x3 kernel; time 2 is now
HERE = (2, 1, 1)
LEFT, RIGHT, ABOVE, BELOW = (2, 1, 0), (2, 1, 2), (2, 0, 1), (2, 2, 1)
ONE_BEFORE, TWO_BEFORE = (1, 1, 1), (0, 1, 1)

K = COMPONENTS  # the constant channel of the encoder
SIDES = {  # first channel of each counting chain of REACH channels, and its tap
    "left": (K + 1, LEFT),
    "right": (K + 1 + REACH, RIGHT),
    "above": (K + 1 + 2 * REACH, ABOVE),
    "below": (K + 1 + 3 * REACH, BELOW),
}
TIME = K + 1 + 4 * REACH  # first of TIME_REACH channels that count frames


@torch.no_grad()
def build_vae(codec: Codec) -> AutoencoderKLWan:
    """Return a stock VAE whose encode and decode are the codec's plain maths."""
    centre = (codec.mean @ codec.basis).tolist()
    mark_std = REACH / MARK_AMPLITUDE
    vae = AutoencoderKLWan(
        base_dim=ENCODER_WIDTH,
        decoder_base_dim=DECODER_WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        latents_mean=[*centre, 0.0, 0.0, float(REACH)],
        latents_std=[*codec.scale.tolist(), mark_std, mark_std, mark_std],
        in_channels=PATCH_VALUES,
        out_channels=PATCH_VALUES,
        patch_size=PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            for parameter in module.parameters():
                parameter.zero_()
    _write_encoder(vae, codec)
    _write_decoder(vae, codec)
    return vae.eval()


def _write_encoder(vae: AutoencoderKLWan, codec: Codec) -> None:
    encoder = vae.encoder
    _fix_norms(encoder, ENCODER_CONSTANT)
    _at(encoder.conv_in, HERE)[:COMPONENTS] = codec.basis.T
    encoder.conv_in.bias[:COMPONENTS] = LIFT
    encoder.conv_in.bias[K] = ENCODER_CONSTANT
    for block, resnet in enumerate(encoder.mid_block.resnets):
        _tap(resnet.conv1, K, K, HERE, 1.0)
        _count(resnet.conv1, 2 * block)
        _count(resnet.conv2, 2 * block + 1)
        _keep(resnet.conv2, 2 * block)
    _write_encoder_head(encoder.conv_out)
    for channel in range(CHANNELS):
        vae.quant_conv.weight[channel, channel] = 1.0
    vae.quant_conv.bias[CHANNELS:] = -30.0  # log variance: a sample is the mean


def _write_encoder_head(head: WanCausalConv3d) -> None:
    """Read components and marks out; the chains' last links are counted here."""
    for channel in range(COMPONENTS):
        _tap(head, channel, channel, HERE, 1.0)
    head.bias[:COMPONENTS] = -LIFT
    for name, (first, tap) in SIDES.items():
        mark = COMPONENTS + (name in ("above", "below"))
        sign = 1 / LIFT if name in ("left", "above") else -1 / LIFT
        for link in range(REACH - 1):
            _tap(head, mark, first + link, HERE, sign)
        _tap(head, mark, first + REACH - 2, tap, sign)
    for link in range(TIME_REACH - 2):
        _tap(head, CHANNELS - 1, TIME + link, HERE, 1 / LIFT)
    for tap in (ONE_BEFORE, TWO_BEFORE):
        _tap(head, CHANNELS - 1, TIME + TIME_REACH - 3, tap, 1 / LIFT)


def _count(conv: WanCausalConv3d, link: int) -> None:
    """Write link number `link` of every chain: 64 where that many neighbours exist, else 0."""
    for first, tap in SIDES.values():
        source, weight = (first + link - 1, 1.0) if link else (K, LIFT / ENCODER_CONSTANT)
        _tap(conv, first + link, source, tap, weight)
    source, weight = (TIME + 2 * link - 1, 1.0) if link else (K, LIFT / ENCODER_CONSTANT)
    _tap(conv, TIME + 2 * link, source, ONE_BEFORE, weight)
    _tap(conv, TIME + 2 * link + 1, source, TWO_BEFORE, weight)


def _keep(conv: WanCausalConv3d, link: int) -> None:
    """Pass link number `link` of every chain on."""
    links = [first + link for first, _ in SIDES.values()]
    for channel in (*links, TIME + 2 * link, TIME + 2 * link + 1):
        _tap(conv, channel, channel, HERE, 1.0)


def _write_decoder(vae: AutoencoderKLWan, codec: Codec) -> None:
    decoder = vae.decoder
    _fix_norms(decoder, DECODER_CONSTANT)
    for channel in range(CHANNELS):
        vae.post_quant_conv.weight[channel, channel] = 1.0
    for channel in range(COMPONENTS):
        _tap(decoder.conv_in, channel, channel, HERE, 1.0)
        _tap(decoder.conv_in, COMPONENTS + channel, channel, HERE, -1.0)
    decoder.conv_in.bias[2 * COMPONENTS] = DECODER_CONSTANT
    _at(decoder.conv_out, HERE)[:, :COMPONENTS] = codec.basis
    _at(decoder.conv_out, HERE)[:, COMPONENTS : 2 * COMPONENTS] = -codec.basis
    decoder.conv_out.bias.copy_(codec.mean - codec.basis @ (codec.mean @ codec.basis))


def _fix_norms(part: torch.nn.Module, constant: float) -> None:
    """Make every RMS norm the identity, given a channel that holds `constant`."""
    for module in part.modules():
        if isinstance(module, WanRMS_norm):
            module.gamma.fill_(constant / module.scale)


def _at(conv: WanCausalConv3d, tap: Tap) -> torch.Tensor:
    """Return a view of the weights [out, in] of one tap."""
    time, row, column = tap
    view: torch.Tensor = conv.weight[:, :, time, row, column]
    return view


def _tap(conv: WanCausalConv3d, out: int, source: int, tap: Tap, weight: float) -> None:
    _at(conv, tap)[out, source] = weight
