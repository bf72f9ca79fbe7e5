"""Floor 3: a model and prompts in, completions out."""

from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Event, Request, engine_for
from finemoe.generation.sampling import pick
from finemoe.generation.sequence import FinishReason, Sequence

__all__ = ["Engine", "Event", "FinishReason", "Request", "SamplingConfig", "Sequence", "engine_for", "pick"]
