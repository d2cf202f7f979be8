"""Where rows lie at their receiver: its own pool, or segments shared with the senders of its host.

Pools, planners, segments, how these change hands and how they end. Knows sessions; the streams that use it are above.
"""
