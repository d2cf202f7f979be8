"""The integration harness: brings up a topology (or takes a running one), loads it, breaks it, and checks every answer.

`plan` says what a scenario file may hold; `oracle` knows the right answers; `target` is the cluster under test; `load`
asks it; `run` puts these together into verdicts; `report` and `plots` write them down.
"""
