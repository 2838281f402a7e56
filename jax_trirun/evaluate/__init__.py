"""What a model is worth: perplexity over text."""

from .perplexity import Perplexity, perplexity, sample_text

__all__ = ["Perplexity", "perplexity", "sample_text"]
