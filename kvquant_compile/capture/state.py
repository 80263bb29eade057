"""The state of an object that is changed by a call: where its caches and its counters are.

A decoder may keep its cache in buffers of its modules, or be given a cache object. Both are
walked as trees of attributes, lists and dicts; a path names a place in any copy of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Path = tuple[tuple[str, Any], ...]
_ATTRIBUTE, _ITEM = "attribute", "item"
# Deeper than any cache; a tree with a cycle ends here too.
_DEEPEST = 16


def places(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every tensor (once) and whole number below ``root``, without parameters, with its path."""
    seen: set[int] = set()

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, int) and not isinstance(value, bool):
            yield path, value
            return
        if id(value) in seen or isinstance(value, nn.Parameter) or len(path) > _DEEPEST:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield path, value
            return
        for step, child in _children(value):
            yield from walk(child, (*path, step))

    return walk(root, ())


def _children(value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    if isinstance(value, dict):
        yield from (((_ITEM, key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from (((_ITEM, i), child) for i, child in enumerate(value))
    elif isinstance(value, nn.Module):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
        for name, child in {**own, **value._buffers, **value._modules}.items():
            yield (_ATTRIBUTE, name), child
    elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type):
        yield from (((_ATTRIBUTE, name), child) for name, child in vars(value).items())


def at(root: Any, path: Path) -> Any:
    """What is at a path; None where there is nothing."""
    value = root
    for kind, key in path:
        try:
            value = getattr(value, key) if kind == _ATTRIBUTE else value[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return value


def put(root: Any, path: Path, value: Any) -> None:
    """Replace what is at a path, or put it there; tuples on the way are made anew."""
    *before, (kind, key) = path
    owner = at(root, tuple(before))
    if isinstance(owner, tuple):
        changed = (*owner[:key], value, *owner[key + 1 :])
        put(root, tuple(before), type(owner)(*changed) if hasattr(owner, "_fields") else changed)
    elif kind == _ITEM and isinstance(owner, list) and key == len(owner):
        owner.append(value)
    elif kind == _ITEM:
        owner[key] = value
    elif isinstance(owner, nn.Module) and key in owner._buffers:
        owner._buffers[key] = value
    else:
        object.__setattr__(owner, key, value)


def is_saved(root: nn.Module, path: Path) -> bool:
    """Whether a path leads to a buffer that the state dict holds."""
    *before, (_, key) = path
    owner = at(root, tuple(before))
    known = isinstance(owner, nn.Module) and key in owner._buffers
    return known and key not in owner._non_persistent_buffers_set


@dataclass(frozen=True)
class CacheLeaf:
    """A tensor that holds keys or values.

    Attributes:
        path: its place in the state.
        heads_first: [B, H, S, D] if true, [B, S, H, D] otherwise.
        capacity: tokens it has room for, if it is written in place; 0 if it grows.
    """

    path: Path
    heads_first: bool
    capacity: int

    @property
    def axis(self) -> int:
        """The tokens' axis."""
        return 2 if self.heads_first else 1


@dataclass(frozen=True)
class CacheState:
    """What a step changes.

    Attributes:
        leaves: keys and values.
        counters: whole numbers that count the cached tokens.
        counting_tensors: integer tensors of one element that do.
        other: a sentence on state that is neither, which nothing can be rewritten with; or "".
    """

    leaves: tuple[CacheLeaf, ...]
    counters: tuple[Path, ...]
    counting_tensors: tuple[Path, ...]
    other: str = ""


Snapshot = dict[Path, Any]


def snapshot(root: Any) -> Snapshot:
    """The state's numbers, and copies of its tensors."""
    return {p: v.detach().clone() if isinstance(v, Tensor) else v for p, v in places(root)}


def put_back(root: Any, before: Snapshot) -> None:
    """Undo what was done to a state's contents since a snapshot of it."""
    for path, value in before.items():
        now = at(root, path)
        if isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape:
            now.copy_(value)
        else:
            put(root, path, value)


def cache_state(first: Snapshot, second: Snapshot, tokens: int) -> CacheState:
    """Compare the state after ``tokens`` tokens with that after one more, of the same ones.

    Args:
        first, second: snapshots, each from the same empty start.
        tokens: cached in ``first``.
    """
    leaves, counters, tensors, other = [], [], [], ""
    for path, value in first.items():
        after = second.get(path)
        if isinstance(value, int):
            if (value, after) == (tokens, tokens + 1):
                counters.append(path)
            elif value != after:
                other = f"{_name(path)} changes from {value} to {after} with one token more"
        elif isinstance(after, Tensor):
            if _counts(value, after, tokens):
                tensors.append(path)
                continue
            leaf = _leaf(path, value, after, tokens)
            if leaf is not None:
                leaves.append(leaf)
            elif value.shape != after.shape or not value.equal(after):
                other = f"{_name(path)} of shape {list(after.shape)} changes with one token more"
    return CacheState(tuple(leaves), tuple(counters), tuple(tensors), other)


def _counts(value: Tensor, after: Tensor, tokens: int) -> bool:
    single = value.numel() == after.numel() == 1 and not value.is_floating_point()
    return single and (int(value), int(after)) == (tokens, tokens + 1)


def _leaf(path: Path, value: Tensor, after: Tensor, tokens: int) -> CacheLeaf | None:
    """Keys or values: four axes, the second or third of which changes at the new token only."""
    if value.ndim != 4 or after.ndim != 4 or not value.is_floating_point():
        return None
    if value.shape != after.shape:
        grown = [i for i in range(4) if value.shape[i] != after.shape[i]]
        sizes = (value.shape[grown[0]], after.shape[grown[0]])
        right = grown in ([1], [2]) and sizes == (tokens, tokens + 1)
        return CacheLeaf(path, grown == [2], 0) if right else None
    changed = (value != after).nonzero()
    for axis in (1, 2):
        if len(changed) and bool((changed[:, axis] == tokens).all()):
            return CacheLeaf(path, axis == 2, value.shape[axis])
    return None


def _name(path: Path) -> str:
    return "".join(f".{key}" if kind == _ATTRIBUTE else f"[{key!r}]" for kind, key in path)[1:]
