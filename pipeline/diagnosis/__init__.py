"""Whether a machine and a cluster are fit for a run, and what to do where they are not: what `nightshift doctor` asks.

A check is a pure function from facts to findings; the facts are read beside it. What may take long, hang or take its
process along (importing torch, starting Ray, a file system of the network) is asked in a child process, which runs one
of the `probes`. So this package imports neither torch nor Ray, and works where they are not installed.
"""
