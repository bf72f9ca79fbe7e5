"""finemoe: train, compare, inspect and sample fine-grained mixture-of-experts language models.

The public names are resolved on first use, so that importing the package does not import torch. Every verb of the
command line is a function here; it shows its progress on stderr unless it is asked to be quiet, or logging was set up.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import alone takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from finemoe.analysis.reports import analyze, trace
    from finemoe.checkpoint.adapters.files import merge
    from finemoe.checkpoint.conversion import export, import_
    from finemoe.checkpoint.doctor.examine import examine as doctor
    from finemoe.checkpoint.language_model import LanguageModel
    from finemoe.checkpoint.language_model import open_language_model as load
    from finemoe.checkpoint.open import load_chat_template, load_model, load_tokenizer
    from finemoe.compression.quantize import quantize
    from finemoe.core.errors import FinemoeError
    from finemoe.evaluation.evaluate import evaluate
    from finemoe.generation.generate import Completion, generate
    from finemoe.methods.distillation.rejection import rejection
    from finemoe.methods.distillation.sampling import sample
    from finemoe.methods.grpo.reading import find_answers as rollouts
    from finemoe.methods.merging import densify
    from finemoe.methods.reward import rewards
    from finemoe.methods.upcycling import upcycle
    from finemoe.model.config import ModelConfig
    from finemoe.model.transformer import Transformer
    from finemoe.runs.excerpts import data_excerpts
    from finemoe.runs.listing import list_runs
    from finemoe.runs.planning.check import Check, check
    from finemoe.runs.planning.distribution import plan
    from finemoe.runs.planning.launching import launch
    from finemoe.runs.planning.layouts import LayoutCheck, verify_parallel
    from finemoe.runs.planning.machine import env
    from finemoe.runs.planning.sizing import size
    from finemoe.runs.planning.starter import new_recipe
    from finemoe.runs.report import run_report as show
    from finemoe.runs.result import Run
    from finemoe.runs.run import resume, train
    from finemoe.server.conversation import Conversation, chat
    from finemoe.server.run import serve
    from finemoe.studies.compare import Comparison, compare
    from finemoe.studies.keys import recipe_keys
    from finemoe.studies.paper import paper
    from finemoe.studies.staged.study import study
    from finemoe.studies.stages import run_stages as train_stages
    from finemoe.text import Tokenizer

_VERBS = {
    "analyze": "finemoe.analysis.reports:analyze",
    "chat": "finemoe.server.conversation:chat",
    "check": "finemoe.runs.planning.check:check",
    "compare": "finemoe.studies.compare:compare",
    "data_excerpts": "finemoe.runs.excerpts:data_excerpts",
    "densify": "finemoe.methods.merging:densify",
    "doctor": "finemoe.checkpoint.doctor.examine:examine",
    "env": "finemoe.runs.planning.machine:env",
    "evaluate": "finemoe.evaluation.evaluate:evaluate",
    "export": "finemoe.checkpoint.conversion:export",
    "generate": "finemoe.generation.generate:generate",
    "import_": "finemoe.checkpoint.conversion:import_",
    "launch": "finemoe.runs.planning.launching:launch",
    "list_runs": "finemoe.runs.listing:list_runs",
    "merge": "finemoe.checkpoint.adapters.files:merge",
    "quantize": "finemoe.compression.quantize:quantize",
    "new_recipe": "finemoe.runs.planning.starter:new_recipe",
    "paper": "finemoe.studies.paper:paper",
    "plan": "finemoe.runs.planning.distribution:plan",
    "recipe_keys": "finemoe.studies.keys:recipe_keys",
    "rejection": "finemoe.methods.distillation.rejection:rejection",
    "resume": "finemoe.runs.run:resume",
    "rewards": "finemoe.methods.reward:rewards",
    "rollouts": "finemoe.methods.grpo.reading:find_answers",
    "sample": "finemoe.methods.distillation.sampling:sample",
    "serve": "finemoe.server.run:serve",
    "show": "finemoe.runs.report:run_report",
    "size": "finemoe.runs.planning.sizing:size",
    "study": "finemoe.studies.staged.study:study",
    "trace": "finemoe.analysis.reports:trace",
    "train": "finemoe.runs.run:train",
    "train_stages": "finemoe.studies.stages:run_stages",
    "upcycle": "finemoe.methods.upcycling:upcycle",
    "verify_parallel": "finemoe.runs.planning.layouts:verify_parallel",
}
_OTHERS = {
    "Check": "finemoe.runs.planning.check:Check",
    "Conversation": "finemoe.server.conversation:Conversation",
    "Comparison": "finemoe.studies.compare:Comparison",
    "Completion": "finemoe.generation.generate:Completion",
    "FinemoeError": "finemoe.core.errors:FinemoeError",
    "LayoutCheck": "finemoe.runs.planning.layouts:LayoutCheck",
    "LanguageModel": "finemoe.checkpoint.language_model:LanguageModel",
    "ModelConfig": "finemoe.model.config:ModelConfig",
    "Run": "finemoe.runs.result:Run",
    "Tokenizer": "finemoe.text:Tokenizer",
    "Transformer": "finemoe.model.transformer:Transformer",
    "load": "finemoe.checkpoint.language_model:open_language_model",
    "load_chat_template": "finemoe.checkpoint.open:load_chat_template",
    "load_model": "finemoe.checkpoint.open:load_model",
    "load_tokenizer": "finemoe.checkpoint.open:load_tokenizer",
}

__all__ = [
    "Check",
    "Comparison",
    "Completion",
    "Conversation",
    "FinemoeError",
    "LanguageModel",
    "LayoutCheck",
    "ModelConfig",
    "Run",
    "Tokenizer",
    "Transformer",
    "analyze",
    "chat",
    "check",
    "compare",
    "data_excerpts",
    "densify",
    "doctor",
    "env",
    "evaluate",
    "export",
    "generate",
    "import_",
    "launch",
    "list_runs",
    "load",
    "load_chat_template",
    "load_model",
    "load_tokenizer",
    "merge",
    "new_recipe",
    "paper",
    "plan",
    "quantize",
    "recipe_keys",
    "rejection",
    "resume",
    "rewards",
    "rollouts",
    "sample",
    "serve",
    "show",
    "size",
    "study",
    "trace",
    "train",
    "train_stages",
    "upcycle",
    "verify_parallel",
]


def __getattr__(name: str) -> Any:
    home = (_VERBS | _OTHERS).get(name)
    if home is None:
        raise AttributeError(f"module 'finemoe' has no attribute {name!r}")
    if name in _VERBS:
        from finemoe.core.logs import speak

        speak()
    from importlib import import_module

    module, attribute = home.split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
