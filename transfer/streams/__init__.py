"""What workers call: streams of rows out of one process and into the blocks of another.

Sessions of `protocol` run here over a service, with rows in the pool or the segments of `memory`.
"""
