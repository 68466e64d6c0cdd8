"""Allegro: video tokens only in self-attention, text by cross-attention."""

from dittools.patches.adapters import Family, latent_video, register_family

FAMILY = register_family(
    Family(
        "allegro",
        ("AllegroTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        latent_video,
        batched=("uncond", "cond"),
    )
)
