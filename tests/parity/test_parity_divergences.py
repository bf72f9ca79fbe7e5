"""Where implementations are known to differ, or once did: each by name, so that a change on either side is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import MtpModel

from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.core.errors import CheckpointError
from parity.foreign_models import make, ours, randomize, read_folder, relative, reload, take, tokens, write_folder


def _routing(model: Any, ids: torch.Tensor) -> dict[int, Any]:
    with torch.no_grad():
        return {layer: record.decision for layer, record in model(ids, record=True).routing.items()}


def test_v3_masked_groups_lie_at_minus_infinity(tmp_path: Path) -> None:
    """With every biased score negative, a mask of 0 would choose from the groups that lost."""
    theirs, ids = make("deepseek_v3"), tokens()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.sub_(3.0)
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path)
    for decision in _routing(model, ids).values():
        groups = (decision.expert_ids // 3).sort(dim=-1).values
        assert int((groups.diff(dim=-1) != 0).sum(dim=-1).max()) <= 1  # three experts, in two groups at most
    with torch.no_grad():
        assert relative(model.logits(model(ids).hidden), theirs(ids).logits) <= 1e-5


def test_v2_scores_a_group_by_its_best_and_v3_by_its_two_best(tmp_path: Path) -> None:
    """One expert far ahead of its group wins it in V2; two good ones beat it in V3. Scores made by hand."""
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.45, 0.0, 0.1, 0.1, 0.1, 0.2, 0.0, 0.0]])
    for case, wanted in (("deepseek_v2", {0, 1}), ("deepseek_v3", {1, 0})):
        theirs = make(case, topk_group=1, num_experts_per_tok=1, n_shared_experts=1, norm_topk_prob=False)
        gate = theirs.model.layers[1].mlp.gate
        with torch.no_grad():
            gate.weight.zero_()
            gate.weight[:, 0] = scores[0].log() if case == "deepseek_v2" else scores[0].clamp_min(1e-4).logit()
            if case == "deepseek_v3":
                gate.e_score_correction_bias.zero_()
        theirs.save_pretrained(tmp_path / case)
        router = ours(tmp_path / case).blocks[1].feed_forward.router
        hidden = torch.zeros(1, 32)
        hidden[0, 0] = 1
        expected = int(gate(hidden[None])[2][0, 0])
        found = int(router(hidden, torch.zeros(1, dtype=torch.int64), None).expert_ids[0, 0])
        assert found == expected
        assert (found == 0) == (case == "deepseek_v2"), wanted


def test_transformers_ignores_norm_topk_prob_of_v2_and_we_refuse_it(tmp_path: Path) -> None:
    plain, normalised = (make("deepseek_v2", norm_topk_prob=value) for value in (False, True))
    with torch.no_grad():
        assert torch.equal(plain(tokens()).logits, normalised(tokens()).logits)
    normalised.save_pretrained(tmp_path)
    raw, _ = read_folder(tmp_path)
    with pytest.raises(CheckpointError, match="norm_topk_prob"):
        FAMILIES["deepseek_v2"].read(raw)


def test_transformers_reads_a_lone_mscale_of_v2_otherwise_and_we_refuse_it(tmp_path: Path) -> None:
    theirs = make("deepseek_v2")
    theirs.save_pretrained(tmp_path)
    raw, weights = read_folder(tmp_path)
    rope = {key: value for key, value in raw["rope_parameters"].items() if key != "mscale_all_dim"}
    with pytest.raises(CheckpointError, match="mscale"):
        FAMILIES["deepseek_v2"].read({**raw, "rope_parameters": rope})
    write_folder(tmp_path / "lone", {**raw, "rope_parameters": rope}, weights)
    write_folder(tmp_path / "none", {**raw, "rope_parameters": {**rope, "mscale": 1.0}}, weights)
    with torch.no_grad():  # 0.707 or 1: the same there, not in DeepSeek's code
        assert torch.equal(reload(tmp_path / "lone")(tokens()).logits, reload(tmp_path / "none")(tokens()).logits)


def test_transformers_gives_the_padding_token_no_gradient(tmp_path: Path) -> None:
    """Its embedding's row is left as it was while training; ours learns like any other."""
    theirs, ids = make("llama", pad_token_id=3), tokens()
    ids[0, 0] = 3
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path)
    theirs(ids).logits.sum().backward()
    model.logits(model(ids).hidden).sum().backward()
    assert not theirs.model.embed_tokens.weight.grad[3].any()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert gradient[3].any()
    rest = [row for row in range(61) if row != 3]
    assert relative(gradient[rest], theirs.model.embed_tokens.weight.grad[rest]) <= 1e-5


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe"])
def test_prediction_modules_follow_the_last_layer(case: str, modules: int, tmp_path: Path) -> None:
    """At index num_layers, embedding before hidden state, the hidden state after the last norm; copies included."""
    theirs, ids = make(case), tokens()[:1]
    theirs.save_pretrained(tmp_path / "main")
    raw, weights = read_folder(tmp_path / "main")
    raw.pop("num_mtp_layers", None)
    for depth in range(modules):
        layer, template = f"model.layers.{3 + depth}.", "model.layers.2."
        fresh = {layer + k.removeprefix(template): v.clone() for k, v in weights.items() if k.startswith(template)}
        fresh |= {f"{layer}{name}.weight": torch.empty(32) for name in ("enorm", "hnorm", "shared_head.norm")}
        fresh[f"{layer}eh_proj.weight"] = torch.empty(32, 64)
        randomize(fresh, seed=70 + depth)
        copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
        weights |= fresh | {layer + name: weights[original].clone() for name, original in copies.items()}
    raw["num_nextn_predict_layers"] = modules
    write_folder(tmp_path / "whole", raw, weights)

    model = ours(tmp_path / "whole")
    main = reload(tmp_path / "whole")
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{3 + depth}\..*" for depth in range(modules)]
    ahead = MtpModel.from_pretrained(main).eval()
    for layer in ahead.layers:
        layer.config._experts_implementation = "eager"
    with torch.no_grad():
        found = model(ids, mtp=True).mtp_hidden
        hidden = main.model(ids).last_hidden_state
        chained = hidden
        for depth, layer in enumerate(ahead.layers):
            length = ids.shape[1] - 1 - depth
            inputs = {"position_ids": torch.arange(length)[None], "input_ids": ids[:, 1 + depth :]}
            chained = ahead.forward_layer(depth, chained[:, :length], mtp_cache=DynamicCache(), **inputs)
            # A second module reads the state before the first one's norm with us, after it in transformers. No released
            # model has a second one.
            layer.use_post_norm = False
            hidden = ahead.forward_layer(depth, hidden[:, :length], mtp_cache=DynamicCache(), **inputs)
            logits = model.logits(found[depth])
            assert relative(logits, main.lm_head(layer.post_norm(hidden))) <= 1e-5 * (1 + 4 * depth)  # rounding adds up
            assert (relative(logits, main.lm_head(chained)) <= 1e-5) == (depth == 0)
    written = take(model, case, model.state_dict())
    twice = {f"model.layers.{3 + d}.{name}" for d in range(modules) for name in copies}
    assert written.keys() == weights.keys() - twice
    assert all(torch.equal(written[name], weights[name]) for name in written)
