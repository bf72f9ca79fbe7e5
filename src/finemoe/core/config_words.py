"""The words for what a configuration refuses: what must stand there, what stands there, and which key was meant."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

_SHOWN = 60
_SURELY, _KEY_CUTOFF = 0.8, 0.7  # of difflib, where 1 is the same: below them stand `tokens` and `kernels`

MUST: dict[str, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text in quotes",
    "tuple": "a list in [ ]",
    "list": "a list in [ ]",
    "set": "a list in [ ]",
    "dict": "a table, such as { key = value }",
    "mapping": "a table, such as { key = value }",
    "model": "a table, such as { key = value }",
    "none": "left out",
}
"""By the beginning of pydantic's name of an error: what it wants."""
_LIMITS = {
    "greater_than": ("must be greater than {}", "gt"),
    "greater_than_equal": ("must be at least {}", "ge"),
    "less_than": ("must be less than {}", "lt"),
    "less_than_equal": ("must be at most {}", "le"),
    "too_short": ("must have at least {} entries", "min_length"),
    "too_long": ("must have at most {} entries", "max_length"),
}


def must_be(detail: Any) -> str:
    """What must stand where `detail`, an error of pydantic, was found; without the name of the key."""
    kind, context = detail["type"], detail.get("ctx") or {}
    if kind in ("value_error", "assertion_error"):
        return str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return words.format(context.get(key))
    if kind == "literal_error":
        return f"must be {str(context['expected']).replace(chr(39), chr(34))}"
    if kind == "finite_number":
        return "must be a finite number"
    if kind == "int_from_float":
        return "must be a whole number"
    if kind == "string_pattern_mismatch":
        return f"must be text of the form {context.get('pattern')}"
    if kind in ("tuple_type", "list_type") and isinstance(detail.get("input"), Mapping):
        return f"must be {MUST['list']}; one entry of a list that is there is named by its number, from 0"
    wanted = MUST.get(kind.split("_")[0])
    return (
        f"must be {wanted}" if wanted else f"does not fit: {str(detail['msg']).replace('Input should be', 'must be')}"
    )


def shown(value: Any) -> str:
    """` (got VALUE)`, short; what a table or a list holds is left out."""
    if isinstance(value, Mapping | BaseModel):
        return " (got a table)"
    if isinstance(value, list | tuple):
        return " (got a list)"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return f" (got a number of about {int(value.bit_length() * 0.30103):,} digits)"
    text = repr(value)
    return f" (got {text if len(text) <= _SHOWN else text[:_SHOWN] + ' ...'})"


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """', did you mean `x`?' when something close exists, else the list of what exists."""
    spellings = dict.fromkeys((name, name.lower()))
    close = [found for one in spellings for found in difflib.get_close_matches(one, known, n=1, cutoff=cutoff)]
    if close:
        return f", did you mean `{close[0]}`?"
    return f"; known: {', '.join(known)}" if known else ""


def meant(root: type[BaseModel], table: str, name: str, beside: Sequence[str]) -> str:
    """Which key an unknown one stands for, as the end of a sentence.

    Args:
        root: the configuration that was read.
        table: what a recipe calls it where it is a part, such as `model`; "" where it is the whole.
        name: the unknown key, dotted.
        beside: the keys that its table has.
    """
    own = name.rpartition(".")[2]
    if close := difflib.get_close_matches(own, beside, n=1, cutoff=_SURELY):
        return f", did you mean `{close[0]}`?"
    if kinds := _kinds_with(root, name):
        return f": it goes with kind = {' or '.join(kinds)}; known: {', '.join(beside)}"
    paths = [f"{table}.{path}" if table else path for path in keys_of(root)]
    if own.lower() in OPTIONS and table in ("", "base"):
        return f": it is an option of the command, as {OPTIONS[own.lower()]}"
    wanted = ELSEWHERE.get(own.lower(), "")
    if elsewhere := [path for path in paths if path.rpartition(".")[2] == own]:
        best = min(elsewhere, key=lambda path: path.count("."))
        place = best.rpartition(".")[0]
        return f": it belongs to [{place}], as `{best}`" if place else f": it stands above all tables, as `{best}`"
    if wanted.rpartition(".")[2] in beside:
        return f", did you mean `{wanted.rpartition('.')[2]}`?"
    has_model = table == "model" or "model" in root.model_fields
    if wanted and (wanted in paths or has_model):
        return f": here it is `{wanted}`" if "." in wanted else f": it stands above all tables, as `{wanted}`"
    if wanted.startswith("model.") and f"base{wanted.removeprefix('model')}" in paths:
        return f": here it is `base{wanted.removeprefix('model')}`"
    return did_you_mean(own, beside, _KEY_CUTOFF)


def _kinds_with(root: type[BaseModel], name: str) -> list[str]:
    """The other kinds of its table that an unknown key goes with."""
    *tables, key = [part for part in name.split(".") if not part.isdigit()]
    here = [root]
    for part in tables:
        here = [m for one in here if part in one.model_fields for m in models_in(one.model_fields[part].annotation)]
    found = [one.model_fields["kind"].default for one in here if key in one.model_fields and "kind" in one.model_fields]
    return [f'"{kind}"' for kind in dict.fromkeys(found)]


