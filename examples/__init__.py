"""How the shipped demo checkpoint came to be: drawing, training, evaluation.

Nothing in the installed packages imports this folder. It needs scikit-learn (the handwritten glyphs),
torch, tokenizers, pillow and rich; it does not need transformers.
"""
