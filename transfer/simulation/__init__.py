"""The simulator: real services, receivers and senders over a virtual network with a virtual clock, replayable by seed.

No thread, socket or real clock is involved, and a run is a pure function of its seed. `scenario` says what a seed
means, `world` plays it, `judge` checks every step by bookkeeping of its own, `story` tells what happened, and
`runner` runs many seeds over several processes.
"""
