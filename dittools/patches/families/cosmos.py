"""Cosmos 1, 2 and 2.5: video tokens only in self-attention, raster order, no mask."""

from dittools.patches.adapters import Family, latent_video, register_family

FAMILY = register_family(
    Family(
        "cosmos",
        ("CosmosTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        latent_video,
        branches=("cond", "uncond"),
    )
)
