"""Floor 1: strings and token ids. No neural network lives here."""

from finemoe.text.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

__all__ = ["END_OF_TEXT", "StreamDecoder", "Tokenizer"]
