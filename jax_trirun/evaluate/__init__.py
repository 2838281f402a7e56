"""What a model is worth: perplexity over text, and lm-eval's tasks.

`lm_eval` and its tasks need the package lm-eval and are imported by name: jax_trirun.evaluate.lm_eval.
"""

from .perplexity import Perplexity, perplexity, sample_text
from .scoring import Scorer

__all__ = ["Perplexity", "Scorer", "perplexity", "sample_text"]