def keys_of(config: type[BaseModel], above: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """Every key below `config`, dotted; what stands in lists, whose entries have no name, is left out."""
    for name, field in config.model_fields.items():
        yield name
        if typing.get_origin(field.annotation) in (tuple, list):
            continue
        for inner in models_in(field.annotation):
            if inner not in above:
                yield from (f"{name}.{path}" for path in keys_of(inner, (*above, config)))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configurations that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


_HERE = """
optimizer.learning_rate = lr learning_rate max_lr peak_lr base_lr
optimizer.betas = beta1 beta2 adam_beta1 adam_beta2
optimizer.eps = adam_eps adam_epsilon epsilon
optimizer.weight_decay = weight_decay wd decay
optimizer.max_gradient_norm = grad_clip max_grad_norm clip_grad gradient_clipping clip_grad_norm clip
    gradient_clip gradient_clip_val clip_norm max_norm
schedule.kind = lr_schedule lr_scheduler lr_scheduler_type scheduler lr_decay_style
schedule.warmup_share = warmup warmup_steps warmup_iters warmup_ratio lr_warmup_iters num_warmup_steps
schedule.final_share = min_lr min_lr_ratio
training.tokens_per_step = tokens_per_step batch_size batch global_batch_size train_batch_size total_batch_size
training.micro_batch_tokens = micro_batch_size device_batch_size per_device_train_batch_size
    gradient_accumulation_steps grad_accum gradient_accumulation accumulation_steps
training.steps = steps max_steps num_steps max_iters train_iters train_steps total_steps n_steps iters
training.epochs = epochs num_epochs num_train_epochs n_epochs epoch
training.tokens = tokens total_tokens train_tokens
    num_tokens
training.max_tokens = max_tokens token_budget tokens_budget max_train_tokens
training.evaluate_every = eval_every eval_interval eval_steps validate_every val_every
training.checkpoint_every = save_every save_interval save_steps checkpoint_interval ckpt_every
training.keep_checkpoints = save_total_limit keep_last
training.precision = precision dtype bf16 fp16 torch_dtype mixed_precision
training.threads = threads num_threads n_threads
training.trackers = wandb tensorboard trackio report_to logger tracker
data.sequence_length = sequence_length seq_len seq_length seqlen max_seq_len max_seq_length block_size context_length
    ctx_len n_ctx max_length
data.corpus.paths = path paths filename dataset dataset_path data_path train_file train_files data_dir corpus_path
    input file files
data.corpus.text_field = text_column text_key content_field
data.validation_share = val_split validation_split val_fraction
training.device = device gpu accelerator
model.preset = preset
seed = seed random_seed rng_seed
name = run_name experiment experiment_name
start_from = init_from resume_from pretrained checkpoint model_name_or_path
model.hidden_size = hidden_dim d_model n_embd dim embed_dim embedding_size n_embed hidden model_dim emb_dim
model.num_layers = num_layers n_layers n_layer num_hidden_layers layers depth nlayers num_blocks
model.vocab_size = n_vocab vocabulary_size vocab padded_vocab_size
model.tie_embeddings = tie_word_embeddings tied tie_weights
model.norm_eps = rms_norm_eps layer_norm_eps
model.init_std = initializer_range
model.max_positions = max_position_embeddings
model.mtp_depth = mtp_depth num_nextn_predict_layers
model.leading.count = first_k_dense_replace n_dense_layers num_dense_layers
model.attention = attention
model.feed_forward = feed_forward moe ffn mlp
model.attention.num_heads = num_heads n_heads n_head num_attention_heads heads nhead
model.attention.num_kv_heads = num_kv_heads n_kv_heads num_key_value_heads num_query_groups kv_heads
model.attention.head_dim = head_dim head_size d_head
model.attention.rope.theta = rope_theta rope_base rotary_base
model.feed_forward.ffn_hidden_size = ffn_hidden_size intermediate_size ffn_dim d_ff mlp_dim ff_dim d_mlp
    ffn_hidden_dim
model.feed_forward.num_routed_experts = num_routed_experts num_experts n_experts n_routed_experts
    num_local_experts experts number_of_experts moe_num_experts
model.feed_forward.experts_per_token = experts_per_token top_k topk num_experts_per_tok moe_top_k k
    num_experts_per_token moe_router_topk experts_per_tok num_active_experts
model.feed_forward.num_shared_experts = num_shared_experts n_shared_experts shared_experts
model.feed_forward.expert_hidden_size = expert_hidden_size moe_intermediate_size expert_dim expert_size
    moe_ffn_hidden_size
model.feed_forward.router.kind = scoring_func gate gating router_type
model.feed_forward.router.num_groups = n_group n_groups
model.feed_forward.router.groups_per_token = topk_group
model.feed_forward.router.route_scale = routed_scaling_factor
model.feed_forward.router.normalize_gates = norm_topk_prob
model.feed_forward.balance.expert = aux_loss_coef router_aux_loss_coef aux_loss_alpha balance_coef aux_loss
    load_balancing_loss moe_aux_loss_coeff
"""
ELSEWHERE: dict[str, str] = {
    name: path
    for path, names in re.findall(r"^(\S+) = ((?:.+\n(?:    .+\n)*))", _HERE, re.MULTILINE)
    for name in names.split()
}
"""What other programs call a key, or what stands in a table below -> the key of a recipe."""
OPTIONS = dict.fromkeys(
    ("out", "output", "output_dir", "out_dir", "save_dir", "save_path", "log_dir", "work_dir", "run_dir"), "--out"
)
"""What other programs keep in their configuration, and finemoe has on the command line."""
