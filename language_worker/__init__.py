"""Embeddings and tokens in, tokens out: the continuous-batching engine behind one language worker.

Owns sequences, pages of KV, the scheduler, sampling and detokenisation. It refuses to know HTTP, Ray, images
and how embeddings were made. Everything below `worker.py` runs with torch, safetensors, tokenizers and numpy alone.
"""
