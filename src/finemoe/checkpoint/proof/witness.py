"""The other side of `verify`: transformers computes the logits of a folder, in a process of its own.

A script: `python -P witness.py FOLDER` reads tokens.safetensors and writes logits.safetensors in the folder. Exit
status 3: no transformers that can be imported. It runs no code from elsewhere, and reaches for no network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MISSING = 3


def main(folder: Path) -> int:
    """Load the model in `folder`, check that its weights filled it, and write what it computes."""
    try:
        import transformers
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    import torch
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = "eager"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, trust_remote_code=False, output_loading_info=True
    )
    model, loading = loaded
    state = model.state_dict()
    missing = [key for key in loading["missing_keys"] if key not in state or state[key].numel()]
    found = {"missing_keys": missing, "unexpected_keys": loading["unexpected_keys"]}
    odd = {kind: sorted(map(str, keys))[:5] for kind, keys in found.items() if keys}
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    with torch.no_grad():
        logits = model.float().eval()(tokens, use_cache=False).logits
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    report = {"transformers": transformers.__version__, "odd": odd}
    (folder / "witness.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
