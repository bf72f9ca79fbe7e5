"""What trains besides the headline, in words: silently off, it would cost a run."""

from __future__ import annotations

from finemoe.methods.setting import Setting
from finemoe.model.config import ModelConfig
from finemoe.model.moe.balance import BALANCE_TERMS
from finemoe.model.moe.layer import MoEConfig
from finemoe.training.balancing import has_selection_bias


def live_terms(setting: Setting, *, mtp: bool = True) -> list[str]:
    """What trains besides the headline, in words; `mtp`: prediction modules are trained, where there are any."""
    model: ModelConfig = setting.model
    layers = [b.feed_forward for b in (*model.blocks, *model.mtp) if isinstance(b.feed_forward, MoEConfig)]
    terms = {f"{name} {getattr(layer.balance, name):g}" for layer in layers for name in BALANCE_TERMS}
    found = sorted(term for term in terms if not term.endswith(" 0"))
    if has_selection_bias(model):
        rule = setting.balancing
        moves = f"by {rule.rule} at {rule.rate:.3g} up to {rule.until:.1%} of the run"
        found.append(f"selection bias {moves if rule.rate else 'that stays as it is'}")
    if model.mtp and mtp:
        loss = setting.mtp
        found.append(f"multi-token prediction of depth {len(model.mtp)} at {loss.weight}, then {loss.late_weight}")
    return found
