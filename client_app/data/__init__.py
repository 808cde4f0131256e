"""From a source of pictures to the examples of one client.

`catalogue` (facts about known data sets) -> `own`, `published` (where the pictures are) ->
`decode` (pictures to uint8) -> `cache` (decoded once, memory-mapped by all) -> `splits`,
`partitioners` (who owns what) -> `partitions` (drawn once, stored as index arrays).
`client_app.data.examples` uses all of it.
"""
