"""The losses and gradients of TRL's GRPO on a frozen batch: run in a Python that has TRL, and never imported.

    python trl_grpo_witness.py job.json OUT

Answers, advantages and log-probabilities are the job's; nothing is sampled. `OUT` receives what trl_witness.py writes.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}


def padded(rows, side, filling):
    """Rows of numbers to one length."""
    width = max(map(len, rows))
    fill = [[filling] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)])


def inputs_of(batch, columns):
    """As `_generate_and_score_completions` returns them."""
    answers = batch["answers"]
    prompts, completions = ([one[name] for one in answers] for name in ("prompt", "completion"))
    found = {
        "prompt_ids": padded(prompts, "left", 0),
        "prompt_mask": padded([[1] * len(one) for one in prompts], "left", 0),
        "completion_ids": padded(completions, "right", 0),
        "completion_mask": padded([[1] * len(one) for one in completions], "right", 0),
        "advantages": torch.tensor([one["advantage"] for one in answers]),
        "num_items_in_batch": torch.tensor(float(sum(map(len, completions)))),
    }
    names = {"old": "old_per_token_logps", "reference": "ref_per_token_logps", "behaviour": "sampling_per_token_logps"}
    for name, theirs in names.items():
        found[theirs] = padded(columns[name], "right", 0.0)
    return found


def answer(folder, batch, columns, question, out):
    """The loss of a question; its gradients go to `out`."""
    words = AutoTokenizer.from_pretrained(folder)
    words.pad_token = words.eos_token
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, **PLAIN),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(out / "unused"), per_device_train_batch_size=8, num_generations=8, temperature=1.0,
            steps_per_generation=1, router_aux_loss_coef=0.0, **settings, **question["arguments"],
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=words,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = inputs_of(batch, columns)
    if question["cap"]:
        weights = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).exp()
        inputs["importance_sampling_ratio"] = weights.clamp(max=question["cap"])
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    if question["first"]:
        del inputs["old_per_token_logps"]
    loss = trainer._compute_loss(trainer.model.train(), inputs)
    loss.backward()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    trainer.model.save_pretrained(out)
    return {"loss": loss.item()}


def main():
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    found = {"versions": {one.__name__: one.__version__ for one in (torch, transformers, trl)}, "models": {}}
    for model, given in job["models"].items():
        found["models"][model] = {
            name: answer(given["policy"], job["batch"], given["columns"], question, out / model / name)
            for name, question in job["questions"].items()
        }
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
