"""Language models trained with the losses of this package, and attacks on what they read; the command is `drsl lm`.

What is imported here needs torch and numpy alone; BPE needs the package tokenizers, of the extra "lab".
"""

from .corpus import Corpus, drawn_windows, load_corpus, windows
from .embedding_attack import EmbeddingAttack, embedding_pgd, mean_embedding_norm
from .generation import continued
from .losses import LanguageLoss
from .model import GPT, Shape
from .run_folder import load_language_model
from .scoring import Score
from .substitution import Substitution, substitute_tokens
from .text import Text, read_text
from .tokens import BPETokens, ByteTokens

__all__ = [
    "GPT",
    "BPETokens",
    "ByteTokens",
    "Corpus",
    "EmbeddingAttack",
    "LanguageLoss",
    "Score",
    "Shape",
    "Substitution",
    "Text",
    "continued",
    "drawn_windows",
    "embedding_pgd",
    "load_corpus",
    "load_language_model",
    "mean_embedding_norm",
    "read_text",
    "substitute_tokens",
    "windows",
]
