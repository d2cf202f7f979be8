"""Memory that a receiver shares with the senders of its host: segments of slots, how they change hands, and their end.

Knows slots and who may write them; the streams that use them are in `streams`.
"""
