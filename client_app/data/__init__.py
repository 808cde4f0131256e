"""From a source of pictures to the examples of one client.

`catalogue` (facts about known data sets) -> `own`, `published` (where the pictures are) ->
`decode` (pictures to uint8) -> `cache` (decoded once, memory-mapped by all) -> `splits`,
`partitions` (who owns what: drawn once, stored as index arrays) -> `examples`.
"""
