"""TRL's GRPOTrainer in a process of its own: `python -m benchmarks.grpo_trl JOB`; without finemoe.

It trains by `trainer.train()`, as its users do. A callback stands between two steps: it answers what the last one
was, and the clock stands still until the next is asked for.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def worth(text: str, right: str) -> float:
    """1 where the last number of `text` is that of `right`, else 0: finemoe's `number`, for texts without letters."""
    numbers = NUMBER.findall(text)
    return float(bool(numbers) and float(numbers[-1]) == float(right))


class Rewards:
    """The reward function, which remembers what it saw last."""

    __name__ = "last_number"

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def __call__(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        number: Sequence[int],
        **_: Any,
    ) -> list[float]:
        """Of each completion; `answer` and `number` are columns of the data."""
        values = [worth(text, right) for text, right in zip(completions, answer, strict=True)]
        self.last = {
            "reward": sum(values) / len(values),
            "answer_tokens": sum(map(len, completion_ids)),
            "prompts": sorted(set(number)),
        }
        return values


def arguments(settings: Mapping[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """Of trl.GRPOConfig: finemoe's settings by TRL's names, and nothing that costs time and is not asked for."""
    asked = {
        "per_device_train_batch_size": settings["answers"], "num_generations": settings["group"],
        "max_completion_length": settings["answer_tokens"], "temperature": settings["temperature"],
        "loss_type": "grpo", "beta": settings["beta"], "epsilon": settings["clip"], "num_iterations": 1,
        "scale_rewards": "group", "use_bias_correction_kl": False,
        "learning_rate": settings["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "adam_beta1": settings["betas"][0], "adam_beta2": settings["betas"][1], "adam_epsilon": settings["eps"],
        "max_grad_norm": settings["max_gradient_norm"], "max_steps": settings["steps"], "seed": seed,
        "shuffle_dataset": False,  # finemoe asks in the order of the corpus, too
        "generation_kwargs": {"use_cache": True},  # transformers' Trainer switches it off in the model's configuration
    }  # fmt: skip
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    # Both of these are on by default there, and slow where the memory is enough and bf16 is emulated.
    fast = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    return {"output_dir": str(out), **asked, **quiet, **fast}


def main() -> None:
    """Announce what is there, then train a step for each line of stdin."""
    import torch
    import transformers
    import trl
    from benchmarks.speed.serving import answering
    from datasets import Dataset

    answer = answering()
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prompts = job["prompts"]
    words = transformers.AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    words.pad_token = words.pad_token or words.eos_token
    for one in prompts:
        if words(one["text"])["input_ids"] != one["ids"]:
            raise ValueError(f"transformers makes other tokens of {one['text']!r} than finemoe, {one['ids']}")
    rewards = Rewards()

    class Turns(transformers.TrainerCallback):
        """A step for each line that is asked; the end of the lines is the end."""

        def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
            self.say, self.begun = say, 0.0

        def wait(self, control: Any) -> None:
            """Until somebody asks for the next step."""
            if not sys.stdin.readline():
                control.should_training_stop = True
            self.begun = time.perf_counter()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.say({"seconds": time.perf_counter() - self.begun, **rewards.last})
            self.wait(control)

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    data = [{"prompt": one["text"], "answer": one["right"], "number": n} for n, one in enumerate(prompts)]
    out = Path(sys.argv[1]).parent / "trl"
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=trl.GRPOConfig(**arguments(job["settings"], job["seed"], out)),
        train_dataset=Dataset.from_list(data),
        processing_class=words,
        callbacks=[Turns(answer)],
    )
    versions = {one.__name__: one.__version__ for one in (torch, transformers, trl)}
    choices = {
        "attention": model.config._attn_implementation,
        "use_cache": trainer.generation_config.use_cache,
        "optimizer": trainer.args.optim.value,
        "loss_type": trainer.args.loss_type,
        "threads": torch.get_num_threads(),
    }
    answer({"versions": versions, "parameters": sum(one.numel() for one in model.parameters()), "choices": choices})
    trainer.train()


if __name__ == "__main__":
    main()
