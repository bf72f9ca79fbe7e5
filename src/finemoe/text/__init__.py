"""Floor 1: strings and token ids. No neural network lives here."""

from finemoe.text.alterations import Alterations, alterations
from finemoe.text.chat import ChatTemplate
from finemoe.text.fidelity import Fidelity, fidelity, require_faithful
from finemoe.text.from_vocabulary import Vocabulary, tokenizer_from_vocabulary, vocabulary_of
from finemoe.text.settings import TokenizerSettings, class_problem, exported_tokenizer_config
from finemoe.text.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

__all__ = [
    "END_OF_TEXT",
    "Alterations",
    "ChatTemplate",
    "Fidelity",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerSettings",
    "Vocabulary",
    "alterations",
    "class_problem",
    "exported_tokenizer_config",
    "fidelity",
    "require_faithful",
    "tokenizer_from_vocabulary",
    "vocabulary_of",
]
