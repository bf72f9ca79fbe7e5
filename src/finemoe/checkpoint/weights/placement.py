"""Placement: where one foreign tensor lies in ours. A family is a list of them; export is import read backwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """The foreign tensor `theirs` fills `ours[index]`, the whole of it or one contiguous part.

    Routed experts are stacked in our tensors and single in a Hugging Face file: expert e's gate_proj is
    `gate_up_proj[e, :width]`, its up_proj `gate_up_proj[e, width:]`, its down_proj `down_proj[e]`. Everything else
    fills its tensor whole. Every placement is a contiguous range of bytes, so converting is copying.
    """

    theirs: str
    """Key in the foreign file."""
    ours: str
    """Key in `Transformer.state_dict()`."""
    shape: tuple[int, ...]
    """Shape of the foreign tensor, and of the part it fills."""
    index: tuple[int | slice, ...] = ()
    """Leading index into ours; () is the whole tensor."""
