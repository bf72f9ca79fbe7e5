"""Which added tokens are control tokens: by the flag that a tokenizer gives them, or by how they are spelt."""

from __future__ import annotations

import re

_SHAPES = re.compile(
    r"[<＜⟨]\S*\w\S*[>＞⟩]"  # <think>, </tool_call>, <|im_end|>, <<SYS>>, <｜fim▁hole｜>
    r"|\[\|\S+\|\]"  # [|endofturn|]
    r"|\[/?[a-z]?[A-Z][A-Z0-9_]+\]"  # [INST], [/INST], [gMASK]
)
_HTML = frozenset(
    re.findall(
        r"\w+",
        "a abbr article aside b blockquote body br button canvas caption center cite code col dd del details div dl dt "
        "em fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe input ins kbd "
        "label li link main map mark meta nav ol option p path pre script section select small span strike strong "
        "style sub summary sup svg table tbody td textarea tfoot th thead title tr tt u ul var wbr",
    )
)


def controls(name: str, special: bool) -> bool:
    """Whether the added token `name` is a control token: it is marked `special`, or spelt as one.

    An element of HTML that was added as a word is none.
    """
    bare = name.strip().strip("▁")
    return special or (_SHAPES.fullmatch(bare) is not None and bare.strip("</> ") not in _HTML)
