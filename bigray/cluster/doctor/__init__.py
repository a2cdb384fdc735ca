"""`bigray doctor`: what keeps a live cluster from running a job, found in seconds.

`probes` measures on each node, `rings` between nodes, `examine` drives both from the driver and leaves nothing behind.
`facts` is what they bring home; `checks` judges it, purely, and every verdict is a `Finding`.
"""
