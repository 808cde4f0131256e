"""Rules that move the hypernetwork along the updates of its clients."""
