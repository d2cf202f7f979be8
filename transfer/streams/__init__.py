"""What workers call: streams of rows out of one process and into the blocks of another, and calls beside them.

Sessions of `protocol` run here over an endpoint of `endpoints`, with rows in the pool or in `shared_memory`.
"""
