"""Documents: what is trained on, and what is held out."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

SHINGLE_WORDS = 12
"""Two texts that share a run of this many words are taken to share a source."""


def read_documents(path: Path) -> list[str]:
    """Read a corpus (plain or xz) whose documents are separated by NUL."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [doc for doc in raw.decode("utf-8").split("\0") if doc.strip()]


def shingles(text: str) -> set[int]:
    """Hash every run of ``SHINGLE_WORDS`` words of a text."""
    words = re.findall(r"\w+", text.lower())
    last = len(words) - SHINGLE_WORDS + 1
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(last)}


def drop_overlaps(documents: list[str], reserved: Iterable[str], limit: int) -> list[str]:
    """Leave out the documents that share ``limit`` or more shingles with a reserved text.

    Encyclopaedias repeat themselves across editions and in boilerplate, so holding a document out
    is not enough to keep its sentences out of the training set.
    """
    kept_back: set[int] = set()
    for text in reserved:
        kept_back |= shingles(text)
    return [doc for doc in documents if len(shingles(doc) & kept_back) < limit]


def cut_at_paragraph(text: str, limit: int) -> str:
    """Cut a text to at most ``limit`` characters, at the end of a line where there is one."""
    if len(text) <= limit:
        return text.strip()
    end = text.rfind("\n", 0, limit)
    return text[: end if end > limit // 2 else limit].strip()


def sample_held_out(documents: list[str], size: int, long_limit: int) -> str:
    """Pick the shipped sample from the held-out documents, half of it from long ones.

    Long documents (cut at ``long_limit``) let a 4096-token window see one text only; short ones
    bring variety. Stubs are left out because they say nothing about the use of context, and the
    encyclopaedia's project pages because they are one boilerplate sentence over and over.
    """
    documents = [doc for doc in documents if not doc.startswith("Wikipedia:")]
    long = sorted((d for d in documents if len(d) >= long_limit), key=len, reverse=True)
    short = [d for d in reversed(documents) if long_limit // 10 <= len(d) < long_limit]
    parts: list[str] = []
    spent = {"long": 0, "short": 0}
    while (long or short) and sum(spent.values()) < size:
        # Whichever half is behind goes next, so the two kinds alternate through the file.
        kind = "long" if long and (spent["long"] <= spent["short"] or not short) else "short"
        doc = (long if kind == "long" else short).pop(0)
        part = cut_at_paragraph(doc, min(long_limit, max(200, size - sum(spent.values()))))
        parts.append(part)
        spent[kind] += len(part.encode("utf-8"))
    return "\n\n".join(parts) + "\n"
