"""TRL's own losses and gradients, computed by its trainers: run in a Python that has TRL, and never imported.

    python trl_witness.py job.json OUT

The job holds folders of models in Hugging Face's layout, the frozen batch, and what is asked of each trainer. `OUT`
receives `found.json`, with losses and versions, and for every question a folder of gradients under the names of a
model's files: they are written as if they were weights.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
}
TEXTS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # a trainer wants texts to begin with; none of them is used


def model_of(folder, question, labels):
    """The policy; for rewards with a head that is the difference of two rows of the language model's."""
    if question["trainer"] != "reward":
        return AutoModelForCausalLM.from_pretrained(folder, **PLAIN)
    head = AutoModelForCausalLM.from_pretrained(folder, **PLAIN).get_output_embeddings().weight
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **PLAIN)
    with torch.no_grad():
        model.score.weight.copy_(head[labels[0]] - head[labels[1]])
    return model


def trainer_of(job, folders, question, out):
    """A trainer of TRL's, on the processor and in single precision, as it is otherwise by default."""
    kind, settings = TRAINERS[question["trainer"]]
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    data = Dataset.from_list(TEXTS)
    more = {}
    if question["trainer"] == "sft":
        plain["dataset_kwargs"] = {"skip_prepare_dataset": True}
        data = Dataset.from_list(conversations(job["batch"]))
    if question["trainer"] == "dpo":
        more["ref_model"] = AutoModelForCausalLM.from_pretrained(folders["reference"], **PLAIN)
    words = AutoTokenizer.from_pretrained(folders["policy"])
    words.pad_token = words.eos_token  # what most of the trainers do by themselves
    return kind(
        model=model_of(folders["policy"], question, job["batch"]["labels"]),
        args=settings(output_dir=str(out / "unused"), **plain, **question["arguments"]),
        train_dataset=data,
        processing_class=words,
        **more,
    )


def conversations(batch):
    """What the assistant did not write has the label that TRL leaves out."""
    return [
        {"input_ids": one["ids"], "labels": [i if m else -100 for i, m in zip(one["ids"], one["mask"], strict=True)]}
        for one in batch["conversations"]
    ]


def examples(batch, kind):
    """Of the frozen batch, as the trainer's collator wants them."""
    if kind == "sft":
        return conversations(batch)
    pairs = batch["pairs"]
    if kind == "dpo":
        return [{"prompt_ids": p["prompt"], "chosen_ids": p["chosen"], "rejected_ids": p["rejected"]} for p in pairs]
    if kind == "reward":
        return [{f"{side}_ids": p["prompt"] + p[side] for side in ("chosen", "rejected")} for p in pairs]
    found = []
    for pair in pairs:
        columns = {}
        for side in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[side]
            columns[f"{side}_input_ids"] = ids
            columns[f"{side}_attention_mask"] = [1] * len(ids)
            columns[f"{side}_labels"] = [-100] * len(pair["prompt"]) + pair[side]
        found.append(columns)
    return found


def answer(job, folders, question, out):
    """The loss of a question and what the trainer says of balancing; its gradients go to `out`."""
    trainer = trainer_of(job, folders, question, out)
    given = examples(job["batch"], question["trainer"])
    parts = [[one] for one in given] if question["each"] else [given]
    model = trainer.model.train()
    loss = 0.0
    for part in parts:
        value = trainer.compute_loss(model, dict(trainer.data_collator(part))) / len(parts)
        value.backward()
        loss += value.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(out)
    enabled = getattr(trainer, "aux_loss_enabled", None)
    return {"loss": loss, "balance": enabled, "coefficient": getattr(trainer, "router_aux_loss_coef", None)}


def main():
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    found = {"versions": {one.__name__: one.__version__ for one in (torch, transformers, trl)}, "models": {}}
    for model, folders in job["models"].items():
        found["models"][model] = {
            name: answer(job, folders, question, out / model / name) for name, question in job["questions"].items()
        }
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
