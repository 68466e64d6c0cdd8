"""The README's snippets, for the tests that run them here and from an installed wheel."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """Return the code blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def quick(snippet: str) -> str:
    """Return a snippet with fewer steps, and a toy where it loads released weights."""
    snippet = re.sub(
        r'WanPipeline\.from_pretrained\(.*?\)\.to\("cuda"\)',
        'dittools.pipelines.load("tiny/wan")',
        snippet,
        flags=re.DOTALL,
    )
    return snippet.replace('"num_inference_steps": 12', '"num_inference_steps": 3')
