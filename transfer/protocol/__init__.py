"""The stream protocol without input or output: messages and their bytes, states, sessions, tickets, tags and seals.

`state` is its specification. Everything takes values and a time, and returns values and actions; sealing and the tags
over blocks are here because keys and serials are the protocol's. Knows no socket, thread, clock or tensor.
"""
