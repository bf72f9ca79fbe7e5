"""Answers in what a model wrote: found, read, and compared with the gold ones.

Words: `compare_words`; as SQuAD and DROP define them, `normalize_text`, `exact_match`, `token_f1`, `drop_f1`. Numbers:
`final_number`, `compare_numbers`. LaTeX: `boxed`, `compare_latex`. Whatever a reference is: `says`.
"""

from finemoe.text.answers.agreement import agreement, says, stated_number
from finemoe.text.answers.comparison import boxed, compare_latex, compare_numbers, compare_words, final_number
from finemoe.text.answers.judge import Equality
from finemoe.text.answers.overlap import drop_exact_match, drop_f1, exact_match, normalize_text, token_f1
from finemoe.text.answers.words import split_list

__all__ = [
    "Equality",
    "agreement",
    "boxed",
    "compare_latex",
    "compare_numbers",
    "compare_words",
    "drop_exact_match",
    "drop_f1",
    "exact_match",
    "final_number",
    "normalize_text",
    "says",
    "split_list",
    "stated_number",
    "token_f1",
]
