"""How a participant's messages start: `flwr-clientapp`, without importing Flower each time.

Flower 1.41 starts the program `flwr-clientapp` for every message, and a participant's SuperNode
finds ours first on its PATH (`program`). It hands its arguments to a process that has Flower
imported and forks for each message (`message`); `ask` is what runs in between, in 30 ms. Where
there is no such process it starts Flower itself: slower, and otherwise the same.
"""
