"""The warm worker: one local process per participant that keeps torch, data and model loaded.

Flower 1.41 starts a process for every message. That process imports no torch: it forwards the
message over a Unix socket to the worker (`link`), which is started on demand (`place`) and ends
when idle (`serve`). Anything that keeps the worker from answering ends with the message being
handled in the process itself, as if there were no worker.
"""
