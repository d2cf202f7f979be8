"""A sequence between two engines: one computes its prompt, the other goes on from there.

`rows` is what travels, `exports` the side that computes and sends; what receives is `media_stream`, as for media.
"""
