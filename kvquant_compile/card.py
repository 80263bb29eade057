"""The section of a model card that says how the KV cache is stored."""

from __future__ import annotations

import re
from pathlib import Path

from kvquant_compile.codec.spec import PAGE_TOKENS
from kvquant_compile.inspect.report import Report

BEGIN, END = "<!-- kvquant-compile -->", "<!-- /kvquant-compile -->"
_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- kvquant-compile
---

# {model}

"""


def section(report: Report) -> str:
    """Markdown of the section, markers included."""
    rows = [
        f"| {layer.index} | {layer.recipe} | {layer.key_bits:.4g} | {layer.value_bits:.4g} "
        f"| {layer.effective_bits:.3f} | {layer.bytes_per_token:.1f} | {layer.reference_bytes} |"
        for layer in report.layers
    ]
    return "\n".join(
        [
            BEGIN,
            "## KV cache",
            "",
            f"Stored in {report.effective_bits:.3f} effective bits per element, "
            f"{report.bytes_per_token:,.1f} bytes a token instead of "
            f"{sum(layer.reference_bytes for layer in report.layers):,} "
            f"({report.compression:.2f} times smaller), in pages of {PAGE_TOKENS} tokens. "
            "Everything that is allocated for a full page is counted.",
            "",
            "```python",
            "import kvquant_compile",
            "",
            'model = kvquant_compile.from_pretrained("THIS_REPOSITORY")  # nothing is calibrated',
            "```",
            "",
            "transformers alone loads the original model from here, with its own cache.",
            "",
            "| layer | recipe | key bits | value bits | effective bits | bytes/token | original |",
            "|---|---|---|---|---|---|---|",
            *rows,
            END,
        ]
    )


def write_card(path: Path, report: Report) -> None:
    """Put the section into a model card: in the place of an older one, at the end of a card that
    has none, or into a new card."""
    text = path.read_text() if path.exists() else _HEAD.format(model=report.model)
    new = section(report)
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: new, text)
    else:
        text = text.rstrip("\n") + "\n\n" + new + "\n"
    path.write_text(text)
