"""How messages travel between processes: one contract, and a transport for each kind of address.

`connection` is the contract, `endpoint` opens one by its address. Knows messages and their sizes; not what they mean.
"""
